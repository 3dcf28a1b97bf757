"""Reads inference from vLLM's SchedulerOutput, and adds finetune chunks to it."""

from __future__ import annotations

import functools
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_flexft.plan import PLAN_ATTRIBUTE, StepPlan
from vllm_flexft.sched.planner import StepLoad
from vllm_flexft.sched.room import PlannedWork
from vllm_flexft.sched.sequence_kv import NO_SAMPLING


def load_of(
    output: SchedulerOutput, *, context: int, num_waiting: int, num_requests: int
) -> StepLoad:
    """`context`: tokens in the KV cache of requests, what their decode rows attend. No Python loop
    over the requests: an engine may run hundreds."""
    rows, tokens = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
    if rows != tokens:
        rows = list(output.num_scheduled_tokens.values()).count(1)
    return StepLoad(
        decode_rows=rows,
        prefill_tokens=tokens - rows,
        context=context,
        num_waiting=num_waiting,
        num_requests=num_requests,
    )


@functools.lru_cache(maxsize=16)  # adapters in training
def _lora_request(lora_id: int) -> LoRARequest:
    return LoRARequest(
        lora_name=f"flexft-training-{lora_id}", lora_int_id=lora_id, lora_path="(in training)"
    )


def chunk_requests(work: PlannedWork, lora_id: int, *, v2_runner: bool) -> list[NewRequestData]:
    """Each chunk is a request of its own that lives for one step: a part of a longer prompt whose
    earlier keys and values are in its blocks already."""
    lora = _lora_request(lora_id)
    requests = []
    for chunk, prompt in zip(work.chunks, work.prompts, strict=True):
        # vLLM declares a list, and V2 needs one; V1 copies it into an array of its own, so that it
        # takes an array.
        token_ids: Any = prompt.token_ids.tolist() if v2_runner else prompt.token_ids
        requests.append(
            NewRequestData(
                req_id=chunk.req_id,
                prompt_token_ids=token_ids,
                mm_features=[],
                sampling_params=NO_SAMPLING,
                pooling_params=None,
                block_ids=prompt.block_ids,
                num_computed_tokens=prompt.num_computed,
                lora_request=lora,
                prefill_token_ids=token_ids if v2_runner else None,
            )
        )
    return requests


def append_chunks(
    output: SchedulerOutput,
    work: PlannedWork,
    requests: list[NewRequestData],
    blocks_to_zero: list[int] | None,
) -> None:
    """Cannot fail half-way: `output` holds all of the chunks or none."""
    if blocks_to_zero is not None:
        output.new_block_ids_to_zero = [*(output.new_block_ids_to_zero or ()), *blocks_to_zero]
    output.scheduled_new_reqs.extend(requests)
    output.num_scheduled_tokens.update((c.req_id, c.num_tokens) for c in work.chunks)
    output.total_num_scheduled_tokens += sum(c.num_tokens for c in work.chunks)


def is_measurable(output: SchedulerOutput) -> bool:
    """Whether the step's time says something about its work: opening and closing a job, and waiting
    for its last file, take as long as they take."""
    plans: tuple[StepPlan, ...] = getattr(output, PLAN_ATTRIBUTE, ())
    return not any(p.open_job or p.close_job or p.wait_for_writer for p in plans)
