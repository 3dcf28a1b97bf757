"""Rooms of a given size: finetune work a step in forward-token units, whatever the machine's speed,
so that a run meets the same requests at the same points every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vllm_flexft.sched.costs import UnitCosts
from vllm_flexft.sched.latency import Feature, Vector
from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import Budget, StepLoad
from vllm_flexft.sched.room import Room


def unit_prices(prior: Vector) -> Vector:
    """Prices at which a forward token costs 1, and what does not grow with tokens nothing."""
    prices: Vector = prior / prior[Feature.CHUNK]
    prices[[Feature.STEP, Feature.CHUNKS, Feature.CHUNK_CONTEXT, Feature.LAYER_CONTEXT]] = 1e-12
    prices[[Feature.UPDATE, Feature.SAVE]] = 1e-12
    return prices


def unit_room(
    units: float, *, tokens: int, rows: int, idle: bool, costs: UnitCosts | None = None
) -> Room:
    prices = np.ones(len(Feature)) if costs is None else unit_prices(costs.units())
    budget = Budget(units, 0.0, units, 0.0, 0.0, idle)
    return Room(budget, prices, tokens=tokens, rows=rows)


def work_a_step(patch: pytest.MonkeyPatch, units: Callable[[], float]) -> None:
    """The engine's steps get `units()` of finetune work each, and no more."""

    def room(
        self: Pacer, now: float, load: StepLoad, *, tokens: int, rows: int, sole_job: bool = True
    ) -> Room:
        size = units()
        idle = load.num_tokens == 0 and load.num_waiting == 0
        budget = Budget(size, 0.0, size, 0.0, 0.0, idle)
        prices = unit_prices(self.model.prior)
        return Room(budget, prices, tokens=tokens, rows=rows, sole_job=sole_job)

    patch.setattr(Pacer, "room", room)
    patch.setattr(Pacer, "room_ahead", room)
