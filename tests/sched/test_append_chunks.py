"""A step that vLLM has scheduled survives whatever goes wrong in adding finetuning to it."""

from __future__ import annotations

import copy
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_flexft.plan import Chunk
from vllm_flexft.sched import step_output
from vllm_flexft.sched.room import ChunkPrompt, PlannedWork
from vllm_flexft.sched.scheduler import CoServeMixin

BLOCK_IDS = ([1, 2],)


def two_chunks() -> PlannedWork:
    chunks = [Chunk(f"chunk-{i}", lane=0, row=16 * i, num_tokens=16) for i in range(2)]
    prompt = ChunkPrompt(np.arange(17, dtype=np.int32), 0, BLOCK_IDS)
    return PlannedWork(chunks=chunks, prompts=[prompt, prompt])


def scheduler(zeroing: Any = lambda: None) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=False, _chunks_in_flight=[], _get_new_block_ids_to_zero=zeroing
    )


def append(fake: Any, output: SchedulerOutput) -> None:
    run: Any = SimpleNamespace(lora_id=7)
    CoServeMixin._append_chunks(fake, output, run, two_chunks())


def test_chunks_join_the_step_as_requests_of_their_own():
    fake, output = scheduler(lambda: [3]), SchedulerOutput.make_empty()
    append(fake, output)
    assert [r.req_id for r in output.scheduled_new_reqs] == ["chunk-0", "chunk-1"]
    assert output.num_scheduled_tokens == {"chunk-0": 16, "chunk-1": 16}
    assert output.total_num_scheduled_tokens == 32
    assert output.new_block_ids_to_zero == [3]
    assert fake._chunks_in_flight == ["chunk-0", "chunk-1"]


@pytest.mark.parametrize("at", ["second chunk", "zeroing"])
def test_a_failure_half_way_leaves_the_step_as_vllm_made_it(
    at: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if at == "zeroing" or len(calls) == 2:
            raise RuntimeError("no")
        return NewRequestData(*args, **kwargs)

    fake, output = (
        scheduler(fails if at == "zeroing" else lambda: None),
        SchedulerOutput.make_empty(),
    )
    if at == "second chunk":
        monkeypatch.setattr(step_output, "NewRequestData", fails)
    before = copy.deepcopy(output)
    with pytest.raises(RuntimeError):
        append(fake, output)
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
    for request in step_output.chunk_requests(two_chunks(), 7, v2_runner=True):
        staged.stage_write(0, 0, request.prefill_token_ids)
        assert request.prompt_len == 17
    assert staged._staged_write_contents == [*range(17), *range(17)]
