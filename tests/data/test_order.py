"""The order of a run: whole epochs, the same after a resume, counted as Trainer counts."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from vllm_flexft.data import BatchOrder

sizes = st.integers(1, 50)
seeds = st.integers(0, 2**32 - 1)

GOLDEN_EPOCH_0 = [4, 1, 3, 6, 0, 7, 2, 5]
GOLDEN_EPOCH_1 = [1, 2, 5, 3, 6, 0, 4, 7]


@given(num_rows=sizes, batch_size=sizes, seed=seeds, shuffle=st.booleans())
@settings(derandomize=True, deadline=None)
def test_every_epoch_trains_on_every_row_once(
    num_rows: int, batch_size: int, seed: int, shuffle: bool
) -> None:
    order = BatchOrder(num_rows, batch_size, seed, shuffle, num_train_epochs=3)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.rows(step) for step in steps]
        assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
        assert all(len(batch) == batch_size for batch in batches[:-1])


@given(num_rows=sizes, batch_size=sizes, seed=seeds, data=st.data())
@settings(derandomize=True, deadline=None)
def test_resume_at_any_step_continues_the_same_order(
    num_rows: int, batch_size: int, seed: int, data: st.DataObject
) -> None:
    undisturbed = BatchOrder(num_rows, batch_size, seed, num_train_epochs=3)
    expected = [undisturbed.rows(step) for step in range(undisturbed.total_steps)]
    start = data.draw(st.integers(0, undisturbed.total_steps - 1))
    resumed = BatchOrder(num_rows, batch_size, seed, num_train_epochs=3)
    assert [resumed.rows(step) for step in range(start, resumed.total_steps)] == expected[start:]


def test_order_of_a_seed_never_changes() -> None:
    """A checkpoint of any earlier version relies on it."""
    order = BatchOrder(8, 8, seed=42, num_train_epochs=2)
    assert (order.rows(0), order.rows(1)) == (GOLDEN_EPOCH_0, GOLDEN_EPOCH_1)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(BatchOrder(64, 64, seed).rows(epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_unshuffled_order_is_the_datasets() -> None:
    order = BatchOrder(5, 2, seed=1, shuffle=False, num_train_epochs=2)
    assert [order.rows(step) for step in range(6)] == [[0, 1], [2, 3], [4]] * 2


@pytest.mark.parametrize("num_rows", [1, 7, 16, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize(
    "length",
    [
        {"num_train_epochs": 3.0},
        {"num_train_epochs": 0.3},
        {"num_train_epochs": 1.5},
        {"num_train_epochs": 1.0, "max_steps": 5},
    ],
)
def test_steps_are_counted_as_trainer_counts_them(
    tmp_path, num_rows: int, batch_size: int, length: dict
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch_size, use_cpu=True, **length
    )
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=[{}] * num_rows)
    values = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    order = BatchOrder(num_rows, batch_size, seed=0, **length)
    assert order.steps_per_epoch == values[1]
    assert order.total_steps == values[6]


def test_epoch_is_the_part_of_the_data_done() -> None:
    order = BatchOrder(10, 4, seed=0, num_train_epochs=2)
    assert [order.epoch(step) for step in (0, 3, 6)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("step", [-1, 6])
def test_step_outside_of_the_run_is_refused(step: int) -> None:
    with pytest.raises(IndexError):
        BatchOrder(10, 4, seed=0, num_train_epochs=2).rows(step)


def test_an_epoch_drawn_ahead_is_the_same_and_is_not_drawn_again() -> None:
    ahead, late = (BatchOrder(100_000, 50_000, seed=3, num_train_epochs=3) for _ in range(2))
    for step in range(6):
        ahead.draw_after(step)
        permutations = dict(ahead._permutations)
        assert ahead.rows(step) == late.rows(step)
        if step >= 2:  # the run's first epoch was drawn by its first step
            assert ahead._permutations.keys() == permutations.keys()
        assert len(permutations) <= 3
    assert max(ahead._permutations) == 2, "no epoch after the last"


def test_million_rows_cost_one_permutation_an_epoch() -> None:
    order = BatchOrder(1_000_000, 8, seed=0, num_train_epochs=1)
    order.rows(0)
    begin = time.perf_counter()
    for step in range(1000):
        order.rows(step)
    # 1000 permutations would take over a minute, 1000 slices a few milliseconds.
    assert time.perf_counter() - begin < 5
