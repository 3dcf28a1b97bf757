"""What the backward works in beside the kept activations, allocated once when the job opens.

One micro-batch is in backward at a time, one layer of it at a time, so one set of keys and values,
and one of logits, serves them all; a residual gradient belongs to its lane.
Legend: T micro-batch tokens, D hidden, K KV heads, E head dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flexft.graph.job_memory import Lanes
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.windows import logits_rows
from vllm_flexft.plan import Windows


class WorkingBuffers:
    def __init__(
        self,
        shape: ModelShape,
        lanes: Lanes,
        windows: Windows,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gathers_kv: bool = True,
    ) -> None:
        """`gathers_kv`: keys and values of a layer are copied out of the cache."""
        heads = (2, lanes.tokens, shape.num_kv_heads, shape.head_dim)
        self._d_residual = torch.empty(
            lanes.count, lanes.tokens, shape.hidden_size, dtype=torch.float32, device=device
        )
        self._kv = torch.empty(heads if gathers_kv else 0, dtype=dtype, device=device)
        self._kv_grads = torch.empty(heads, dtype=torch.float32, device=device)
        # (rows, V): of a window of the loss
        rows = logits_rows(windows)
        self.logits = torch.empty(rows, shape.vocab_size, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        buffers = (self._d_residual, self._kv, self._kv_grads, self.logits)
        return sum(buffer.nbytes for buffer in buffers)

    def residual_grad(self, lane: int, tokens: int) -> Tensor:
        """(T, D) fp32 zeros."""
        return self._d_residual[lane, :tokens].zero_()

    def kv(self, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V, (T, K, E), to be filled."""
        k, v = self._kv[:, :tokens]
        return k, v

    def kv_grads(self, tokens: int) -> tuple[Tensor, Tensor]:
        """dK and dV, (T, K, E) fp32 zeros."""
        dk, dv = self._kv_grads[:, :tokens].zero_()
        return dk, dv
