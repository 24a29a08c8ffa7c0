"""`%engine serve` in a real kernel, with the official client in another process."""

from __future__ import annotations

import openai
import pytest
from kernel_client import WAIT, with_tales

import nbengine.serve
from nbengine.serve import announce


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="module")
def kernel(runtime):
    """One of this module's own, which announces itself in this module's folder."""
    with with_tales() as kernel:
        yield kernel


def ask(**options):
    with openai.OpenAI(**nbengine.serve.client(), max_retries=0) as client:
        return client.completions.create(model="tales", prompt="Once upon a time", max_tokens=4, temperature=0, **options)


def test_one_line_serves_the_current_engine_and_one_line_ends_it(kernel):
    ran = kernel.run("%engine serve --out s")
    assert "OpenAI(base_url=" in ran.result["text/plain"]
    assert "OpenAI(base_url=" in ran.result["text/html"]
    [told] = announce.list_live()
    assert told["secret"] not in str(ran.result) + ran.out
    assert told["kernel_id"] == kernel.id
    assert told["models"] == ["tales"]
    assert ask().usage.completion_tokens == 4
    assert kernel.value("s.url") == told["url"]
    assert "1 server closed" in kernel.run("%engine unserve").text
    assert announce.list_live() == []


def test_it_answers_while_a_cell_computes_and_while_a_cell_generates(kernel):
    kernel.run("%engine serve")
    for cell in (
        "import time\nend = time.time() + 2\nwhile time.time() < end: sum(range(1000))",
        "%generate -m 100 --ignore-eos --no-chat The fox",
    ):
        message = kernel.start(cell)
        assert ask().usage.completion_tokens == 4
        kernel.finish(message)
    kernel.run("%engine unserve")


def test_the_models_own_name_and_the_engines_are_both_known(kernel):
    kernel.run("%engine load tales --name second --num-gpu-blocks-override 64 --max-model-len 256")
    kernel.run("%engine serve second")
    assert announce.list_live()[0]["models"] == ["tales", "second"]
    kernel.run("%engine unload second")
    assert announce.list_live() == []
    kernel.run("%engine use tales")


def test_a_key_in_a_cell_is_refused_and_one_in_the_environment_taken(kernel):
    ran = kernel.run("%engine serve --api-key secret-in-a-notebook", check=False)
    assert "NBENGINE_API_KEY" in ran.evalue
    ran = kernel.run("%engine serve --host 0.0.0.0", check=False)
    assert "api_key" in ran.evalue
    kernel.run("import os; os.environ['NBENGINE_API_KEY'] = 'a-key-from-the-environment'")
    kernel.run("%engine serve --host 0.0.0.0 --out s")
    assert kernel.value("s.api_key") == "a-key-from-the-environment"
    kernel.run("%engine unserve")
    kernel.run("del os.environ['NBENGINE_API_KEY']")


def test_completion_knows_the_options(kernel):
    kernel.client.complete("%engine serve --po")
    told = kernel.client.get_shell_msg(timeout=WAIT)["content"]["matches"]
    assert "--port" in told


def test_a_restart_removes_the_file_and_the_next_engine_is_another(kernel):
    kernel.run("%engine serve")
    [before] = announce.list_live()
    kernel.manager.restart_kernel(now=False)
    kernel.client.wait_for_ready(timeout=WAIT)
    assert not list(announce.Path(announce.jupyter_runtime_dir()).glob("nbengine-*"))
    kernel.run("%load_ext nbengine")
    kernel.run("%engine load tales --num-gpu-blocks-override 64")
    kernel.run("%engine serve")
    [after] = announce.list_live()
    assert after["kernel_id"] == before["kernel_id"]
    assert (after["pid"], after["secret"]) != (before["pid"], before["secret"])
    assert ask().usage.completion_tokens == 4
