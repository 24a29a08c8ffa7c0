"""A user's policy that fails, answers nonsense or lets nobody run: those concerned are told, and the engine lives on."""

import re
import threading
import warnings

import pytest

from nbengine import SamplingParams
from nbengine.errors import EnginePausedWarning, RequestError
from nbengine.policy import Policy, policies

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, i] for i in range(4, 10)]
TIGHT = {"max_model_len": 64, "num_gpu_blocks_override": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}  # somebody must be a victim
METHODS = ["key", "order", "opens", "chunk", "reserve", "victim", "displaces"]


def bad(method, answer):
    """A policy of which one method is replaced."""
    return type("Bad", (Policy,), {method: answer})


def raises(*_):
    raise ZeroDivisionError("in my policy")


def leaves(*_):
    raise SystemExit(3)


class Odd:
    """Cannot be compared, counted, looked at or shown."""

    def __bool__(self):
        raise KeyError("bool")

    def __lt__(self, other):
        raise KeyError("lt")

    def __repr__(self):
        raise KeyError("repr")


ANSWERS = {"raises": raises, "sys.exit()": leaves, "None": lambda *_: None, "an odd object": lambda *_: Odd()}
MORE = [
    ("order", lambda _, running: running * 2, r"answered order\(\) with \[.*each at most once"),
    ("order", lambda _, running: [*running, "x"], "each at most once"),
    ("order", lambda _, running: 5, r"answered order\(\) with 5: return running sequences"),
    ("chunk", lambda *_: 1.5, r"answered chunk\(\) with 1\.5: return a whole number of tokens"),
    ("chunk", lambda *_: -1, "return a whole number"),
    ("reserve", lambda *_: "all", "answered reserve.. with 'all': return a whole number of tokens, 0 for none"),
    ("victim", lambda *_: "you", "return one of the candidates"),
    ("key", lambda _, s: s.arrival if s.arrival % 2 else "last", "cannot be ordered: '<' not supported"),
]


def outcome(request):
    try:
        return request.result(30).outputs[0].token_ids
    except RequestError as error:
        return str(error)


def check(engine, policy, message):
    """Under the policy every request ends, and those that fail say why; under another one all is well."""
    engine.use(policy=policy)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, n=2)
    ends = [outcome(r) for r in engine.submit_all([p * 6 for p in PROMPTS], long)]
    failures = [end for end in ends if isinstance(end, str)]
    assert failures
    for failure in failures:
        assert re.search(message, failure, re.DOTALL), failure
        assert "Exchange it with engine.use(policy=...)" in failure
        assert "the policy Bad" in failure
    engine.use(policy="fcfs")
    assert engine.status == "idle"
    assert engine.stats()["blocks_used"] == 0


@pytest.fixture(scope="module")
def tight(tiny):
    from nbengine import Engine

    with Engine(tiny.folder, enable_prefix_caching=False, **TIGHT) as engine:
        yield engine


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_any_method_does_wrong_fails_requests_and_not_the_engine(tight, tiny, method, answer):
    message = {
        "raises": r"raised ZeroDivisionError \(line \d+ of test_policy_errors.py\): in my policy, in %s\(\)",
        "sys.exit()": "SystemExit",
    }
    what = message.get(
        answer, "cannot be ordered|raised KeyError" if (method, answer) == ("key", "an odd object") else r"answered %s\(\) with"
    )
    check(tight, bad(method, ANSWERS[answer]), what % method if "%s" in what else what)
    for prompt, output in zip(PROMPTS, tight.generate(PROMPTS, GREEDY), strict=True):
        assert output.outputs[0].token_ids == tiny.greedy(prompt, 12)


@pytest.mark.parametrize(("method", "answer", "message"), MORE)
def test_nonsense_is_named_with_what_to_return(tight, method, answer, message):
    check(tight, bad(method, answer), message)


def test_only_the_request_that_was_decided_on_fails(engine, tiny):
    def key(_, sequence):
        if sequence.prompt_len == 3:
            raise LookupError("no place for threes")
        return sequence.arrival

    engine.use(policy=bad("key", key))
    good, wrong, fine = engine.submit_all([[5, 6], [5, 6, 7], [8, 9]], GREEDY)
    with pytest.raises(RequestError, match=r"LookupError .*no place for threes, in key\(\)"):
        wrong.result(30)
    assert wrong.status == "failed"
    for request in (good, fine):
        assert request.result(30).outputs[0].token_ids == tiny.greedy(request.prompt_token_ids, 12)


def test_a_policy_that_fails_later_lets_what_it_wrote_be_read(engine):
    def order(_, running):
        if any(s.output_len >= 3 for s in running):
            raise ZeroDivisionError
        return running

    engine.use(policy=bad("order", order))
    requests = engine.submit_all(PROMPTS, GREEDY)
    for request in requests:
        with pytest.raises(RequestError, match="the policy Bad raised ZeroDivisionError"):
            request.result(30)
    assert any(len(r.output().outputs[0].token_ids) >= 3 for r in requests)


def test_a_step_by_hand_lives_on_too(engine):
    engine.use(policy=bad("order", raises))
    engine.pause()
    (request,) = engine.submit_all([[5]], GREEDY)
    engine.step()
    engine.step()
    assert request.status == "failed"
    engine.use(policy="fcfs")
    engine.resume()
    assert engine.generate([[5]], GREEDY)[0].finished


@pytest.mark.parametrize("answer", [None, Odd()], ids=["None", "odd"])
def test_a_policy_that_cannot_order_who_waits_is_refused_whole(engine, answer):
    engine.pause()
    requests = engine.submit_all(PROMPTS, GREEDY)
    with pytest.raises((TypeError, KeyError), match=r"answers key\(\) with what cannot be ordered|lt"):
        engine.use(policy=bad("key", lambda *_: answer))
    assert type(engine.policy) is policies["fcfs"]
    assert all(s.place is not None for s in engine._scheduler.waiting)
    engine.resume()
    assert all(r.result(30).finished for r in requests)


def test_a_policy_may_answer_with_anything_that_serves(engine, tiny):
    class Loose(Policy):
        def order(self, running):
            return reversed(running)  # an iterator

        def opens(self, running):
            return 1

        def chunk(self, sequence, budget):
            import numpy as np

            return np.int64(2)

    engine.use(policy=Loose)
    assert [o.outputs[0].token_ids for o in engine.generate(PROMPTS, GREEDY)] == [tiny.greedy(p, 12) for p in PROMPTS]


# ── nobody runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["opens", "order"])
def test_who_waits_on_a_policy_that_lets_nobody_run_is_told(engine, method):
    asked = []

    def nobody(_, running):
        asked.append(len(running))
        return False if method == "opens" else []

    engine.use(policy=bad(method, nobody))
    request = engine.submit([5], SamplingParams(temperature=0, max_tokens=3))
    with pytest.warns(EnginePausedWarning, match=r"the policy Bad lets nobody run: exchange it with engine\.use") as told:
        assert not request.wait(2)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert len(asked) < 200  # it is not asked as fast as it can answer
    engine.use(policy="fcfs")
    with warnings.catch_warnings(action="error"):
        assert request.result(30).finished
        assert engine.generate([[5]], GREEDY)[0].finished


def test_a_message_comes_through_at_once_while_nobody_runs(engine, until):
    opened = threading.Event()
    engine.use(policy=bad("opens", lambda *_: opened.is_set()))
    request = engine.submit([5], SamplingParams(temperature=0, max_tokens=3))
    until(lambda: engine._mailbox.blocked)
    opened.set()  # a policy may change its mind by itself
    with warnings.catch_warnings(action="ignore"):
        assert request.result(30).finished
    until(lambda: not engine._mailbox.blocked)
