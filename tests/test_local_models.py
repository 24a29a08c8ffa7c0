"""Which models are here: a cache in the layout of huggingface_hub, whole, partial and damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbengine import hub
from nbengine.local_models import local_models

WEIGHTS = b"w" * 5000
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def put(cache, name, files, *, kind="models", commit="a" * 40, ref="main"):
    """A repository as huggingface_hub lays it out: blobs, snapshots that link to them, refs."""
    repo = cache / "--".join([kind, *name.split("/")])
    for place in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / place).mkdir(parents=True, exist_ok=True)
    if ref:
        (repo / "refs" / ref).write_text(commit)
    for file, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        blob = repo / "blobs" / f"{commit[:4]}-{file}"
        blob.write_bytes(data)
        (repo / "snapshots" / commit / file).symlink_to(Path("../../blobs") / blob.name)
    return repo


def cached(**given):
    found = local_models(**given)
    assert found[0].name == "tales"
    return found[1:], found.skipped


def test_the_bundled_model_is_always_there(cache):
    (tales,) = local_models()
    assert (tales.architecture, tales.source, tales.complete) == ("Qwen3ForCausalLM", "bundled", True)
    assert tales.nbytes > 30_000_000
    assert hub.resolve_model(tales.name) == Path(tales.folder)
    assert local_models().skipped == []


def test_models_of_the_cache_are_listed_by_name(cache):
    put(cache, "org/zebra", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    put(cache, "gpt2", {"config.json": {"model_type": "gpt2"}, "model.safetensors": WEIGHTS * 2})
    (first, second), skipped = cached()
    assert (first.name, first.architecture, second.name, second.architecture) == ("gpt2", "gpt2", "org/zebra", "LlamaForCausalLM")
    assert second.nbytes == 5000 + len(json.dumps(CONFIG))
    assert second.complete
    assert (second.revision, second.source) == ("main", "cache")
    assert (Path(second.folder) / "config.json").is_file()
    assert skipped == []
    assert repr(second).startswith("<LocalModel org/zebra: LlamaForCausalLM, 4.9 KiB, last used 20")


@pytest.mark.parametrize(
    ("name", "files", "kind"),
    [
        ("org/config-only", {"config.json": CONFIG, "tokenizer.json": {}}, "models"),  # as a plan leaves it
        ("org/pickled", {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}, "models"),
        ("org/adapter", {"adapter_config.json": {}, "adapter_model.safetensors": WEIGHTS}, "models"),
        ("org/data", {"config.json": CONFIG, "model.safetensors": WEIGHTS}, "datasets"),
    ],
)
def test_what_is_no_model_for_the_engine_is_not_listed(cache, name, files, kind):
    put(cache, name, files, kind=kind)
    assert cached() == ([], [])


def test_a_model_whose_shards_are_not_all_here_is_incomplete(cache):
    files = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": WEIGHTS}
    put(cache, "org/half", files)
    put(cache, "org/whole", {**files, "model-00002-of-00002.safetensors": WEIGHTS})
    (half, whole), skipped = cached()
    assert (half.complete, whole.complete) == (False, True)
    assert "incomplete" in repr(half)
    assert "incomplete" not in repr(whole)
    assert skipped == []


def test_of_several_revisions_the_main_one_is_taken(cache):
    put(cache, "org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS}, commit="a" * 40)
    put(cache, "org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS * 3}, commit="b" * 40, ref="next")
    ((model,), _) = cached()
    assert (model.revision, Path(model.folder).name) == ("main", "a" * 40)
    assert model.nbytes < 6000


def test_a_revision_with_weights_is_taken_over_a_newer_config_alone(cache):
    put(cache, "org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS}, commit="a" * 40, ref=None)
    put(cache, "org/model", {"config.json": CONFIG}, commit="b" * 40)
    ((model,), _) = cached()
    assert model.revision == "a" * 40


def test_last_used_is_when_the_weights_were_read_and_listing_is_no_use(cache):
    repo = put(cache, "org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    os.utime(repo / "blobs" / "aaaa-model.safetensors", (1_500_000_000, 1_400_000_000))
    for _ in range(2):
        ((model,), _) = cached()
        assert model.last_used == 1_500_000_000
    assert "last used 2017-07-1" in repr(model)


def test_what_is_damaged_is_said_and_the_others_are_listed(cache):
    put(cache, "org/fine", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    put(cache, "org/bad-json", {"config.json": b"{", "model.safetensors": WEIGHTS})
    broken = put(cache, "org/broken-link", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    (broken / "blobs" / "aaaa-model.safetensors").unlink()
    (cache / "models--org--empty").mkdir()
    (cache / "notes.txt").write_text("mine")
    models, skipped = cached()
    assert [model.name for model in models] == ["org/fine"]
    text = "\n".join(skipped)
    assert len(skipped) == 4
    for part in (
        "org/bad-json: ",
        "is not valid JSON",
        "models--org--broken-link",
        "models--org--empty",
        "notes.txt",
        "download the model again",
    ):
        assert part in text


def test_a_cache_that_cannot_be_read_leaves_the_bundled_model(cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    models, (skipped,) = cached()
    assert models == []
    assert "HF_HOME" in skipped


def test_the_cache_is_where_downloads_go(cache, tmp_path, monkeypatch):
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    put(tmp_path / "elsewhere", "org/there", files)
    put(tmp_path / "third", "org/third", files)
    assert cached() == ([], [])
    assert [model.name for model in cached(download_dir=tmp_path / "elsewhere")[0]] == ["org/there"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "third"))
    assert [model.name for model in cached()[0]] == ["org/third"]


def test_listing_needs_neither_torch_nor_a_network(cache):
    put(cache, "org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    script = """if True:
        import socket, sys
        def refuse(*_, **__): raise AssertionError("the network was asked")
        socket.socket.connect = socket.getaddrinfo = refuse
        from nbengine.local_models import local_models
        assert [model.name for model in local_models()] == ["tales", "org/model"]
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)
