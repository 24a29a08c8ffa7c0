"""Every command of %engine in a real kernel."""

from __future__ import annotations

import pytest

ENGINES = "list(get_ipython().find_line_magic('engine').__self__.session.engines)"


@pytest.fixture(autouse=True)
def one_engine(kernel):
    yield
    for name in set(kernel.value(ENGINES)) - {"tales"}:
        kernel.run(f"%engine unload {name}")
    kernel.run("%engine use tales")


def test_status_tells_model_device_memory_pool_and_requests(kernel):
    text = kernel.run("%engine").text
    for word in ("tales", "Qwen3ForCausalLM", "cpu", "weights", "KV cache", "blocks of 16 tokens", "running", "waiting", "idle"):
        assert word in text
    assert kernel.run("%engine status tales").result["text/html"].startswith("<table>")
    assert kernel.value("get_ipython().run_line_magic('engine', '').to_dict()['tales']['blocks_total']") == 512


def test_loading_shows_phases_and_ends_in_one_line(kernel):
    seen = []
    message = kernel.start(
        "%engine load tales --name second --num-gpu-blocks-override 64 --max-model-len 256 --no-enable-prefix-caching --enforce-eager --out s"
    )
    ran = kernel.finish(message, lambda msg, ran: seen.append(str(msg["content"].get("data", {}).get("text/plain", ""))) and False)
    assert ran.status == "ok"
    assert next(text for text in seen if text).startswith("second: ")
    assert "second loaded in" in ran.shown[0]["text/plain"]
    assert kernel.value("(s.info.max_model_len, s.config.enable_prefix_caching, s.info.memory.num_blocks)") == (256, False, 64)
    assert kernel.value("s.config.cuda_graphs") is False


ENDLESS = """
import time, nbengine.startup
def endless(config, folder, progress):
    while True:
        progress("reading weights", 0, 0)
        time.sleep(0.02)
nbengine.startup._build, quick = endless, nbengine.startup._build
"""
LATE = """
import signal, nbengine.notebook.load_view
class Interrupted(nbengine.notebook.load_view.Shown):
    def update(self, bundle):
        if "loaded in" in bundle["text/plain"]:
            signal.raise_signal(signal.SIGINT)
        return super().update(bundle)
nbengine.notebook.load_view.Shown, usual = Interrupted, nbengine.notebook.load_view.Shown
"""


def leaves_nothing(kernel, ran, threads):
    assert (ran.status, ran.ename) == ("error", "KeyboardInterrupt")
    assert "stopped" in ran.shown[0]["text/plain"]
    assert "gone" not in kernel.value(ENGINES)
    assert kernel.value("__import__('threading').active_count()") == threads


def test_a_load_can_be_interrupted_and_leaves_nothing(kernel):
    threads = kernel.value("__import__('threading').active_count()")
    kernel.run(ENDLESS)
    message = kernel.start("%engine load tales --name gone --num-gpu-blocks-override 64")
    kernel.finish(message, lambda msg, ran: msg["msg_type"] == "update_display_data")
    kernel.interrupt()
    ran = kernel.finish(message)
    kernel.run("nbengine.startup._build = quick")
    leaves_nothing(kernel, ran, threads)


def test_a_load_that_is_interrupted_when_all_but_its_last_words_is_done_leaves_nothing(kernel):
    threads = kernel.value("__import__('threading').active_count()")
    kernel.run(LATE)
    ran = kernel.run("%engine load tales --name gone --num-gpu-blocks-override 64", check=False)
    kernel.run("nbengine.notebook.load_view.Shown = usual")
    leaves_nothing(kernel, ran, threads)


def test_several_engines_have_names_and_one_is_current(kernel):
    kernel.run("%engine load tales --name small --max-model-len 128 --num-gpu-blocks-override 64")
    assert "(current)" in kernel.run("%engine").text
    kernel.run("%%generate -m 3 --out r\nHi")
    assert kernel.value("r.engine.info.max_model_len") == 128
    kernel.run("%%generate -m 3 --engine tales --out r\nHi")
    assert kernel.value("r.engine.info.max_model_len") == 2048
    kernel.run("%engine use tales")
    kernel.run("%generate -m 3 --out r Hi")
    assert kernel.value("r.engine.info.max_model_len") == 2048


def test_an_engine_made_in_python_can_be_used(kernel):
    kernel.run("import nbengine\nmine = nbengine.Engine('tales', num_gpu_blocks_override=64)")
    kernel.run("%generate -m 3 -e mine --out r Hi")
    assert kernel.value("r.engine is mine")
    kernel.run("%engine use mine")
    kernel.run("%generate -m 3 --out r Hi")
    assert kernel.value("r.engine is mine")


def test_loading_the_same_name_closes_the_one_before(kernel):
    kernel.run("%engine load tales --name twice --num-gpu-blocks-override 64 --out first")
    kernel.run("%engine load tales --name twice --num-gpu-blocks-override 64 --out second")
    assert kernel.value("(first.status, second.status)") == ("closed", "idle")


def test_unloading_says_what_it_gave_back(kernel):
    kernel.run("%engine load tales --name brief --num-gpu-blocks-override 64 --out b")
    assert "given back" in kernel.run("%engine unload brief").text
    assert kernel.value("b.status") == "closed"
    assert kernel.run("%engine unload brief", check=False).ename == "UsageError"


def test_pause_step_and_resume_move_the_engine_by_hand(kernel):
    kernel.run("%engine pause")
    kernel.run("%generate --bg -m 6 --ignore-eos --out r Hello")
    table = kernel.run("%engine step 3")
    assert table.result["text/html"].count("<tr>") == 4
    assert kernel.value("len(r.token_ids)") == 3
    assert "paused" in kernel.run("%engine").text
    kernel.run("%engine resume")
    kernel.run("r.wait(20)")
    assert kernel.value("(len(r.token_ids), r.finish_reason)") == (6, "length")


def test_steps_that_are_not_recorded_are_not_said_to_be_none(kernel):
    kernel.run(
        "%engine load tales --name brief --trace-steps 0 --num-gpu-blocks-override 64\n%engine pause\n%generate --bg -m 6 --out r Hello"
    )
    assert "keeps no record of steps (trace_steps=0)" in kernel.run("%engine step 3").text
    assert kernel.value("len(r.token_ids)") == 3
    kernel.run("%engine unload brief")


def test_sleep_and_wake_give_memory_back_and_take_it_again(kernel):
    assert "given back" in kernel.run("%engine sleep").text
    assert "asleep" in kernel.run("%engine").text
    kernel.run("%engine wake")
    kernel.run("%engine sleep --level 2\n%engine wake")
    assert kernel.run("%generate -m 2 Hi").status == "ok"


def test_cancel_ends_one_or_all(kernel):
    kernel.run("%generate --bg -m 1500 --ignore-eos --no-chat --out a Once\n%generate --bg -m 1500 --ignore-eos --no-chat --out b Once")
    kernel.run("%engine cancel {}".format(kernel.value("a.handles[0].id")))
    kernel.run("a.settle(5)")
    assert kernel.value("(a.finish_reason, b.finish_reason)") == ("abort", None)
    assert "1 request cancelled" in kernel.run("%engine cancel --all").text
    kernel.run("b.settle(5)")
    assert kernel.value("b.finish_reason") == "abort"
    assert "no request 'r0'" in kernel.run("%engine cancel r0", check=False).evalue


def test_the_cache_can_be_emptied(kernel):
    kernel.run("%%generate -m 1 --no-chat\n" + "word " * 60)
    assert kernel.value("get_ipython().run_line_magic('engine', '').to_dict()['tales']['blocks_cached']") > 0
    kernel.run("%engine reset-cache")
    assert kernel.value("get_ipython().run_line_magic('engine', '').to_dict()['tales']['blocks_cached']") == 0


def test_models_and_plan_tell_before_anything_is_loaded(kernel):
    listed = kernel.run("%engine models").text
    assert "tales" in listed
    assert "loaded as tales" in listed
    plan = kernel.run("%engine plan tales --max-model-len 512 --num-gpu-blocks-override 64").text
    for word in ("weights", "KV per token", "sequences", "512"):
        assert word in plan


def test_the_log_tells_of_loads_and_of_failed_cells(kernel):
    kernel.run("%engine load tales --name logged --num-gpu-blocks-override 64")
    assert "tales" in kernel.run("%engine log").text
    kernel.run("%generate -t -1 hi", check=False)
    assert "temperature must be" in kernel.run("%engine log 40").text
    assert len(kernel.run("%engine log 1").text.strip().splitlines()) == 1


def test_a_load_that_does_not_fit_says_who_holds_the_memory(kernel):
    kernel.run("import torch\nbig = torch.zeros(50_000_000)")
    ran = kernel.run("%engine load tales --name huge --kv-cache-memory-bytes 900000000000000", check=False)
    assert ran.ename == "UsageError"
    assert "tales" in ran.evalue
    assert "%engine unload tales" in ran.evalue
    assert "big" in ran.evalue
    kernel.run("del big")


def test_help_lists_the_commands_and_the_options_of_each(kernel):
    listed = kernel.run("%engine help").text
    for command in (
        "load",
        "unload",
        "use",
        "status",
        "models",
        "plan",
        "log",
        "pause",
        "step",
        "resume",
        "sleep",
        "wake",
        "cancel",
        "reset-cache",
    ):
        assert f"%engine {command}" in listed
        assert "usage" in kernel.run(f"%engine help {command}").text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%engine lod tales", "did you mean 'load'"),
        ("%engine load", "required: model"),
        ("%engine load tale", "tale"),
        ("%engine load tales --max-model-ln 4", "did you mean '--max-model-len'"),
        ("%engine load tales --dtype int3", "dtype must be"),
        ("%engine load tales --tensor-parallel-size 2", "tensor_parallel_size"),
        ("%engine unload nothing", "no engine is called 'nothing'"),
        ("%engine step", "pause"),
        ("%engine step 0", "%engine pause"),
        ("%engine step x", "invalid int"),
        ("%engine sleep --level 3", "invalid choice"),
        ("%engine plan /no/such/folder", "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_clear_line_and_an_error(kernel, line, says):
    ran = kernel.run(line, check=False)
    assert (ran.status, ran.ename) == ("error", "UsageError")
    assert says in ran.evalue
    assert "Traceback" not in ran.err
