"""What a forward says that it shares with slices under way."""

from types import SimpleNamespace

import pytest
import torch

from vllm_flexft.plan import Chunk, StepPlan
from vllm_flexft.runner.touched import touched
from vllm_flexft.train.stream import OneStream, lane_of, slot_of, streams_for


def scheduled(new, cached):
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=ids) for ids in new],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=cached),
    )


def test_blocks_of_new_requests_and_those_that_running_ones_are_given():
    """In every group of the KV cache; most running requests are given none."""
    output = scheduled(new=[([3, 4], [9])], cached=[None, ([7], [])])
    assert touched(output, ()) == {3, 4, 9, 7}


def test_lanes_and_the_slot_of_jobs_with_chunks_only():
    chunks = (Chunk("a", lane=1, row=0, num_tokens=5), Chunk("b", lane=0, row=9, num_tokens=2))
    plans = (StepPlan("one", chunks=chunks), StepPlan("two", wait_for_writer=True))
    expected = {lane_of("one", 0), lane_of("one", 1), slot_of("one")}
    assert touched(scheduled([], []), plans) == expected


def test_vllms_output_has_what_is_read():
    from dataclasses import fields

    output = pytest.importorskip("vllm.v1.core.sched.output")
    assert "block_ids" in {field.name for field in fields(output.NewRequestData)}
    assert "new_block_ids" in {field.name for field in fields(output.CachedRequestData)}
    assert {"scheduled_new_reqs", "scheduled_cached_reqs"} <= {
        field.name for field in fields(output.SchedulerOutput)
    }


@pytest.mark.parametrize(("device", "serial"), [("cpu", False), ("cpu", True), ("cuda", True)])
def test_a_cpu_and_the_serialised_mode_have_one_stream(device, serial):
    assert isinstance(streams_for(torch.device(device), serial=serial), OneStream)
