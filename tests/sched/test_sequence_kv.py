from __future__ import annotations

from typing import Any

from vllm_flexft.sched.sequence_kv import KV_ID_PREFIX, KVLender, SequenceKV


def sequence(number: int, tokens: int) -> SequenceKV:
    return SequenceKV(f"{KV_ID_PREFIX}{number}", tokens)


def test_a_sequence_gets_all_its_blocks_at_once_and_gives_them_back_whole(
    make_manager: Any,
) -> None:
    manager = make_manager(8)
    lender, one = KVLender(manager, 0), sequence(1, 60)
    assert lender.extend(one, 10)
    assert lender.extend(one, 30)
    assert one.num_tokens == 40
    assert [len(group) for group in one.block_ids] == [4]
    assert lender.num_blocks == 4
    lender.free(one)
    assert one.num_tokens == 0
    assert manager.block_pool.get_num_free_blocks() == 8


def test_reserved_blocks_are_never_lent(make_manager: Any) -> None:
    manager = make_manager(8)
    lender = KVLender(manager, reserved_blocks=3)
    assert lender.extend(sequence(1, 80), 80)
    assert not lender.extend(sequence(2, 1), 1)
    assert manager.block_pool.get_num_free_blocks() == 3


def test_where_blocks_are_few_a_sequence_gets_those_of_its_next_chunk(make_manager: Any) -> None:
    lender, one = KVLender(make_manager(4), 0), sequence(1, 100)
    for tokens, blocks in (10, 1), (6, 1), (20, 3):
        assert lender.extend(one, tokens)
        assert [len(group) for group in one.block_ids] == [blocks]
    assert lender.num_blocks == 3


def test_a_refused_extension_changes_nothing(make_manager: Any) -> None:
    manager = make_manager(2)
    lender, one = KVLender(manager, 0), sequence(1, 100)
    assert lender.extend(one, 20)
    assert not lender.extend(one, 50)
    assert one.num_tokens == 20
    assert [len(group) for group in one.block_ids] == [2]
    assert lender.extend(one, 12)


def test_freeing_twice_is_harmless(make_manager: Any) -> None:
    manager = make_manager(4)
    lender, one = KVLender(manager, 0), sequence(1, 30)
    lender.extend(one, 30)
    lender.free(one)
    lender.free(one)
    assert manager.block_pool.get_num_free_blocks() == 4


def test_training_sequences_never_enter_the_prefix_cache(make_manager: Any) -> None:
    manager = make_manager(8)
    lender, one = KVLender(manager, 0), sequence(1, 64)
    lender.extend(one, 64)
    blocks = one.block_ids[0]
    assert all(manager.block_pool.blocks[block].block_hash is None for block in blocks)
