"""Deferred backward of one micro-batch, slice by slice along the fixed grid.

State that lives between slices (working.py): the gradient of the residual stream for all tokens,
and, for the layer in work, its keys and values (in the paged cache, or read from it once) with
their fp32 gradients. The logits of a window of the loss have their place there too.
Legend: T micro-batch tokens, W window, N supervised rows, D hidden.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexft_kernels.attention import KeysValues, Segment
from flexft_kernels.ops import linear_cross_entropy, rms_norm_backward
from flexft_kernels.rms_norm import rms_norm
from vllm_flexft.graph.grid import BackwardGrid, Slice
from vllm_flexft.plan import MicroBatch
from vllm_flexft.train.activations import ActivationStore
from vllm_flexft.train.layer import LayerBackward
from vllm_flexft.train.model import AttentionGeometry, ServedModel
from vllm_flexft.train.window import LayerInputs
from vllm_flexft.train.working import WorkingBuffers

KV_READ_TOKENS = 1024  # of the cache at a time: what is unpacked on the way stays small


class MicroBatchBackward:
    def __init__(
        self,
        batch: MicroBatch,
        grid: BackwardGrid,
        model: ServedModel,
        layers: dict[int, LayerBackward],
        store: ActivationStore,
        working: WorkingBuffers,
    ) -> None:
        self.batch, self.grid, self.model = batch, grid, model
        self._layers, self._store, self._working = layers, store, working
        device = model.device
        offsets = batch.offsets
        lengths = [b - a for a, b in itertools.pairwise(offsets)]
        self._positions_T = torch.cat([torch.arange(n) for n in lengths]).to(
            device, non_blocking=True
        )
        # The prediction made at row t is a loss term when the next token is supervised; the first
        # token of a sequence never is, so no row predicts across a border.
        supervised = torch.from_numpy(batch.supervised)
        rows = supervised[1:].nonzero().squeeze(1)
        self._loss_rows_N = rows.to(device, non_blocking=True)
        targets = torch.from_numpy(batch.token_ids)[rows + 1].to(torch.int64)
        self._targets_N = targets.to(device, non_blocking=True)
        self._loss_rows_host = rows
        self._block_tables: list[Tensor] = []  # per KV group: (sequences, most blocks of one)
        self.kv_blocks: set[int] = set()  # of all groups: vLLM numbers them as one
        self._next_slice = 0
        self._d_residual_TD = working.residual_grad(
            batch.lane, batch.num_tokens if batch.train else 0
        )
        self._kv: KeysValues | None = None  # of the layer in work, all sequences
        self._kv_grads: tuple[Tensor, Tensor] | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def done(self) -> bool:
        return self._next_slice == self.grid.num_slices

    def locate_kv(self, block_ids: tuple[tuple[list[int], ...], ...]) -> None:
        """Where the keys and values lie: sequences x KV groups x block ids."""
        self.kv_blocks = {i for groups in block_ids for blocks in groups for i in blocks}
        self._block_tables = [
            pad_sequence([torch.tensor(blocks) for blocks in group], batch_first=True).to(
                self.model.device, non_blocking=True
            )
            for group in zip(*block_ids, strict=True)
        ]
        self._kv = None

    def run(self, count: int) -> None:
        for index in range(self._next_slice, self._next_slice + count):
            self._run_slice(self.grid.slice(index))
        self._next_slice += count

    def _run_slice(self, part: Slice) -> None:
        if part.stage == len(self.model.layers):
            self._loss(part)
            return
        layer = self._layers[part.stage]
        if part.first_of_stage or self._kv is None:
            self._load_kv(layer.layer.attention, fresh=part.first_of_stage)
        assert self._kv is not None
        inputs = LayerInputs(
            kept=self._store.window(self.batch.lane, part.stage, part.start, part.stop),
            positions=self._positions_T[part.start : part.stop],
            segments=self._segments(part),
            start=part.start,
            kv=self._kv.of_sequences(self._sequences(part)),
        )
        dx_WD = layer.window(self._d_residual_TD[part.start : part.stop], inputs)
        if dx_WD is not None:
            self._d_residual_TD[part.start : part.stop] = dx_WD

    def _loss(self, part: Slice) -> None:
        """Loss terms of a window and the gradient they send into the residual stream."""
        top, batch = len(self.model.layers), self.batch
        first, last = torch.searchsorted(
            self._loss_rows_host, torch.tensor([part.start, part.stop])
        ).tolist()
        if first == last:
            return
        rows_N, targets_N = self._loss_rows_N[first:last], self._targets_N[first:last]
        norm = self.model.final_norm
        x_ND = self._store.pick(batch.lane, top, "residual_in", rows_N)
        loss, correct, dh_ND = linear_cross_entropy(
            rms_norm(x_ND, norm.weight, norm.eps),
            self.model.lm_head,
            targets_N,
            batch.loss_scale,
            row_block=len(self._working.logits),
            vocab_size=self.model.vocab_size,
            need_grad=batch.train,
            workspace=self._working.logits,
        )
        self.loss_sum += loss
        self.num_correct += correct
        if dh_ND is not None:
            dx_ND = torch.empty(dh_ND.shape, dtype=torch.float32, device=dh_ND.device)
            rms_norm_backward(dh_ND, x_ND, norm.weight, norm.eps, out=dx_ND)
            self._d_residual_TD[rows_N] = dx_ND

    def _load_kv(self, geometry: AttentionGeometry, fresh: bool) -> None:
        """Where the layer's K and V are; the gradients start at zero with the stage."""
        if fresh or self._kv_grads is None:
            self._kv_grads = self._working.kv_grads(self.batch.num_tokens)
        table = self._block_tables[geometry.kv_group]
        if geometry.kv_pages is not None:
            self._kv = KeysValues(*geometry.kv_pages(), *self._kv_grads, table)
        else:
            self._kv = KeysValues(*self._gathered(geometry, table), *self._kv_grads)

    def _gathered(self, geometry: AttentionGeometry, table: Tensor) -> tuple[Tensor, Tensor]:
        """K and V in a row, (T, K, E)."""
        k, v = self._working.kv(self.batch.num_tokens)
        block_size = geometry.block_size
        sequences = zip(itertools.pairwise(self.batch.offsets), table, strict=True)
        for (start, stop), blocks in sequences:
            for part in blocks.split(max(1, KV_READ_TOKENS // block_size)):
                end = min(stop, start + len(part) * block_size)
                if start < end:
                    cached_k, cached_v = geometry.read_kv(part)
                    k[start:end], v[start:end] = cached_k[: end - start], cached_v[: end - start]
                start = end
        return k, v

    def _sequences(self, part: Slice) -> slice:
        """Those that meet the window."""
        offsets = self.batch.offsets
        return slice(bisect_right(offsets, part.start) - 1, bisect_left(offsets, part.stop))

    def _segments(self, part: Slice) -> list[Segment]:
        """Of each of them (first row, end row, first key, first query position)."""
        segments = []
        meeting = self._sequences(part)
        for start, stop in itertools.pairwise(self.batch.offsets[meeting.start : meeting.stop + 1]):
            first, last = max(start, part.start), min(stop, part.stop)
            segments.append((first - part.start, last - part.start, start, first - start))
        return segments
