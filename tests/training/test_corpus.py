import pytest

from training.chat import Conversations, find_nouns, take, topic_of
from training.corpus import END, join_stories, load_corpus, normalise, split_stories
from training.suitability import LIMIT, judge, severity

CALM = "Once upon a time an old woman lived in a wood with her cat. " * 10


def test_splitting_and_joining_are_inverse():
    stories = ["One.\n\nTwo.", "Three."]
    assert split_stories(join_stories(stories)) == stories
    assert join_stories(stories).count(f"\n{END}\n") == 2


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\u201cYes,\u201d she said\u2014\u2018no.\u2019", "\"Yes,\" she said--'no.'"),
        ("CHAPTER IV. The Wood\n\nA fox.", "A fox."),
        ("A fox.[Footnote 3: a beast] It ran.", "A fox. It ran."),
        ("[Illustration]\n\nA fox.\n\n\n\n* * *\n\nIt  ran.", "A fox.\n\nIt ran."),
        ("A _very_ old fox.\n\nThe End", "A very old fox."),
    ],
)
def test_normalising_leaves_only_the_tale(raw, clean):
    assert normalise(raw) == clean
    assert normalise(clean) == clean


def test_one_bad_paragraph_is_cut_and_three_drop_the_story():
    bad = "He was beaten to death by drunkards."
    once = judge(f"{CALM}\n\n{bad}\n\n{CALM}")
    assert once.text == f"{CALM}\n\n{CALM}"
    assert once.cuts == 1
    thrice = judge(f"{CALM}\n\n{bad}\n\n{bad}\n\n{bad}")
    assert thrice.text is None
    assert thrice.reason in {"beating", "drink"}


def test_a_bloody_story_is_dropped_and_a_little_danger_is_not():
    assert severity(CALM) == 0
    danger = CALM + "\n\nThe wolf would have killed her, but she ran."
    assert 0 < severity(danger) < LIMIT
    assert judge(danger).text == danger
    assert judge(CALM + "\n\nHe killed, and killed, and there was blood on the dagger.").reason == "violence"


def test_the_sample_is_suitable_and_small(sample):
    corpus = load_corpus(sample)
    assert not corpus.dropped
    assert corpus.cuts == 0
    assert 50_000 < sum(path.stat().st_size for path in sample.glob("*.txt")) < 100_000
    assert corpus.valid_bytes > 5_000


def test_topics_are_nouns_of_the_passage():
    stories = ["The fox saw a wolf. The wolf ran, and the fox was glad. The quick fox slept."] * 10
    nouns = find_nouns(stories, least=3)
    assert {"fox", "wolf"} <= nouns.keys()
    assert not {"quick", "saw", "the"} & nouns.keys()
    assert topic_of("The wolf met a fox; the fox smiled, and the wolf ran from the fox.", nouns) == "a fox and a wolf"
    assert topic_of("No animals here.", nouns) is None


def test_passages_end_at_a_paragraph_or_a_sentence():
    assert take(["First.", "Second.", "Third."], 15) == "First.\n\nSecond."
    assert take(["It rained. It snowed. It hailed."], 24) == "It rained. It snowed."
    assert take(["It rained and it snowed."], 12) == "It rained"


def test_conversations_take_turns_and_repeat_with_their_seed(sample):
    stories = load_corpus(sample).train
    drawn = list(Conversations(stories, seed=4).draw(3))
    assert drawn == list(Conversations(stories, seed=4).draw(3))
    assert drawn != list(Conversations(stories, seed=5).draw(3))
    for messages in drawn:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in messages)
        assert len(messages[-1]["content"]) < 1600
