"""A step that vLLM has scheduled survives whatever goes wrong in adding finetuning to it."""

from __future__ import annotations

import copy
import inspect
import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_flexft.plan import Chunk
from vllm_flexft.sched.draft import Draft, Part
from vllm_flexft.sched.planner import StepLoad
from vllm_flexft.sched.room import ChunkPrompt, PlannedWork
from vllm_flexft.sched.scheduler import CoServeMixin
from vllm_flexft.sched.step_output import chunk_requests

BLOCK_IDS = ([1, 2],)


def two_chunks() -> PlannedWork:
    chunks = [Chunk(f"chunk-{i}", lane=0, row=16 * i, num_tokens=16) for i in range(2)]
    prompt = ChunkPrompt(np.arange(17, dtype=np.int32), 0, BLOCK_IDS)
    return PlannedWork(chunks=chunks, prompts=[prompt, prompt])


class FakeScheduler:
    """What of the scheduler is asked for."""

    def __init__(self, zeroing: Any = lambda: None) -> None:
        self._get_new_block_ids_to_zero = zeroing
        self._chunks_in_flight: list[str] = []
        self._runs = SimpleNamespace(charge=lambda seconds: None)
        self.failed: list[Exception] = []

    def _fail(self, run: Any, error: Exception) -> None:
        self.failed.append(error)


def append(fake: Any, output: SchedulerOutput, commit: Any = lambda work, room: "plan") -> Any:
    run, work = cast(Any, SimpleNamespace(lora_id=7, commit=commit)), two_chunks()
    room: Any = SimpleNamespace(spent=0.0)
    requests = chunk_requests(work, 7, v2_runner=False)
    draft = Draft(StepLoad(), room, [Part(run, work, requests)])
    return CoServeMixin._commit(fake, draft, output)


def test_chunks_join_the_step_as_requests_of_their_own():
    fake, output = FakeScheduler(lambda: [3]), SchedulerOutput.make_empty()
    assert append(fake, output) == ["plan"]
    assert [r.req_id for r in output.scheduled_new_reqs] == ["chunk-0", "chunk-1"]
    assert output.num_scheduled_tokens == {"chunk-0": 16, "chunk-1": 16}
    assert output.total_num_scheduled_tokens == 32
    assert output.new_block_ids_to_zero == [3]
    assert fake._chunks_in_flight == ["chunk-0", "chunk-1"]


@pytest.mark.parametrize("at", ["commit", "zeroing"])
def test_a_failure_half_way_leaves_the_step_as_vllm_made_it(at: str):
    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    fake = FakeScheduler(fails if at == "zeroing" else lambda: None)
    output = SchedulerOutput.make_empty()
    before = copy.deepcopy(output)
    plans = append(fake, output, fails if at == "commit" else lambda work, room: "plan")
    assert plans == []
    assert len(fake.failed) == 1
    assert output == before
    assert fake._chunks_in_flight == []


def test_nothing_of_ours_hides_a_method_or_an_attribute_of_vllms_scheduler():
    wanted = {
        "get_grammar_bitmask", "has_requests", "reset_prefix_cache", "schedule",
        "set_pause_state", "shutdown", "update_from_output",
    }  # fmt: skip
    shared = {name for name in vars(CoServeMixin) if hasattr(AsyncScheduler, name)}
    assert {name for name in shared if not name.startswith("__")} == wanted
    attribute = re.compile(r"self\.(_?\w+)(?:: [^=\n]+)? = ")
    theirs = {*attribute.findall(inspect.getsource(Scheduler))}
    theirs |= {*attribute.findall(inspect.getsource(AsyncScheduler))}
    assert {*attribute.findall(inspect.getsource(CoServeMixin))} & theirs == {"lora_config"}


def test_model_runner_v2_can_stage_the_tokens_of_a_chunk():
    """By the code of the class that it stages them in, which needs a GPU only to write them out."""
    staged = object.__new__(StagedWriteTensor)
    staged._staged_write_indices, staged._staged_write_starts = [], []
    staged._staged_write_contents, staged._staged_write_cu_lens = [], []
    for request in chunk_requests(two_chunks(), 7, v2_runner=True):
        staged.stage_write(0, 0, request.prefill_token_ids)
        assert request.prompt_len == 17
    assert staged._staged_write_contents == [*range(17), *range(17)]
