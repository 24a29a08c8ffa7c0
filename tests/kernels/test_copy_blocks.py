import pytest
import torch

from nbengine.kernels.copy_blocks import copy_blocks_reference
from nbengine.step_inputs import LayerCache


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("copies", [0, 1, 63])
def test_targets_become_their_sources_in_every_layer_and_nothing_else_changes(block_size, copies):
    blocks = 130
    caches = [LayerCache(*torch.randn(2, blocks, block_size, 2, 3)) for _ in range(3)]
    before = [(c.keys.clone(), c.values.clone()) for c in caches]
    pairs = torch.randperm(blocks)[: 2 * copies].view(-1, 2).int()
    copy_blocks_reference(caches, pairs)
    source_of = {target: source for source, target in pairs.tolist()}
    for cache, old in zip(caches, before, strict=True):
        for now, then in zip((cache.keys, cache.values), old, strict=True):
            assert all(torch.equal(now[block], then[source_of.get(block, block)]) for block in range(blocks))


def test_every_source_is_read_before_a_target_is_written():
    keys = torch.arange(4.0).view(4, 1, 1, 1)
    cache = LayerCache(keys.clone(), -keys)
    copy_blocks_reference([cache], torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32))
    assert cache.keys.flatten().tolist() == [0, 0, 1, 2]
    assert cache.values.flatten().tolist() == [0, 0, -1, -2]


def test_one_source_may_have_many_targets():
    cache = LayerCache(*torch.randn(2, 5, 16, 1, 2))
    copy_blocks_reference([cache], torch.tensor([[3, 0], [3, 4]], dtype=torch.int32))
    assert torch.equal(cache.keys[0], cache.keys[3])
    assert torch.equal(cache.values[4], cache.values[3])
