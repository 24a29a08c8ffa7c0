"""A request from every side: iterated, async-iterated, awaited, waited for, cancelled."""

import asyncio
import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbengine import RequestOutputKind, SamplingParams
from nbengine.batch import TokenLogprobs
from nbengine.errors import EngineClosedError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = [10, 11, 12]


@pytest.fixture
def expected(tiny, engine):
    ids = tiny.greedy(PROMPT, 40)
    return ids, engine.get_tokenizer().decode(ids)


async def collect(request):
    return [text async for text in request]


def test_it_can_be_iterated(engine, expected):
    deltas = list(engine.submit(PROMPT, GREEDY))
    assert "".join(deltas) == expected[1]
    assert len(deltas) > 5
    assert all(deltas)


def test_deltas_are_whole_characters(engine, expected):
    params = SamplingParams(temperature=1.5, max_tokens=200, ignore_eos=True, n=1)
    for seed in range(5):
        params.seed = seed
        request = engine.submit(PROMPT, params)
        deltas = list(request)
        whole = engine.get_tokenizer().decode(request.result().outputs[0].token_ids)
        assert "".join(deltas) == whole == request.text == request.result().outputs[0].text
        joined = ""
        for delta in deltas[:-1]:  # what is shown stays: a half character never appears as U+FFFD to be taken back later
            joined += delta
            assert whole.startswith(joined)


def test_it_can_be_iterated_from_another_thread_and_a_second_reader_goes_on(engine, expected):
    request = engine.submit(PROMPT, GREEDY)
    first = next(iter(request))
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: "".join(request)).result(60)
    assert first + rest == expected[1]
    assert "".join(request) == ""  # everything has been given
    assert request.text == expected[1]


def test_it_can_be_async_iterated_and_awaited(engine, expected):
    async def main():
        deltas = await collect(engine.submit(PROMPT, GREEDY))
        output = await engine.submit(PROMPT, GREEDY)
        return "".join(deltas), output

    text, output = asyncio.run(main())
    assert text == expected[1] == output.outputs[0].text
    assert output.finished


def test_two_loops_in_two_threads_read_at_once(engine, expected):
    barrier = threading.Barrier(2)
    shared = engine.submit(PROMPT, GREEDY)

    async def main():
        barrier.wait(30)
        own, output, also = await asyncio.gather(collect(engine.submit(PROMPT, GREEDY)), engine.submit(PROMPT, GREEDY), shared)
        return "".join(own), output.outputs[0].text, also.outputs[0].text

    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(asyncio.run, main()) for _ in range(2)]:
            assert found.result(60) == (expected[1],) * 3


def test_many_await_the_same_request(engine, expected):
    async def main():
        request = engine.submit(PROMPT, GREEDY)
        return await asyncio.gather(*[request] * 1, *(asyncio.wait_for(request, 30) for _ in range(5)))

    assert {output.outputs[0].text for output in asyncio.run(main())} == {expected[1]}


def test_a_thousand_awaits_leave_the_engine_time_to_run(engine):
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    async def main():
        return await asyncio.gather(*(engine.submit([4 + i % 300], params) for i in range(1000)))

    assert all(len(output.outputs[0].token_ids) == 2 for output in asyncio.run(main()))


def test_result_takes_a_timeout_and_the_request_goes_on(make_engine, gate):
    engine = make_engine()
    request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=3, logits_processors=[gate]))
    for timeout in (0, 0.01, -1):
        with pytest.raises(TimeoutError, match=f"request {request.id} is still .*goes on"):
            request.result(timeout=timeout)
    assert not request.wait(0.01)
    assert not request.finished
    gate.opened.set()
    assert len(request.result(timeout=float("inf")).outputs[0].token_ids) == 3
    assert request.wait(0)


def test_a_timeout_of_await_leaves_the_request_running(make_engine, gate):
    engine = make_engine()

    async def main():
        request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=3, logits_processors=[gate]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(request, 0.05)
        gate.opened.set()
        return await request

    assert asyncio.run(main()).outputs[0].finish_reason == "length"


def test_reading_what_is_there_does_not_wait(make_engine, gate):
    engine = make_engine()
    request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=3, logits_processors=[gate]))
    assert gate.reached.wait(30)
    output = request.output()
    assert not output.finished
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason is None
    assert request.text == ""
    assert "0 generated" in repr(request)
    gate.opened.set()


# ── cancelling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::nbengine.errors.EnginePausedWarning")
def test_cancelled_while_it_waits(engine, long):
    engine.pause()
    request = engine.submit(PROMPT, long)
    request.cancel()
    output = request.result(30)
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids == []
    assert request.status == "aborted"
    assert list(request) == []
    engine.resume()


def test_cancelled_while_it_runs_keeps_what_it_has(engine, long, tiny):
    request = engine.submit(PROMPT, long)
    texts = iter(request)
    next(texts)
    request.cancel()
    rest = list(texts)
    output = request.result(30)
    tokens = output.outputs[0].token_ids
    assert output.outputs[0].finish_reason == "abort"
    assert 0 < len(tokens) < 1000
    assert tokens == tiny.greedy(PROMPT, len(tokens))
    assert rest is not None
    assert engine.stats()["blocks_used"] == 0


def test_cancelled_inside_its_own_iteration(engine, long):
    request = engine.submit(PROMPT, long)
    for i, _ in enumerate(request):
        if i == 3:
            request.cancel()
    assert request.status == "aborted"


def test_cancelled_when_it_has_ended(engine):
    request = engine.submit(PROMPT, GREEDY)
    before = request.result()
    request.cancel()
    request.cancel()
    assert request.result().outputs[0].finish_reason == before.outputs[0].finish_reason == "length"
    assert request.status == "finished"


def test_cancelled_from_every_thread_at_once(engine, long):
    request = engine.submit(PROMPT, long)
    barrier = threading.Barrier(8)

    def cancel():
        barrier.wait(30)
        request.cancel()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(cancel) for _ in range(8)]:
            done.result(30)
    assert request.result(30).outputs[0].finish_reason == "abort"


def test_cancelled_from_a_logits_processor(engine, until):
    holder = []

    def give_up(output, logits):
        if len(output) == 3:
            holder[0].cancel()
        return logits

    engine.pause()
    holder.append(engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=500, ignore_eos=True, logits_processors=[give_up])))
    engine.resume()
    output = holder[0].result(30)
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == 4


def test_cancelled_while_its_prompt_is_computed_in_chunks(make_engine):
    engine = make_engine(max_num_batched_tokens=16)
    other = engine.submit([7, 8, 9], GREEDY)
    engine.pause()
    request = engine.submit([5] * 300, SamplingParams(max_tokens=4, n=3))
    engine.step(3)
    assert request.metrics.first_token_time is None
    request.cancel()
    engine.resume()
    assert request.result(30).outputs[2].finish_reason == "abort"
    assert len(other.result(30).outputs[0].token_ids) == 40
    assert engine.stats()["blocks_used"] == 0


def test_cancelled_after_its_engine_is_closed(make_engine, long):
    engine = make_engine()
    request = engine.submit(PROMPT, long)
    engine.close()
    request.cancel()
    with pytest.raises(EngineClosedError):
        request.result()


def test_cancel_all(engine, long):
    requests = [engine.submit(PROMPT, long) for _ in range(5)]
    assert engine.cancel_all() == 5
    assert {r.result(30).outputs[0].finish_reason for r in requests} == {"abort"}
    assert engine.cancel_all() == 0


def test_leaving_a_stream_early_cancels_and_leaving_an_iteration_does_not(engine, long, until):
    for _ in engine.stream(PROMPT, long):
        break
    until(lambda: engine.status == "idle")
    request = engine.submit(PROMPT, GREEDY)
    for _ in request:
        break
    assert request.result(30).outputs[0].finish_reason == "length"


def test_leaving_an_async_stream_early_cancels(engine, long, until):
    async def main():
        async for _ in engine.astream(PROMPT, long):
            break
        for _ in range(1000):
            if engine.status == "idle":
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it still runs")

    asyncio.run(main())


def test_a_cancelled_agenerate_cancels_its_requests(engine, long, until):
    async def main():
        task = asyncio.create_task(engine.agenerate([PROMPT, [4, 5]], long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: engine.status == "idle")


def test_a_loop_that_ends_under_its_waiters_harms_nobody(engine, long, until):
    """A loop closed while a task of it still waits: the engine finds a closed loop when it rings."""
    request = engine.submit(PROMPT, long)
    loop = asyncio.new_event_loop()
    task = loop.create_task(collect(request))
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
    steps = engine.stats()["steps"]
    until(lambda: engine.stats()["steps"] > steps + 3)
    request.cancel()
    assert request.result(30).finished
    assert engine.status == "idle"
    task._log_destroy_pending = False
    del task


# ── what comes out ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_outputs_come_as_the_kind_says(engine, expected, kind):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, output_kind=kind, logprobs=1)
    outputs = list(engine.submit(PROMPT, params).outputs())
    final = outputs[-1]
    assert final.finished
    assert not any(o.finished for o in outputs[:-1])
    assert all(o.outputs[0].finish_reason is None for o in outputs[:-1])
    if kind is RequestOutputKind.DELTA:
        assert [token for o in outputs for token in o.outputs[0].token_ids] == expected[0]
        assert "".join(o.outputs[0].text for o in outputs) == expected[1]
        assert all(len(o.outputs[0].logprobs) == len(o.outputs[0].token_ids) for o in outputs)
    else:
        assert final.outputs[0].token_ids == expected[0]
        assert final.outputs[0].text == expected[1]
        assert len(final.outputs[0].logprobs) == 40
    assert (len(outputs) == 1) == (kind is RequestOutputKind.FINAL_ONLY)


def test_a_token_that_comes_between_a_look_and_the_wait_is_seen(engine, monkeypatch):
    from nbengine import request as module

    engine.pause()
    request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    look, looks = module._OutputReader.next, []

    def next_and_step(reader):
        found = look(reader)
        looks.append(found)
        if len(looks) == 1:
            engine.step()
        return found

    monkeypatch.setattr(module._OutputReader, "next", next_and_step)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, request.outputs()).result(30)
    assert looks[0] is None
    assert len(first.outputs[0].token_ids) == 1
    engine.resume()


def test_why_it_ended_is_told_with_its_last_token_and_not_before():
    from nbengine.completion import Completion

    completion = Completion(0, None, PROMPT, SamplingParams(logprobs=0).resolve())
    completion.finish("length", None)
    assert completion.output().finish_reason is None
    completion.put([5], [TokenLogprobs([5], [-1.0], 1)])
    completion.complete()
    assert (completion.output().finish_reason, completion.output().token_ids) == ("length", [5])


def test_outputs_of_several_come_together(engine):
    params = SamplingParams(temperature=1, seed=1, max_tokens=20, n=3, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    request = engine.submit(PROMPT, params)
    with pytest.raises(ValueError, match=r"n=3 outputs.*request\.outputs"):
        next(iter(request))

    async def main():
        texts = ["", "", ""]
        async for output in request.aoutputs():
            for part in output.outputs:
                texts[part.index] += part.text
        return texts

    texts = asyncio.run(main())
    assert texts == [o.text for o in request.result().outputs]
    assert len(set(texts)) == 3


def test_a_stop_string_that_spans_tokens_is_honoured(engine):
    tokenizer = engine.get_tokenizer()
    words = [i for i in range(4, 320) if tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()]
    free = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "ignore_eos": True, "allowed_token_ids": words}
    whole = engine.submit(PROMPT, SamplingParams(**free)).result().outputs[0]
    assert len(whole.text) > 45  # so that some tokens are longer than a character
    for begin in range(3, 30, 3):
        for width in (1, 2, 5, 9):
            stop = whole.text[begin : begin + width]
            end = whole.text.index(stop)
            for include in (False, True):
                request = engine.submit(PROMPT, SamplingParams(**free, stop=[stop, "never"], include_stop_str_in_output=include))
                deltas = "".join(request)
                output = request.result().outputs[0]
                assert output.text == deltas == whole.text[: end + (len(stop) if include else 0)]
                assert (output.finish_reason, output.stop_reason) == ("stop", stop)
                assert output.token_ids == whole.token_ids[: len(output.token_ids)]
                assert len(tokenizer.decode(output.token_ids[:-1])) < end + len(stop) <= len(tokenizer.decode(output.token_ids))
    assert engine.stats()["blocks_used"] == 0


def test_a_stop_string_ends_one_output_and_the_others_go_on(engine):
    params = SamplingParams(temperature=1, seed=3, max_tokens=60, n=4, ignore_eos=True)
    free = engine.submit(PROMPT, params).result().outputs
    stop = free[1].text[5:7]
    params.stop = [stop]
    held = engine.submit(PROMPT, params).result().outputs
    for whole, cut in zip(free, held, strict=True):
        assert cut.text == whole.text.split(stop)[0]
        assert cut.finish_reason == ("stop" if stop in whole.text else "length")


def test_a_stop_token_is_not_shown_unless_asked_for(engine, expected):
    ids, _ = expected
    stop = ids[10]
    first = ids.index(stop)
    decode = engine.get_tokenizer().decode
    for include, shown in ((False, ids[:first]), (True, ids[: first + 1])):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop], include_stop_str_in_output=include)
        output = engine.submit(PROMPT, params).result().outputs[0]
        assert output.token_ids == ids[: first + 1]
        assert output.text == decode(shown)
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_without_detokenising_there_are_ids_only(engine, expected):
    output = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)).result().outputs[0]
    assert output.token_ids == expected[0]
    assert output.text == ""


def test_metrics_are_in_order(make_engine):
    engine = make_engine()
    metrics = engine.submit(PROMPT, GREEDY).result().metrics
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time, metrics.finished_time]
    assert times == sorted(times)
    assert (metrics.num_prompt_tokens, metrics.num_generation_tokens, metrics.num_preemptions) == (3, 40, 0)
    assert metrics.tokens_per_second > 0


# ── failing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def explode(output, logits):
    if len(output) == 5:
        raise ZeroDivisionError("in my processor")
    return logits


def test_a_request_that_fails_fails_alone_and_tells_everybody_who_waits(engine, expected, until):
    bad = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logits_processors=[explode])
    others = [engine.submit(PROMPT, GREEDY) for _ in range(3)]
    request = engine.submit(PROMPT, bad)
    message = f"request {request.id} failed: .*explode.*ZeroDivisionError: in my processor"
    with pytest.raises(RequestError, match=message):
        request.result()
    with pytest.raises(RequestError, match=message):
        "".join(request)
    with pytest.raises(RequestError, match=message):
        asyncio.run(collect(request))
    with pytest.raises(RequestError, match=message):
        list(request.outputs())
    with pytest.raises(RequestError, match=r"failed: .*explode.*ZeroDivisionError: in my processor"):
        engine.generate([PROMPT, PROMPT], [GREEDY, bad])
    assert request.status == "failed"
    output = request.output()  # what it had stays
    assert output.outputs[0].token_ids == expected[0][:5]
    assert output.outputs[0].finish_reason == "error"
    assert all(other.result().outputs[0].token_ids == expected[0] for other in others)
    until(lambda: engine.status == "idle")
    assert engine.stats()["blocks_used"] == 0


def test_text_before_a_failure_is_given_before_the_error(engine, expected):
    request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logits_processors=[explode]))
    texts = []
    with pytest.raises(RequestError):
        texts.extend(request)
    assert "".join(texts) == engine.get_tokenizer().decode(expected[0][:5])


def test_one_failure_of_a_call_is_raised_at_once_and_cancels_the_rest(engine, long, until):
    bad = SamplingParams(logits_processors=[explode], max_tokens=40, ignore_eos=True)
    engine.pause()  # so that the first one cannot end before the second one fails
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings(action="ignore"):
        call = pool.submit(engine.generate, [PROMPT, [4, 5]], [long, bad])
        until(lambda: engine.stats()["num_waiting"] == 2)
        engine.step(10)
        with pytest.raises(RequestError):
            call.result(30)
    assert engine.step() == []  # nobody is left
    engine.resume()
    until(lambda: engine.status == "idle")


def test_errors_are_fresh_and_keep_no_frames(engine):
    request = engine.submit(PROMPT, SamplingParams(logits_processors=[explode], max_tokens=40, ignore_eos=True))
    errors = []
    for _ in range(2):
        try:
            request.result()
        except RequestError as error:
            errors.append(error)
    assert errors[0] is not errors[1]
    assert errors[0].__context__ is None
    assert all(frame.f_code.co_filename.endswith(("test_request.py", "request.py")) for frame in _frames(errors[0]))


def _frames(error):
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def test_a_request_keeps_neither_its_engine_nor_tensors(make_engine, tiny, until):
    from nbengine import Engine

    engine = Engine(tiny.folder, max_model_len=64, num_gpu_blocks_override=8)
    request = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    request.result()
    gone = weakref.ref(engine)
    cache = weakref.ref(engine._scheduler)
    del engine
    gc.collect()
    assert gone() is None
    assert cache() is None
    assert len(request.result().outputs[0].token_ids) == 4
    assert "finished" in repr(request)


# ── a stream ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_that_is_never_read_queues_nothing(engine, expected):
    engine.pause()
    stream, astream = engine.stream(PROMPT, GREEDY), engine.astream(PROMPT, GREEDY)
    assert engine.stats()["num_waiting"] == 0
    stream.close()
    asyncio.run(astream.aclose())
    del stream, astream
    engine.resume()
    late = engine.stream(PROMPT, GREEDY)
    assert "".join(late) == expected[1]
    assert engine.stats()["prompt_tokens"] == len(PROMPT)


def test_a_stream_counts_its_times_from_when_it_is_read(engine, monkeypatch):
    made = []
    submit = engine._mailbox.submit
    monkeypatch.setattr(engine._mailbox, "submit", lambda requests: (made.extend(requests), submit(requests)))
    stream = engine.stream(PROMPT, GREEDY)
    began = time.perf_counter()
    list(stream)
    (request,) = made
    assert request.metrics.arrival_time >= began


def test_a_stream_of_a_closed_engine_is_refused_at_the_call(engine):
    late = engine.stream(PROMPT, GREEDY)
    engine.close()
    for call in (engine.stream, engine.astream):
        with pytest.raises(EngineClosedError):
            call(PROMPT, GREEDY)
    with pytest.raises(EngineClosedError):
        next(late)


def test_completion_offers_only_what_is_for_its_holder(engine):
    request = engine.submit(PROMPT, GREEDY)
    request.result()
    offered = {name for name in dir(request) if not name.startswith("_")}
    assert offered == {
        "aoutputs", "cancel", "completions", "finished", "id", "limit", "metrics", "num_cached_tokens", "output", "outputs", "params",
        "priority", "prompt", "prompt_token_ids", "raise_error", "result", "status", "text", "wait",
    }  # fmt: skip
    assert "__iter__" in dir(request)


@pytest.mark.parametrize("jedi", [False, True])
def test_ipython_completes_a_request_with_the_same(engine, jedi):
    pytest.importorskip("IPython")
    from IPython.core.completer import IPCompleter, provisionalcompleter

    request = engine.submit(PROMPT, GREEDY)
    completer = IPCompleter(shell=None, namespace={"request": request}, global_namespace={}, use_jedi=jedi)
    with provisionalcompleter():
        found = {completion.text.rpartition(".")[2] for completion in completer.completions("request.", 8)}
    assert {"result", "cancel", "outputs"} <= found
    assert not {"end", "fail", "wake", "scored", "arrive"} & found
