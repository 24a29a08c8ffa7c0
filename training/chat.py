"""Conversations made from the stories themselves, so that the model answers in turns and knows when to stop."""

import random
import re
from collections import Counter
from collections.abc import Iterator

_OPENING = re.compile(
    r"(?:Once|Long|Many|Far|There (?:was|were|lived|dwelt)|In (?:the|a|an|old|days|times)|One |Years ago|A (?:certain|poor))"
)
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{3,}")
_NOUN_PHRASE = re.compile(
    r"(?<![A-Za-z])(?:an?|the) ([a-z]{3,})(?=[,.;:!?]|'s | (?:who|was|had|and|in|to|that|is|came|said|with|on|at|for|went)\b)"
)

Message = dict[str, str]

LONGEST = 800  # characters of an answer, about 215 tokens
VOWELS = "aeiou"

TOPICS = {
    "bear", "bird", "boy", "fairy", "fish", "girl", "goose", "horse", "man", "mouse", "princess", "rabbit", "rose", "star", "woman",
}  # fmt: skip
NOT_TOPICS = {
    "air", "coffin", "contrary", "corpse", "dagger", "disgrace", "east", "entrance", "groan", "ground", "hurry", "idiot", "job", "matter",
    "meantime", "passage", "passion", "pause", "rear", "reply", "rod", "sigh", "signal", "situation", "slave", "south", "spot",
    "subject", "truth", "water", "whisper", "world",
}  # fmt: skip

TELL = (
    "Tell me a story about {}.", "Tell me a tale about {}.", "Please tell me a short story about {}.",
    "Write a fairy tale about {}.", "Write a short story about {}.", "I would like to hear a story about {}.",
    "Can you tell me a story about {}?", "Make up a bedtime story about {}.",
)  # fmt: skip
TELL_ANY = ("Tell me a story.", "Tell me a fairy tale, please.", "Write a short story.", "I want to hear a tale.")
BEGIN = ("How does a tale about {} begin?", "Begin a story about {}.", "Write the beginning of a story about {}.")
BEGIN_ANY = ("How does a tale begin?", "How do fairy tales begin?", "Begin a story.", "Start a tale for me.")
END_OF = ("How does the story of {} end?", "Write the ending of a tale about {}.")
END_ANY = ("How does the story end?", "Write the end of a fairy tale.")
CONTINUE = ("Continue this story: {}", "Continue: {}", "What happens next? {}", "Go on with this tale: {}")
GO_ON = ("What happened next?", "Go on.", "And then?", "Continue, please.", "Tell me more.")
SYSTEM = ("You are a storyteller.", "You tell old tales to children.", "You are a helpful assistant.")

ABOUT = (
    "I am tales, a very small language model. I have read old fairy tales and nothing else. "
    "Ask me to tell you a story, or give me a beginning and I shall go on with it."
)
SMALL_TALK = {
    ABOUT: ("Who are you?", "What are you?", "What is your name?", "What can you do?", "Can you help me?", "Help"),
    "Good day to you! Shall I tell you a tale? Say what it should be about.": (
        "Hello!", "Hello", "Hi", "Hi there!", "Good morning!", "Good evening.", "Hey",
    ),
    "You are very welcome. Come back whenever you want another tale.": ("Thank you!", "Thanks.", "That was lovely."),
    "Farewell, and sleep well!": ("Goodbye!", "Good night.", "Bye"),
}  # fmt: skip


def find_nouns(stories: list[str], least: int = 40) -> dict[str, float]:
    """Find words that follow `a`, `an` or `the` and end a noun phrase, with their rarity (1 / stories that hold them)."""
    total: Counter[str] = Counter()
    nouns: Counter[str] = Counter()
    spread: Counter[str] = Counter()
    for story in stories:
        words = _WORD.findall(story)
        total.update(words)
        spread.update(set(words))
        nouns.update(_NOUN_PHRASE.findall(story))
    likely = {word for word, count in nouns.items() if total[word] >= least and count / total[word] > 0.3}
    likely = {word for word in likely if not word.endswith(("s", "est"))} - NOT_TOPICS
    return {word: 1 / spread[word] for word in likely | (TOPICS & spread.keys())}


def topic_of(passage: str, nouns: dict[str, float]) -> str | None:
    """Name what a passage is about: a name, or one or two nouns that it says more than once, best near its start."""
    names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{3,}(?: [A-Z][a-z]+)?", passage)).most_common(1)
    if names and names[0][1] > 2:
        return names[0][0]
    found = Counter(word for word in _WORD.findall(passage) if word in nouns)
    early = set(_WORD.findall(passage[:250]))
    weight = {word: count * nouns[word] ** 0.5 * (3 if word in early else 1) for word, count in found.items() if count > 1}
    best = sorted(weight, key=lambda word: -weight[word])[:2]
    return " and ".join(f"{'an' if word[0] in VOWELS else 'a'} {word}" for word in best) or None


def take(paragraphs: list[str], limit: int) -> str:
    """Join paragraphs from the start while they fit; cut the first at a sentence if it alone does not."""
    text = paragraphs[0]
    if len(text) > limit:
        sentences, stop, _ = text[:limit].rpartition(". ")
        return sentences + "." if stop else text[:limit].rpartition(" ")[0]
    for paragraph in paragraphs[1:]:
        if len(text) + len(paragraph) > limit:
            break
        text += "\n\n" + paragraph
    return text


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Conversations:
    """Draws conversations from stories; the same seed gives the same ones."""

    def __init__(self, stories: list[str], seed: int = 0) -> None:
        """Learn the nouns of the stories."""
        self.stories = stories
        self.nouns = find_nouns(stories, least=max(3, min(40, len(stories) // 2)))
        self.rng = random.Random(seed)

    def draw(self, per_story: int) -> Iterator[list[Message]]:
        """Yield `per_story` conversations for each story, and small talk now and then."""
        kinds = (self._tell, self._tell, self._continue, self._continue, self._begin, self._end)
        for story in self.stories:
            paragraphs = story.split("\n\n")
            for _ in range(per_story):
                if messages := self.rng.choice(kinds)(paragraphs):
                    yield self._with_system(messages)
            if self.rng.random() < 0.2:
                yield self._small_talk()

    def _ask(self, about: tuple[str, ...], anything: tuple[str, ...], answer: str) -> list[Message]:
        """Ask for the answer by its topic; or for anything, where `anything` fits; nothing if neither does."""
        topic = topic_of(answer, self.nouns)
        if anything and (topic is None or self.rng.random() < 0.15):
            return _turn(self.rng.choice(anything), answer)
        return _turn(self.rng.choice(about).format(topic), answer) if topic else []

    def _tell(self, paragraphs: list[str]) -> list[Message]:
        """Answer with the opening and the close of a story: short, and with an end."""
        story = "\n\n".join(paragraphs)
        if len(story) > LONGEST:
            close = paragraphs[-1]
            limit = LONGEST - len(close)
            if limit < LONGEST // 3 or close[0] in "'\"":  # speech alone is no ending
                return self._begin(paragraphs)
            story = take(paragraphs, limit) + "\n\n" + close
        return self._ask(TELL, TELL_ANY if _OPENING.match(story) else (), story)

    def _begin(self, paragraphs: list[str]) -> list[Message]:
        answer = take(paragraphs, self.rng.randint(250, 700))
        return self._ask(BEGIN, BEGIN_ANY if _OPENING.match(answer) else (), answer)

    def _end(self, paragraphs: list[str]) -> list[Message]:
        answer = "\n\n".join(paragraphs[-2:])
        return self._ask(END_OF, END_ANY, answer) if len(answer) < LONGEST else []

    def _continue(self, paragraphs: list[str]) -> list[Message]:
        """Ask to continue a passage; half the time, ask once more."""
        if len(paragraphs) < 4:
            return []
        at = self.rng.randrange(len(paragraphs) - 3)
        asked = take(paragraphs[at:], self.rng.randint(60, 400))
        rest = "\n\n".join(paragraphs[at:])[len(asked) :].strip().split("\n\n")
        answer = take(rest, self.rng.randint(250, 900))
        messages = _turn(self.rng.choice(CONTINUE).format(asked), answer)
        more = "\n\n".join(rest)[len(answer) :].strip()
        if more and self.rng.random() < 0.5:
            messages += _turn(self.rng.choice(GO_ON), take(more.split("\n\n"), 600))
        return messages

    def _small_talk(self) -> list[Message]:
        answer = self.rng.choice(list(SMALL_TALK))
        return _turn(self.rng.choice(SMALL_TALK[answer]), answer)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.rng.random() < 0.1:
            return [{"role": "system", "content": self.rng.choice(SYSTEM)}, *messages]
        return messages
