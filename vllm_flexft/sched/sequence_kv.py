"""KV-cache blocks of training sequences, taken from and given back to vLLM's manager.

A training sequence owns blocks under a vLLM `Request` that the scheduler never sees. Its blocks
are not prefix-cached: its keys depend on adapter weights that change with every update.
"""

from __future__ import annotations

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)  # finetuning never samples


class SequenceKV:
    """The blocks of one sequence while its micro-batch is in flight."""

    def __init__(self, kv_id: str, num_tokens: int) -> None:
        # Blocks that are never prefix-cached depend on the number of tokens alone.
        self.request = Request(
            request_id=kv_id,
            prompt_token_ids=[0] * num_tokens,
            sampling_params=NO_SAMPLING,
            pooling_params=None,
        )
        # vLLM frees the blocks behind a sliding window, but not what is in flight. The backward
        # still reads them.
        self.request.num_in_flight_tokens = num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.request.num_computed_tokens


class KVLender:
    """Lends blocks of vLLM's manager to training, and takes them back at once when asked."""

    def __init__(self, manager: KVCacheManager, reserved_blocks: int) -> None:
        self._manager = manager
        self._reserved_blocks = reserved_blocks
        self._held: set[str] = set()
        self.num_blocks = 0  # lent

    def extend(self, sequence: SequenceKV, num_tokens: int) -> bool:
        """Blocks for the next `num_tokens`; False when inference may need them."""
        request = sequence.request
        free = self._manager.block_pool.get_num_free_blocks()
        blocks = self._manager.allocate_slots(
            request,
            num_tokens,
            delay_cache_blocks=True,  # never enter the prefix cache
            reserved_blocks=self._reserved_blocks,
            has_scheduled_reqs=False,  # the reserve takes the place of vLLM's watermark
        )
        if blocks is None:
            return False
        self._held.add(request.request_id)
        self.num_blocks += free - self._manager.block_pool.get_num_free_blocks()
        request.num_computed_tokens += num_tokens
        return True

    def block_ids(self, sequence: SequenceKV) -> tuple[list[int], ...]:
        """Per KV-cache group."""
        return self._manager.get_block_ids(sequence.request.request_id)

    def free(self, sequence: SequenceKV) -> None:
        if sequence.request.request_id in self._held:
            self._held.discard(sequence.request.request_id)
            free = self._manager.block_pool.get_num_free_blocks()
            self._manager.free(sequence.request)
            self.num_blocks += free - self._manager.block_pool.get_num_free_blocks()
        sequence.request.num_computed_tokens = 0


KV_ID_PREFIX = "flexft-kv-"
