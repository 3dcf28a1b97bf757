"""What an optimizer step trains on."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexft.data.dataset import TrainingSequence
from vllm_flexft.sched.prepared import PreparedJob


@dataclass(frozen=True, slots=True)
class StepRows:
    step: int
    sequences: list[TrainingSequence]
    num_targets: int
    num_tokens: int

    @classmethod
    def of(cls, prepared: PreparedJob, step: int) -> StepRows:
        sequences = [prepared.train[row] for row in prepared.order.rows(step)]
        return cls(
            step,
            sequences,
            num_targets=sum(s.num_targets for s in sequences),
            num_tokens=sum(len(s.token_ids) for s in sequences),
        )
