"""What a teacher would not want on a classroom screen.

Two lists decide. A paragraph that holds a word or phrase of `NEVER` is cut out; a story with more than `MOST_CUTS` such
paragraphs is dropped whole, and so is one whose `SOMETIMES` words weigh `LIMIT` or more per thousand words.

Old tales have wolves, witches and battles; those stay. What goes: insults to peoples, suicide, torture and gore,
dwelling on killing, beating of children and animals, drunkenness.
"""

import re
from dataclasses import dataclass

NEVER: dict[str, tuple[str, ...]] = {
    "peoples": (
        r"nigg\w+", r"negro\w*", r"negress\w*", r"blackamoors?", r"dark(?:ies|ey|eys)", r"golliwog\w*", r"pickaninn\w*",
        r"chinam[ae]n", r"japs?", r"jew(?:s|ess|ish)?", r"g[iy]ps(?:y|ies)", r"redskins?", r"red indians?", r"squaws?",
        r"savages", r"cannibals?", r"hottentots?", r"heathens?", r"infidels?", r"mohammedans?", r"half-?breeds?",
        r"black men", r"black m[ae]n with", r"uncivili[sz]ed",
    ),
    "suicide": (
        r"suicide", r"(?:kill|hang|drown|stab|poison)(?:ed|ing)? (?:myself|yourself|himself|herself|themselves)",
        r"(?:take|took) (?:my|your|his|her|their) own li(?:fe|ves)", r"(?:end|ended) (?:my|his|her) (?:own )?life",
    ),
    "gore": (
        r"entrails", r"disembowel\w*", r"intestines", r"flay(?:ed|ing)?", r"mutilat\w+", r"strangl(?:e|ed|ing)",
        r"throttl(?:e|ed|ing)", r"pool of blood", r"tortur(?:e|ed|es|ing)",
        r"(?:red-hot|iron|burning) shoes", r"boiled alive", r"burn(?:ed|t)? alive", r"buried alive",
        r"(?:cut|cutting|hacked|chopped|tore|torn)(?: \w+){0,3} (?:in|to|into) pieces",
        r"(?:pull|pluck|pick|put|tear|tore|scratch)(?:ed|ing)? out (?:his|her|their|my|your|both) eyes",
    ),
    "adult": (
        r"harems?", r"concubines?", r"ravish(?:ed)?", r"whores?", r"harlots?", r"bastards?", r"damn(?:ed)?", r"opium",
        r"stark naked", r"quite naked",
    ),
    "beating": (
        r"flogg?(?:ed|ing)?", r"caned", r"birch rod", r"horsewhip\w*", r"cat-o'-nine-tails", r"thrashing",
        r"(?:beat|beaten|whip|whipped|thrash|thrashed|lashed)(?: \w+){0,4} (?:to death|within an inch|till (?:the )?blood)",
    ),
    "drink": (
        r"drunkards?", r"drunkenness", r"dead drunk", r"(?:was|were|got|so|very|half|too|blind|made \w+|be) drunk",
        r"tipsy", r"intoxicat\w+",
    ),
}  # fmt: skip

SOMETIMES: dict[str, float] = {
    r"murder\w*|slay\w*|slew|slain": 2.0,
    r"kill(?:s|ed|ing)?": 1.0,
    r"behead\w*|execut(?:ed|ion|ioner)|gallows|hanged|hangman|scaffold": 2.0,
    r"(?:cut|cutting|chopped?|struck|strike|hew|hewed|smite|smote) off": 1.5,
    r"corpses?|dead (?:body|bodies|m[ae]n)|skulls?": 1.5,
    r"blood|bloody|bleeding|bled": 1.0,
    r"stab(?:bed|bing)?|slaughter\w*|dagger": 1.0,
    r"poison(?:ed|ous)?|burn(?:ed|t) to death|put to death": 1.0,
    r"whip(?:ped|ping|s)?|thrash(?:ed)?|spank(?:ed|ing)?|beaten|beat (?:him|her|me|them|the boy|the girl)": 1.0,
    r"drunk(?:en)?|brandy|gin|rum|whiske?y": 0.7,
    r"devils?|hell": 0.7,
    r"slaves?|savage|idiots?|lunatics?|cripples?|hunchbacks?|imbeciles?": 0.7,
    r"naked|ass-?hole|mistresses": 0.5,
}  # fmt: skip

LIMIT = 5.0
"""Weight per thousand words at which a story is dropped."""

MOST_CUTS = 2
"""A story that would lose more paragraphs than this is dropped."""

_NEVER = {kind: re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE) for kind, words in NEVER.items()}
_ANY = re.compile("|".join(pattern.pattern for pattern in _NEVER.values()), re.IGNORECASE)
_SOMETIMES = [(re.compile(rf"\b(?:{words})\b", re.IGNORECASE), weight) for words, weight in SOMETIMES.items()]
_SHORTEST = 400  # words; a shorter story is weighed as if it had this many


@dataclass(frozen=True)
class Verdict:
    """What is left of a story: `text` is None when it was dropped, and `reason` then says why."""

    text: str | None
    reason: str = ""
    cuts: int = 0


def severity(story: str) -> float:
    """Return the weight of the story's `SOMETIMES` words per thousand words."""
    weight = sum(weight * len(pattern.findall(story)) for pattern, weight in _SOMETIMES)
    return 1000 * weight / max(len(story.split()), _SHORTEST)


def judge(story: str) -> Verdict:
    r"""Keep a story, trim it, or drop it.

    >>> judge("There was a kind old woman.\n\nThree drunkards came by.\n\nShe shut the door.").text
    'There was a kind old woman.\n\nShe shut the door.'
    >>> judge("Three drunkards came by.").reason
    'drink'
    """
    paragraphs = story.split("\n\n")
    kept = [paragraph for paragraph in paragraphs if not _ANY.search(paragraph)]
    cuts = len(paragraphs) - len(kept)
    if cuts > MOST_CUTS or not kept:
        return Verdict(None, kind_of(story))
    text = "\n\n".join(kept)
    return Verdict(None, "violence") if severity(text) >= LIMIT else Verdict(text, cuts=cuts)


def kind_of(text: str) -> str:
    """Return the kind of `NEVER` words that the text holds most of, or an empty string."""
    found = {kind: len(pattern.findall(text)) for kind, pattern in _NEVER.items()}
    kind = max(found, key=lambda kind: found[kind])
    return kind if found[kind] else ""
