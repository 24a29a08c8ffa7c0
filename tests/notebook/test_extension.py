"""%load_ext nbengine, %reload_ext, %unload_ext and %config in a real kernel."""

from __future__ import annotations

THREADS = "[t.name for t in __import__('threading').enumerate() if t.name.startswith('nbengine')]"
MAGICS = "[name in get_ipython().magics_manager.magics['line'] for name in ('engine', 'generate', 'chat')]"


def test_nothing_happens_at_import(fresh_kernel):
    fresh_kernel.run("import nbengine, nbengine.notebook.extension")
    assert fresh_kernel.value(MAGICS) == [False] * 3
    assert fresh_kernel.value(THREADS) == []
    assert fresh_kernel.value("'torch' in __import__('sys').modules") is False


def test_loading_twice_and_reloading_keep_the_engine_and_say_so(fresh_kernel):
    kernel = fresh_kernel
    kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 64")
    kernel.run("%%chat\nHello")
    before = kernel.value("[len(get_ipython().input_transformer_manager.cleanup_transforms), len(get_ipython().configurables)]")
    ran = kernel.run("%reload_ext nbengine")
    assert "keeps tales" in ran.out
    assert kernel.value("[len(get_ipython().input_transformer_manager.cleanup_transforms), len(get_ipython().configurables)]") == before
    assert kernel.run("%%generate -m 2\nHello").status == "ok"
    assert "Hello" in kernel.run("%chat show").text
    assert kernel.value(f"len({THREADS})") == 1


def test_unloading_closes_the_engines_and_takes_everything_back(fresh_kernel):
    kernel = fresh_kernel
    transforms = kernel.value("[str(t) for t in get_ipython().input_transformer_manager.cleanup_transforms]")
    kernel.run(
        "%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 64\n%engine load tales --name other --num-gpu-blocks-override 64"
    )
    ran = kernel.run("%unload_ext nbengine")
    assert "closed tales, other" in ran.out
    assert kernel.value(MAGICS) == [False] * 3
    assert kernel.value(THREADS) == []
    assert kernel.value("[str(t) for t in get_ipython().input_transformer_manager.cleanup_transforms]") == transforms
    assert kernel.value("__import__('logging').getLogger('nbengine').handlers") == []
    kernel.run("%load_ext nbengine")
    assert "no engine is loaded" in kernel.run("%engine").text


def test_config_lists_and_sets_the_defaults(fresh_kernel):
    kernel = fresh_kernel
    kernel.run("%load_ext nbengine")
    listed = kernel.run("%config NBEngineMagics").out
    for name in ("model", "max_tokens", "temperature", "format", "load_options"):
        assert f"NBEngineMagics.{name}=" in listed
    kernel.run("%config NBEngineMagics.max_tokens = 3\n%config NBEngineMagics.model = 'tales'\n%config NBEngineMagics.temperature = 0.0")
    kernel.run("%config NBEngineMagics.load_options = '--num-gpu-blocks-override 64'")
    kernel.run("%%generate --ignore-eos --out r\nHello")  # loads what is configured
    assert kernel.value("(len(r.token_ids), r.handles[0].params.temperature)") == (3, 0.0)
    assert kernel.value("get_ipython().find_line_magic('engine').__self__.session.engines.find().info.memory.num_blocks") == 64
    kernel.run("%config NBEngineMagics.max_tokens = 0", check=False)  # refused
    assert kernel.value("get_ipython().find_line_magic('engine').__self__.max_tokens") == 3


def test_a_cell_without_an_engine_says_what_to_do(fresh_kernel):
    fresh_kernel.run("%load_ext nbengine")
    ran = fresh_kernel.run("%%generate\nHello", check=False)
    assert (ran.ename, "%engine load tales" in ran.evalue) == ("UsageError", True)


def test_the_first_token_comes_within_six_seconds_and_what_takes_the_time_is_shown(fresh_kernel):
    kernel = fresh_kernel
    ran = kernel.run("import time\nbegan = time.time()\n%load_ext nbengine\n%engine load tales\n%generate -m 8 --out r Once upon a time")
    first = kernel.value("r.metrics.first_token_time - r.metrics.arrival_time")
    whole = kernel.value("time.time() - began")
    assert first < whole < 6.0  # from %load_ext to the last of a few tokens
    assert "loaded in" in ran.text
    assert "first after" in ran.text
