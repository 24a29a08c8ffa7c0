"""Weights arrive in their places; what cannot be loaded says which weight and why."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from nbengine.errors import CheckpointError
from nbengine.models.checkpoint import Checkpoint
from nbengine.models.loader import dummy_weights, load_weights


@dataclass(frozen=True)
class Spec:  # the fields of nbengine.models.spec.WeightSpec that loading needs
    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    shard_axis: int | None = None
    parts: tuple[int, ...] = ()


SPECS = [
    Spec("embed", ("model.embed_tokens.weight",), (20, 8), 0),
    Spec("qkv", ("l.q.weight", "l.k.weight", "l.v.weight"), (16, 8), 0, (8, 4, 4)),
    Spec("merged", ("l.qkv",), (16, 8), 0, (8, 4, 4)),
    Spec("o", ("l.o.weight",), (8, 6), 1),
    Spec("experts", ("l.e.0.weight", "l.e.1.weight"), (2, 4, 8)),
    Spec("stacked", ("l.stacked",), (2, 4, 8)),
    Spec("norm", ("model.norm.weight",), (8,)),
]


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "l.q.weight": (8, 8),
        "l.k.weight": (4, 8),
        "l.v.weight": (4, 8),
        "l.o.weight": (8, 6),
        "l.e.0.weight": (4, 8),
        "l.e.1.weight": (4, 8),
    }
    shapes |= {
        "model.embed_tokens.weight": (20, 8),
        "model.norm.weight": (8,),
        "l.stacked": (2, 4, 8),
        "l.qkv": (16, 8),
        "l.rotary_emb.inv_freq": (4,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path):
    return store(tmp_path, tensors())


def store(folder, content):
    save_file(content, folder / "model.safetensors")
    return Checkpoint(folder)


def expected():
    held = tensors()
    return {
        "embed": held["model.embed_tokens.weight"],
        "qkv": torch.cat([held[f"l.{part}.weight"] for part in "qkv"]),
        "merged": held["l.qkv"],
        "o": held["l.o.weight"],
        "experts": torch.stack([held["l.e.0.weight"], held["l.e.1.weight"]]),
        "stacked": held["l.stacked"],
        "norm": held["model.norm.weight"],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_are_joined_in_order_and_extra_tensors_left_alone(checkpoint, dtype):
    loaded = load_weights(SPECS, checkpoint, "cpu", dtype)
    assert list(loaded) == [spec.name for spec in SPECS]
    for name, tensor in expected().items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_shares_make_the_whole(checkpoint, world_size):
    specs = [spec for spec in SPECS if world_size == 2 or spec.name != "o"]
    ranks = [load_weights(specs, checkpoint, "cpu", torch.float32, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = expected()
    for spec in specs:
        shares = [loaded[spec.name] for loaded in ranks]
        if spec.shard_axis is None:
            assert all(torch.equal(share, whole[spec.name]) for share in shares)
        elif not spec.parts:
            assert torch.equal(torch.cat(shares, spec.shard_axis), whole[spec.name])
        else:  # each rank holds its part of q, then of k, then of v
            sizes = [8 // world_size, 4 // world_size, 4 // world_size]
            parts = zip(*(share.split(sizes) for share in shares), strict=True)
            assert torch.equal(torch.cat([torch.cat(part) for part in parts]), whole[spec.name])


def test_a_share_that_does_not_divide_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="qkv has 8 rows to share among 3"):
        load_weights(SPECS[1:2], checkpoint, "cpu", torch.float32, world_size=3)


def test_the_missing_tensor_is_named(tmp_path):
    content = tensors()
    del content["l.k.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor l\.k\.weight"):
        load_weights(SPECS, store(tmp_path, content), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("l.o.weight", (8, 7), r"l\.o\.weight in .* has shape \[8, 7\], and the model needs \[8, 6\]"),
        ("l.k.weight", (5, 8), r"sources of qkv do not add up to \[16, 8\] .*l\.k\.weight \[5, 8\]"),
        ("l.v.weight", (4, 9), r"l\.v\.weight in .* has shape \[4, 9\]"),
        ("model.norm.weight", (8, 1), r"model\.norm\.weight in .* has shape \[8, 1\]"),
        ("l.e.1.weight", (4, 4), r"l\.e\.1\.weight in .* has shape \[4, 4\]"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name, shape, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(SPECS, store(tmp_path, tensors() | {name: torch.zeros(shape)}), "cpu", torch.float32)


def test_a_head_that_is_stored_as_the_embedding_is_found_with_a_warning(tmp_path):
    checkpoint = store(tmp_path, tensors())
    with pytest.warns(UserWarning, match=r"no lm_head\.weight"):
        loaded = load_weights([Spec("head", ("lm_head.weight",), (20, 8))], checkpoint, "cpu", torch.float32)
    assert torch.equal(loaded["head"], tensors()["model.embed_tokens.weight"])


def test_an_embedding_that_is_stored_as_the_head_is_found(tmp_path):
    content = tensors()
    content["lm_head.weight"] = content.pop("model.embed_tokens.weight")
    loaded = load_weights(SPECS[:1], store(tmp_path, content), "cpu", torch.float32)
    assert torch.equal(loaded["embed"], tensors()["model.embed_tokens.weight"])


def test_a_head_of_its_own_is_not_replaced_by_the_embedding(tmp_path):
    head = torch.full((20, 8), 7.0)
    loaded = load_weights(
        [SPECS[0], Spec("head", ("lm_head.weight",), (20, 8))], store(tmp_path, tensors() | {"lm_head.weight": head}), "cpu", torch.float32
    )
    assert torch.equal(loaded["head"], head)
    assert torch.equal(loaded["embed"], tensors()["model.embed_tokens.weight"])


def test_progress_rises_to_the_total_often(checkpoint, monkeypatch):
    monkeypatch.setattr("nbengine.models.checkpoint.CHUNK", 64)
    calls = []
    loaded = load_weights(SPECS, checkpoint, "cpu", torch.bfloat16, lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in loaded.values())
    assert {(phase, of) for phase, _, of in calls} == {("loading weights", total)}
    done = [value for _, value, _ in calls]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert len(done) > 20


@pytest.mark.parametrize("cause", ["interrupt", "wrong shape"])
def test_a_load_that_ends_early_leaves_nothing_allocated(tmp_path, cause):
    made = []
    original = torch.empty

    def empty(*args, **kwargs):
        tensor = original(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    def progress(_phase, done, total):
        if cause == "interrupt" and done > total * 0.8:
            raise KeyboardInterrupt

    checkpoint = store(tmp_path, tensors() | ({} if cause == "interrupt" else {"l.stacked": torch.zeros(2, 2)}))
    torch.empty = empty
    try:
        load_weights(SPECS, checkpoint, "cpu", torch.float32, progress)
    except (KeyboardInterrupt, CheckpointError) as error:
        kept = error  # as a notebook keeps the last traceback
    finally:
        torch.empty = original
    gc.collect()
    assert kept.__traceback__ is not None
    assert len(made) > 2
    assert [ref for ref in made if ref() is not None] == []


def test_dummy_weights_repeat_for_a_seed():
    one, same, other = (dummy_weights([*SPECS, Spec("q.bias", (), (8,))], "cpu", torch.bfloat16, seed) for seed in (3, 3, 4))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} == {
        **{spec.name: (torch.Size(spec.shape), torch.bfloat16) for spec in SPECS},
        "q.bias": (torch.Size([8]), torch.bfloat16),
    }
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed"], other["embed"])
    assert (one["norm"] == 1).all()
    assert (one["q.bias"] == 0).all()
    assert 0.01 < one["embed"].float().std() < 0.03
