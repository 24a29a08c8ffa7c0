"""Checkpoints: whole ones read alike however they are stored, damaged ones say what is wrong and what to do."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbengine.errors import CheckpointError
from nbengine.models.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(33, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(16, 8, generator=generator).half(),
        "model.layers.0.mlp.experts": torch.randn(3, 5, 8, generator=generator),
        "scale": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "lm_head.weight": torch.randn(33, 8, generator=generator),
    }


def single(folder, content=None):
    save_file(content or tensors(), folder / "model.safetensors")
    return folder


def sharded(folder, index=True):
    content = tensors()
    names = sorted(content)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:5], names[5:]), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: content[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("store", [single, sharded, lambda folder: sharded(folder, index=False)], ids=["single", "sharded", "no index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_reads_alike_however_it_is_stored(tmp_path, store, dtype):
    checkpoint = Checkpoint(store(tmp_path))
    assert sorted(checkpoint.names()) == sorted(tensors())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors().values())
    for name, expected in tensors().items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) == expected.dtype
        destination = torch.full(expected.shape, float("nan"), dtype=dtype)
        checkpoint.read_into(name, destination)
        assert torch.equal(destination, expected.to(dtype))


def test_every_stored_dtype_is_read(tmp_path):
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    content = {str(kind): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(kind) for kind in kinds}
    checkpoint = Checkpoint(single(tmp_path, content))
    for name, expected in content.items():
        destination = torch.empty(2, 3, dtype=expected.dtype)
        checkpoint.read_into(name, destination)
        assert torch.equal(destination.float(), expected.float())


@pytest.mark.parametrize(("axis", "start", "size"), [(0, 4, 7), (1, 2, 3), (0, 0, 33), (1, 7, 1)])
def test_a_slice_is_read_without_the_rest(tmp_path, axis, start, size):
    checkpoint = Checkpoint(single(tmp_path))
    expected = tensors()["lm_head.weight"].narrow(axis, start, size)
    destination = torch.full(expected.shape, float("nan"))
    checkpoint.read_into("lm_head.weight", destination, axis=axis, start=start)
    assert torch.equal(destination, expected)


def test_reading_into_a_slice_touches_nothing_else(tmp_path):
    whole = torch.full((40, 8), float("nan"))
    Checkpoint(single(tmp_path)).read_into("model.embed_tokens.weight", whole[3:36])
    assert torch.equal(whole[3:36], tensors()["model.embed_tokens.weight"])
    assert whole[:3].isnan().all()
    assert whole[36:].isnan().all()


def test_a_large_tensor_comes_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("nbengine.models.checkpoint.CHUNK", 100)
    checkpoint = Checkpoint(single(tmp_path))
    destination = torch.full((33, 8), float("nan"), dtype=torch.bfloat16)
    steps = list(checkpoint.read_steps("lm_head.weight", destination))
    assert len(steps) > 10
    assert sum(steps) == destination.nbytes
    assert torch.equal(destination, tensors()["lm_head.weight"].bfloat16())


def test_a_header_of_odd_length_is_read(tmp_path):
    single(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = data[8 : 8 + length].rstrip()
    odd += b" " * (1 - len(odd) % 2)
    assert len(odd) % 2
    (tmp_path / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + length :])
    destination = torch.empty(33, 8)
    Checkpoint(tmp_path).read_into("lm_head.weight", destination)
    assert torch.equal(destination, tensors()["lm_head.weight"])


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("norm.weight", "model.norm.weight"),
        ("model.norm.weight", "norm.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_are_found_under_the_prefixes_in_use(tmp_path, stored, asked):
    checkpoint = Checkpoint(single(tmp_path, {stored: torch.ones(3), "vision_tower.norm.weight": torch.zeros(3)}))
    assert checkpoint.resolve(asked) == stored
    assert asked in checkpoint
    assert "model.other.weight" not in checkpoint


def test_an_exact_name_wins_over_a_prefixed_one(tmp_path):
    checkpoint = Checkpoint(single(tmp_path, {"norm.weight": torch.ones(3), "model.norm.weight": torch.zeros(3)}))
    assert checkpoint.resolve("norm.weight") == "norm.weight"
    assert checkpoint.resolve("model.norm.weight") == "model.norm.weight"


def test_a_head_of_its_own_is_told_from_a_tied_one(tmp_path):
    content = tensors()
    embedding = content["model.embed_tokens.weight"]
    assert not Checkpoint(single(tmp_path)).ties_head()
    assert Checkpoint(single(tmp_path, content | {"lm_head.weight": embedding.clone()})).ties_head()
    assert not Checkpoint(single(tmp_path, content | {"lm_head.weight": embedding.half()})).ties_head()
    del content["lm_head.weight"]
    assert Checkpoint(single(tmp_path, content)).ties_head()


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = Checkpoint(single(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"no tensor model\.layers\.0\.self_attn\.k_proj\.weight; did you mean .*q_proj.*download it again"
    ):
        checkpoint.read_into("model.layers.0.self_attn.k_proj.weight", torch.empty(16, 8))


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    checkpoint = Checkpoint(single(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight in .*model\.safetensors has shape \[33, 8\], and the model needs \[32, 8\].*config"
    ):
        checkpoint.read_into("lm_head.weight", torch.empty(32, 8))
    with pytest.raises(CheckpointError, match=r"from which \[30, 40\) along axis 0"):
        checkpoint.read_into("lm_head.weight", torch.empty(10, 8), axis=0, start=30)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    file = single(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    for kept in (0, 3, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=re.escape(str(file)) + ".*download it again"):
            Checkpoint(tmp_path)
    file.write_bytes(data)
    Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_garbage_header_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged|cut short).*download it again"):
        Checkpoint(tmp_path)


def test_random_damage_in_the_header_never_escapes_as_another_error(tmp_path):
    file = single(tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(1)
    for place, value in zip(
        torch.randint(0, 600, (300,), generator=generator), torch.randint(0, 256, (300,), generator=generator), strict=True
    ):
        damaged = data.copy()
        damaged[place] = value
        file.write_bytes(damaged)
        try:
            checkpoint = Checkpoint(tmp_path)
            for name in checkpoint.names():
                checkpoint.read_into(name, torch.empty(checkpoint.shape(name)))
        except CheckpointError as error:
            assert str(file) in str(error)  # noqa: PT017 - most damage is found; what is not must read as something


def test_an_unknown_dtype_is_named(tmp_path):
    header = b'{"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a in .* has dtype F4"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_missing_shard_says_which(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-00002-of-00003\.safetensors.*finish the download"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks_says_which(tmp_path):
    index = sharded(tmp_path) / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.extra is in model-00001-of-00003\.safetensors, and it is not"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": 5}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (sharded(tmp_path) / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint(tmp_path)


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "convert them to safetensors"),
        ("model.pt", "convert"),
        ("model.gguf", "GGUF"),
        ("README.md", r"no \*\.safetensors"),
    ],
)
def test_a_folder_without_safetensors_says_what_to_do(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_adapters_beside_the_model_are_not_its_weights(tmp_path):
    single(tmp_path)
    save_file({"model.norm.weight": torch.zeros(8)}, tmp_path / "adapter_model.safetensors")
    destination = torch.empty(8)
    Checkpoint(tmp_path).read_into("model.norm.weight", destination)
    assert torch.equal(destination, load_file(tmp_path / "model.safetensors")["model.norm.weight"].float())
