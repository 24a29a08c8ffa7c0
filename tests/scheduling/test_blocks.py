import pytest

from nbengine.blocks import BlockPool, block_hash

A, B = 1, 2  # owners


def names(n, seed=b""):
    digests = []
    for i in range(n):
        digests.append(block_hash(digests[-1] if digests else seed, [i, i]))
    return digests


@pytest.fixture
def pool():
    pool = BlockPool(4, 2)
    yield pool
    pool.check()


def test_a_pool_starts_blank_and_gives_out_low_numbers_first(pool):
    assert [pool.take(A) for _ in range(3)] == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (1, 3)


def test_a_block_is_free_again_only_when_its_last_holder_lets_go(pool):
    block = pool.take(A)
    pool.share(block, B)
    pool.free(block, A)
    assert pool.num_used == 1
    pool.free(block, B)
    assert pool.num_used == 0


def test_freeing_a_free_block_is_our_bug(pool):
    block = pool.take(A)
    pool.free(block, A)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block, A)


def test_the_number_of_blocks_is_rounded_up(pool):
    assert [pool.blocks_for(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]


def test_a_sealed_block_is_found_while_held_and_after(pool):
    (name,) = names(1)
    block = pool.take(A)
    assert pool.find(name) is None
    pool.seal(block, name)
    assert pool.find(name) == block
    pool.free(block, A)
    assert pool.find(name) == block
    assert pool.num_free == 4


def test_a_cached_block_comes_back_to_life_when_it_is_shared(pool):
    (name,) = names(1)
    block = pool.take(A)
    pool.seal(block, name)
    pool.free(block, A)
    pool.share(block, B)
    assert pool.references[block] == 1
    assert block not in pool.cached


def test_blank_blocks_are_taken_before_any_cached_one_is_evicted(pool):
    (name,) = names(1)
    block = pool.take(A)
    pool.seal(block, name)
    pool.free(block, A)
    assert block not in [pool.take(B) for _ in range(3)]
    assert pool.find(name) == block
    assert pool.take(B) == block
    assert pool.find(name) is None
    assert ("evict", block) in pool.events


def test_the_block_cached_longest_is_evicted_first(pool):
    blocks = [pool.take(A) for _ in range(4)]
    for block, name in zip(blocks, names(4), strict=True):
        pool.seal(block, name)
    for block in (2, 0, 3, 1):
        pool.free(block, A)
    pool.share(2, B)
    pool.free(2, B)  # used again: now the youngest
    assert [pool.take(B) for _ in range(4)] == [0, 3, 1, 2]


def test_the_first_block_of_a_content_stays_the_one_found(pool):
    (name,) = names(1)
    first, second = pool.take(A), pool.take(B)
    pool.seal(first, name)
    pool.seal(second, name)
    assert pool.find(name) == first
    pool.free(second, B)
    assert second in pool.blank


def test_a_block_that_others_hold_or_may_find_must_be_copied(pool):
    own, shared, sealed = pool.take(A), pool.take(A), pool.take(A)
    pool.share(shared, B)
    pool.seal(sealed, names(1)[0])
    assert [pool.must_copy(b) for b in (own, shared, sealed)] == [False, True, True]


def test_copy_on_write_gives_an_own_block_and_one_holder_less(pool):
    shared = pool.take(A)
    pool.share(shared, B)
    own = pool.copy_on_write(shared, B)
    assert own != shared
    assert (pool.references[shared], pool.references[own]) == (1, 1)
    assert pool.events[-3:] == [("take", own, B), ("copy", shared, own, B), ("free", shared, B)]


def test_forgetting_empties_the_cache_and_leaves_held_blocks_with_their_holders(pool):
    held, cached = pool.take(A), pool.take(A)
    for block, name in zip((held, cached), names(2), strict=True):
        pool.seal(block, name)
    pool.free(cached, A)
    pool.forget()
    assert not pool.index
    assert not pool.cached
    assert pool.references[held] == 1
    assert not pool.must_copy(held)


def test_a_name_depends_on_all_tokens_before_and_on_the_seed():
    assert names(2)[1] != block_hash(b"", [1, 1])
    assert names(1) != names(1, seed=b"an adapter")
    assert block_hash(b"", [1, 2]) != block_hash(b"", [2, 1])


def test_events_are_handed_out_once(pool):
    pool.take(A)
    assert pool.take_events() == [("take", 0, A)]
    assert pool.take_events() == []


@pytest.mark.parametrize("harm", ["lost", "twice", "referenced", "unnamed", "index"])
def test_the_check_notices_each_kind_of_harm(harm):
    pool = BlockPool(4, 2)
    block = pool.take(A)
    pool.seal(block, names(1)[0])
    pool.free(block, A)
    pool.check()
    match harm:
        case "lost":
            pool.blank.pop()
        case "twice":
            pool.blank.append(pool.blank[0])
        case "referenced":
            pool.references[pool.blank[0]] = 1
        case "unnamed":
            pool.hashes[block] = None
        case "index":
            pool.index.clear()
    with pytest.raises(AssertionError):
        pool.check()
