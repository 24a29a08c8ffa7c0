"""Text that arrives token by token is the text that the tokenizer gives for the whole, in whole characters."""

import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nbengine.detokenizer import Detokenizer
from nbengine.tokenizer import Tokenizer

CORPUS = ["Once upon a time there was a little fox. The fox said: hello world!", "one two  three\n\nfour five", "你好 naïve"]
HALF = "\ufffd"


def _byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|end|>"]))
    backend.add_special_tokens([AddedToken("<\uff5cfin\uff5c>")])
    backend.add_tokens([AddedToken("two words"), AddedToken("\xe9"), AddedToken("🙂")])
    return backend


def _byte_fallback(*, strip=True):
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    backend.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=340, special_tokens=specials))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if strip else [])]
    backend = Backend.from_str(json.dumps(described))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _word_piece():
    """A decoder that cannot be taken apart: spaces depend on the neighbours."""
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3, ",": 4, "##é": 5}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def _tokenizer(tmp_path, backend):
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


BACKENDS = {"byte level": _byte_level, "llama2": _byte_fallback, "gemma": lambda: _byte_fallback(strip=False), "wordpiece": _word_piece}


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request, tmp_path_factory):
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), BACKENDS[request.param]())


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), _byte_level())


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), _byte_fallback())


def run(tokenizer, prompt, output, **options):
    """The deltas, and the detokenizer after its end."""
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    deltas = []
    for token_id in output:
        stopped = detokenizer.push(token_id)
        deltas.append(detokenizer.take_delta())
        assert detokenizer.text == "".join(deltas)
        if stopped:
            break
    detokenizer.finish()
    deltas.append(detokenizer.take_delta())
    assert detokenizer.text == "".join(deltas)
    return deltas, detokenizer


def whole(tokenizer, prompt, output, skip):
    """What the output adds to the prompt's text, a character that the prompt began and the output completes included."""
    before = tokenizer.decode(prompt, skip)
    text = tokenizer.decode([*prompt, *output], skip)
    while not text.startswith(before):
        assert before.endswith(HALF)
        before = before[:-1]
    return text[len(before) :]


def well_formed(tokenizer, ids):
    """Byte tokens that make no characters turn their whole run to U+FFFD afterwards; no stream can foresee that."""
    return "<0x00>" not in tokenizer.backend.get_vocab() or HALF not in tokenizer.decode(ids, skip_special_tokens=False)


words = st.text(st.sampled_from("aeo thf\n.你é🙂👩\u200d̈") | st.characters(codec="utf-8"), max_size=12)
numbers = st.lists(st.integers(0, 345), max_size=12)


@given(prompt=words, output=st.lists(words, max_size=4), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_whole_text(tokenizer, prompt, output, skip):
    prompt_ids, ids = tokenizer.encode(prompt), [number for text in output for number in tokenizer.encode(text)]
    deltas, detokenizer = run(tokenizer, prompt_ids, ids, skip_special_tokens=skip)
    assert detokenizer.text == whole(tokenizer, prompt_ids, ids, skip)
    if not any(HALF in tokenizer.decode(tokenizer.encode(text), False) for text in output):
        assert HALF not in "".join(deltas)


@given(prompt=numbers, output=numbers, skip=st.booleans(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_tokens_give_the_whole_text_in_whole_characters(tokenizer, prompt, output, skip, data):
    emoji = [tokenizer.encode(text) for text in ("🙂", "语", "é", "👩‍👩‍👧")]
    prompt, output = ([number % (tokenizer.vocab_size + 2) for number in ids] for ids in (prompt, output))
    if tokenizer.backend.token_to_id("[UNK]") is not None:  # a window of ids that do not exist shows nothing
        prompt = [number for number in prompt if number < tokenizer.vocab_size]
    output = [number for token in output for number in data.draw(st.sampled_from([[token], [token], *emoji]))]
    _, detokenizer = run(tokenizer, prompt, output, skip_special_tokens=skip)
    if well_formed(tokenizer, prompt) and well_formed(tokenizer, prompt + output):
        assert detokenizer.text == whole(tokenizer, prompt, output, skip)


@given(ids=st.lists(st.integers(0, 345), max_size=10))
@settings(max_examples=150, deadline=None)
def test_a_delta_never_ends_within_a_character(byte_level, ids):
    raw = Detokenizer(byte_level)
    seen = []
    for number in ids:
        raw.push(number)
        seen.append(number)
        delta = raw.take_delta()
        # a U+FFFD that was given away stays one, whatever follows
        continued = byte_level.decode([*seen, byte_level.encode("x")[0]])
        assert continued.startswith(raw.text), (delta, continued)


@pytest.mark.parametrize("text", ["🙂", "你好", "👩‍👩‍👧 family", "naïve"])
def test_a_character_comes_when_its_last_byte_does(tokenizer, text):
    if tokenizer.backend.token_to_id("[UNK]") is not None:
        pytest.skip("a vocabulary of letters")
    ids = tokenizer.encode(f"a {text}")
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for number in ids:
        detokenizer.push(number)
        shown += detokenizer.take_delta()
        assert f"a {text}".startswith(shown.lstrip())
    assert shown.lstrip() == f"a {text}"  # before finish: nothing that is complete is held back


def test_a_continuation_keeps_its_leading_space(llama2):
    prompt, full = llama2.encode("the fox"), llama2.encode("the fox said")
    assert full[: len(prompt)] == prompt
    assert run(llama2, prompt, full[len(prompt) :])[1].text == " said"
    assert run(llama2, [], llama2.encode("said"))[1].text == "said"
    assert run(llama2, [1], llama2.encode("said"))[1].text == "said"  # <s> is not part of the text


def test_a_character_begun_by_the_prompt_is_finished_by_the_output(byte_level, llama2):
    for tokenizer in (byte_level, llama2):
        ids = tokenizer.encode("a语")
        assert run(tokenizer, ids[:-2], ids[-2:])[1].text == "语"
        assert run(tokenizer, ids[:-2], tokenizer.encode("a"))[1].text.strip() == "a"  # never finished: the prompt shows it
        assert run(tokenizer, ids[:-2], [])[1].text == ""


def test_half_a_character_at_the_end_shows_as_in_the_whole_text(tokenizer):
    ids = tokenizer.encode("a 语")[:-1]
    assert run(tokenizer, [], ids)[1].text == tokenizer.decode(ids)


def test_broken_bytes_do_not_stop_the_stream(llama2):
    lead, space = llama2.backend.token_to_id("<0xE4>"), llama2.encode("the")
    ids = [*space, lead, lead, *space]
    deltas, detokenizer = run(llama2, [], ids)
    assert detokenizer.text == llama2.decode(ids) == f"the{HALF}{HALF} the"
    assert len([delta for delta in deltas if delta]) >= 3


def test_a_run_of_bytes_that_is_broken_at_its_start_stays_broken(llama2):
    ids = [llama2.backend.token_to_id(f"<0x{value:02X}>") for value in (0xE4, 0x41, 0xE4, 0xBD, 0xA0)]
    ids += llama2.encode("the")
    assert run(llama2, [], ids)[1].text == llama2.decode(ids) == HALF * 5 + " the"


@given(
    before=words,
    after=words,
    stop=st.lists(st.text("ab. é🙂\n", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    pick=st.integers(0, 2),
    skip=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_a_search_character_by_character_would(tokenizer, before, after, stop, include, pick, skip):
    ids = tokenizer.encode(before + stop[pick % len(stop)] + after)
    text = whole(tokenizer, [], ids, skip)
    expected, reason = text, None
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            reason = max(found, key=len)
            expected = text[: end if include else end - len(reason)]
            break
    deltas, detokenizer = run(tokenizer, [], ids, skip_special_tokens=skip, stop=stop, include_stop_str_in_output=include)
    assert (detokenizer.text, detokenizer.stop_reason) == (expected, reason)
    assert "".join(deltas) == expected


def test_only_what_may_become_a_stop_string_is_held_back(byte_level):
    detokenizer = Detokenizer(byte_level, stop=["###", "fox!"])
    shown = []
    for letter in "a # b ## fox hello fo":
        detokenizer.push(byte_level.encode(letter)[0])
        shown.append(detokenizer.take_delta())
    assert shown == ["a", " ", "", "# ", "b", " ", "", "", "## ", "", "", "", "fox ", "h", "e", "l", "l", "o", " ", "", ""]
    assert detokenizer.text == "a # b ## fox hello "
    assert detokenizer.finish() is False
    assert detokenizer.take_delta() == "fo"


def test_nothing_is_held_back_when_the_stop_string_is_part_of_the_text(byte_level):
    detokenizer = Detokenizer(byte_level, stop=["###"], include_stop_str_in_output=True)
    assert [detokenizer.push(byte_level.encode(letter)[0]) for letter in "a##"] == [False] * 3
    assert detokenizer.take_delta() == "a##"
    assert detokenizer.push(byte_level.encode("#")[0])
    assert (detokenizer.take_delta(), detokenizer.stop_reason) == ("#", "###")


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, "x"), (1, "x"), (2, "x"), (3, "xab"), (6, "xabab")])
def test_a_stop_string_must_end_after_min_tokens(byte_level, min_tokens, expected):
    ids = [byte_level.encode(letter)[0] for letter in "xababc"]
    _, detokenizer = run(byte_level, [], ids, stop=["ab"], min_tokens=min_tokens)
    assert detokenizer.text == (expected if min_tokens < 6 else "xababc")
    assert detokenizer.stop_reason == ("ab" if min_tokens < 6 else None)


def test_tokens_after_the_stop_add_nothing(byte_level):
    ids = byte_level.encode("a###b")
    detokenizer = Detokenizer(byte_level, stop=["###"])
    assert [detokenizer.push(number) for number in ids][-1] is True
    assert detokenizer.push(ids[0]) is True
    assert detokenizer.finish() is True
    assert (detokenizer.text, detokenizer.stop_reason) == ("a", "###")


def test_special_tokens_are_text_only_when_asked_for(byte_level):
    ids = [*byte_level.encode("hello"), byte_level.backend.token_to_id("<|end|>")]
    assert run(byte_level, [], ids)[1].text == "hello"
    assert run(byte_level, [], ids, skip_special_tokens=False, stop=["|end|"])[1].text == "hello<"


def test_ids_outside_the_vocabulary_are_no_text(tokenizer):
    assert run(tokenizer, [10**6], [10**6, *tokenizer.encode("a")])[1].text.strip() == "a"


def test_a_token_costs_less_than_a_few_microseconds(byte_level):
    ids = byte_level.encode("Once upon a time there was a little fox. " * 50)
    detokenizer = Detokenizer(byte_level)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for number in ids:
            detokenizer.push(number)
        best = min(best, time.perf_counter() - start)
    assert best / len(ids) < 4e-6  # about 0.2e-6 on an idle machine


def test_many_long_stop_strings_cost_little_memory_and_time(byte_level):
    stops = [f"{number} {'ab' * 490}" for number in range(64)]
    ids = byte_level.encode("0 " + "ab" * 480)
    tracemalloc.start()
    many = [Detokenizer(byte_level, stop=stops) for _ in range(100)]
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 2e6
    began = time.perf_counter()
    for number in ids:
        many[0].push(number)
    assert many[0].text == ""  # all of it may be the beginning of one
    assert (time.perf_counter() - began) / len(ids) < 2e-3  # about 0.05e-3 on an idle machine
