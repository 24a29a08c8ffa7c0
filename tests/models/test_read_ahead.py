"""Reading files a little before they are copied."""

import os
import time
from pathlib import Path

import pytest
import torch

from nbengine.models import loader, read_ahead
from nbengine.models.read_ahead import ReadAhead

PIECE = 1 << 10


@pytest.fixture
def reads(monkeypatch):
    """What is read: file, offset and size, of pieces of a kilobyte and at most four of them ahead."""
    monkeypatch.setattr(read_ahead, "PIECE", PIECE)
    monkeypatch.setattr(read_ahead, "AHEAD", 4 * PIECE)
    noted, preadv = [], os.preadv

    def noting(descriptor, buffers, offset):
        noted.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, len(buffers[0])))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    return noted


@pytest.fixture
def files(tmp_path):
    made = [tmp_path / "one", tmp_path / "two"]
    for file in made:
        file.write_bytes(bytes(8 * PIECE))
    return made


def settled(reads):
    """What is read, once nothing more is."""
    seen = -1
    while seen != len(reads):
        seen = len(reads)
        time.sleep(0.1)
    return sorted(reads)


def test_every_part_is_read_once_and_no_farther_ahead_than_is_allowed(reads, files):
    one, two = files
    with ReadAhead([(one, 100, 3 * PIECE), (two, 0, 8 * PIECE)]) as ahead:
        first = settled(reads)
        assert first[:3] == [("one", 100, PIECE), ("one", 100 + PIECE, PIECE), ("one", 100 + 2 * PIECE, PIECE - 100)]
        assert sum(size for _, _, size in first) <= 6 * PIECE
        ahead.taken = 11 * PIECE - 100 - 1
        last = settled(reads)
    assert len(last) == len(set(last))
    assert [piece for piece in last if piece[0] == "two"][-1] == ("two", 7 * PIECE, PIECE)


def test_what_was_taken_before_its_turn_is_not_read(reads, files):
    ahead = ReadAhead([(files[0], 0, 8 * PIECE)])
    ahead.taken = 6 * PIECE
    with ahead:
        assert settled(reads) == [("one", 6 * PIECE, PIECE), ("one", 7 * PIECE, PIECE)]


def test_it_ends_when_it_is_left_and_where_a_file_is_gone(reads, files):
    with ReadAhead([(files[0].with_name("none"), 0, 8 * PIECE), (files[1], 0, 8 * PIECE)]) as ahead:
        settled(reads)
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_weights_are_the_same_with_it(reads, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from nbengine.models.checkpoint import Checkpoint
    from nbengine.models.spec import WeightSpec

    tensors = {f"layer.{number}": torch.randn(40, 33) for number in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    specs = [WeightSpec("merged", ("layer.0", "layer.1"), (80, 33)), *(WeightSpec(name, (name,), (40, 33)) for name in list(tensors)[2:])]
    monkeypatch.setattr(loader, "_reads_ahead", lambda device: True)
    checkpoint = Checkpoint(tmp_path)
    loaded = loader.load_weights(specs, checkpoint, "cpu", torch.float32)
    assert torch.equal(loaded["merged"], torch.cat((tensors["layer.0"], tensors["layer.1"])))
    assert all(torch.equal(loaded[name], tensors[name]) for name in list(tensors)[2:])
    assert checkpoint._ahead.taken == checkpoint.nbytes
    assert reads
