"""--bg: a cell returns at once and its output goes on under it, also when two stream together."""

from __future__ import annotations


def test_two_cells_stream_at_once_each_into_its_own_output(kernel):
    first = kernel.run("%%generate --bg -m 60 --ignore-eos --no-chat --seed 1 --out a\nThe fox")
    second = kernel.run("%%generate --bg -m 60 --ignore-eos --no-chat --seed 2 --out b\nThe king")
    assert first.seconds < 1
    assert not kernel.value("a.done and b.done and len(a.token_ids) == 0")
    kernel.run(
        "a.wait(60); b.wait(60)\nimport time\nwhile get_ipython().find_line_magic('engine').__self__.session.pump.running(): time.sleep(0.01)"
    )
    kernel.run("import time; time.sleep(0.1)")
    assert first.shown[0]["text/plain"] == kernel.value("a.text")
    assert second.shown[0]["text/plain"] == kernel.value("b.text")
    assert first.shown[1]["text/plain"].endswith("length")
    assert second.shown[1]["text/plain"].endswith("length")
    assert not first.out
    assert not second.out


def test_nothing_is_printed_by_the_engines_thread(kernel):
    ran = kernel.run("%%generate -m 20 --ignore-eos\nHello")
    assert (ran.out, ran.err) == ("", "")


def test_the_thread_that_shows_ends_when_there_is_nothing_to_show(kernel):
    kernel.run("%generate --bg -m 3 --out a Hello\n")
    kernel.run(
        "a.wait(20)\nimport time\nfor _ in range(200):\n    if not any(t.name == 'nbengine-views' for t in __import__('threading').enumerate()): break\n    time.sleep(0.02)"
    )
    assert kernel.value("any(t.name == 'nbengine-views' for t in __import__('threading').enumerate())") is False


def test_waiting_for_a_background_result_can_be_interrupted_and_leaves_it_running(kernel):
    kernel.run("%generate --bg -m 1500 --ignore-eos --no-chat --out a Hello")
    message = kernel.start("print('on', flush=True)\na.wait()")
    kernel.finish(message, lambda msg, ran: msg["msg_type"] == "stream")
    kernel.interrupt()
    assert kernel.finish(message).ename == "KeyboardInterrupt"
    assert kernel.value("a.done") is False
    kernel.run("a.cancel(); a.settle(5)")
    assert kernel.value("a.finish_reason") == "abort"


def test_the_python_interface_works_in_a_cell_without_any_setup(kernel):
    kernel.run(
        "import nbengine\ne = get_ipython().find_line_magic('engine').__self__.session.engines.find()\np = nbengine.SamplingParams(max_tokens=5, ignore_eos=True)"
    )
    kernel.run("text = ''.join(e.stream('Hello', p))")
    kernel.run("parts = []\nasync for part in e.astream('Hello', p): parts.append(part)")
    kernel.run("out = await e.agenerate(['Hello', 'Once'], p)")
    assert kernel.value("(len(out), bool(text), bool(parts))") == (2, True, True)
    assert "RequestOutput" in kernel.run("out[0]").text
    assert "Engine" in kernel.run("e").text


def test_a_loop_over_a_stream_prints_as_it_goes(kernel):
    kernel.run("import nbengine\ne = get_ipython().find_line_magic('engine').__self__.session.engines.find()")
    ran = kernel.run(
        "for piece in e.stream('Once', nbengine.SamplingParams(max_tokens=20, ignore_eos=True, seed=1)): print(piece, end='', flush=True)"
    )
    kernel.run("whole = e.generate('Once', nbengine.SamplingParams(max_tokens=20, ignore_eos=True, seed=1))[0].outputs[0].text")
    assert ran.out == kernel.value("whole")


def test_an_engine_that_is_closed_under_a_background_cell_says_why(kernel):
    kernel.run("%engine load tales --name brief --num-gpu-blocks-override 128")
    ran = kernel.run("%generate --bg -m 1500 --ignore-eos --no-chat --out g Once")
    kernel.run("%engine unload brief")
    kernel.run("g.settle(5); import time; time.sleep(0.2)")
    kernel.run("time.sleep(0.05)")
    assert "closed" in ran.shown[1]["text/plain"]
    assert kernel.run("g.wait()", check=False).ename == "EngineClosedError"
    kernel.run("%engine use tales")
