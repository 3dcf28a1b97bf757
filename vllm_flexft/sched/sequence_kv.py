"""KV-cache blocks of training sequences, taken from and given back to vLLM's manager.

A training sequence owns blocks under a name that the scheduler never sees. Its blocks are not
prefix-cached: its keys depend on adapter weights that change with every update.
"""

from __future__ import annotations

from typing import Any, cast

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager

NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)  # finetuning never samples


class SequenceKV:
    """The blocks of one sequence while its micro-batch is in flight.

    vLLM's manager is given this for a Request, which takes twenty times as long to build. Here are
    all the attributes that it reads.
    """

    __slots__ = (
        "block_ids", "num_blocks", "num_computed_tokens", "num_in_flight_tokens",
        "num_prompt_tokens", "num_tokens", "request_id",
    )  # fmt: skip

    def __init__(self, kv_id: str, num_tokens: int) -> None:
        self.request_id = kv_id
        self.num_prompt_tokens = num_tokens
        # vLLM frees the blocks behind a sliding window, but not what is in flight. The backward
        # still reads them.
        self.num_in_flight_tokens = num_tokens
        self.empty()

    def empty(self) -> None:
        self.num_tokens = 0  # whose keys and values are in the cache
        self.num_computed_tokens = 0  # that have blocks
        self.num_blocks = 0
        self.block_ids: tuple[list[int], ...] = ()  # per KV-cache group


class KVLender:
    """Lends blocks of vLLM's manager to training, and takes them back at once when asked."""

    def __init__(self, manager: KVCacheManager, reserved_blocks: int) -> None:
        self._manager = manager
        self._reserved_blocks = reserved_blocks
        self.num_blocks = 0  # lent

    def extend(self, sequence: SequenceKV, num_tokens: int) -> bool:
        """Blocks for the next `num_tokens`; False when inference may need them.

        All that the sequence will need, where there are so many: its next chunk then asks for none.
        """
        end = sequence.num_tokens + num_tokens
        if end > sequence.num_computed_tokens:
            if not (self.borrow(sequence) or self._allocate(sequence, end)):
                return False
        sequence.num_tokens = end
        return True

    def borrow(self, sequence: SequenceKV) -> bool:
        """All blocks of a sequence; False when inference may need them."""
        length = sequence.num_prompt_tokens
        return length == sequence.num_computed_tokens or self._allocate(sequence, length)

    def _allocate(self, sequence: SequenceKV, tokens: int) -> bool:
        """Blocks for the first `tokens`."""
        before = self._manager.block_pool.get_num_free_blocks()
        blocks = self._manager.allocate_slots(
            cast(Any, sequence),
            tokens - sequence.num_computed_tokens,
            delay_cache_blocks=True,  # never enter the prefix cache
            reserved_blocks=self._reserved_blocks,
            has_scheduled_reqs=False,  # the reserve takes the place of vLLM's watermark
        )
        if blocks is None:
            return False
        taken = before - self._manager.block_pool.get_num_free_blocks()
        sequence.num_computed_tokens = tokens
        sequence.num_blocks += taken
        sequence.block_ids = self._manager.get_block_ids(sequence.request_id)
        self.num_blocks += taken
        return True

    def free(self, sequence: SequenceKV) -> None:
        if sequence.num_blocks:
            self._manager.free(cast(Any, sequence))
            self.num_blocks -= sequence.num_blocks
            sequence.empty()


KV_ID_PREFIX = "flexft-kv-"
