"""Static analysis of a layer: which ops the backward runs, which tensors it reads.

Walks back from the loss. An op's backward is dropped when nothing above needs it or nothing below
is trainable; what remains says what it reads. (FlexLLM, arXiv 2402.18789, section 5.2, does the
same over operators of a parallel computation graph.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_flexft.graph.ops import LayerGraph


@dataclass(frozen=True, slots=True)
class LayerNeeds:
    """What the backward of one layer does.

    Attributes:
        backward_ops: names of ops whose backward runs, for an input's gradient or an adapter's.
        reads: tensor -> names of the ops that read it.
        input_grads: tensors that have a trainable ancestor: their gradient is formed.
    """

    backward_ops: tuple[str, ...]
    reads: dict[str, tuple[str, ...]]
    input_grads: frozenset[str]

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(self.reads)


def prune(graph: LayerGraph, targets: Collection[str], below: bool) -> LayerNeeds:
    """Needs of a layer with adapters on `targets` (PEFT names).

    Args:
        below: whether a layer below has adapters, so that dX of the layer's input is wanted.
    """
    wants_grad = {graph.input} if below else set()  # tensors with a trainable ancestor
    for op in graph.ops:
        if any(name in targets for name in op.targets) or any(t in wants_grad for t in op.inputs):
            wants_grad.add(op.output)
    reads: dict[str, list[str]] = {}
    backward_ops = []
    for op in reversed(graph.ops):
        if op.output not in wants_grad:
            continue
        backward_ops.append(op.name)
        needed: set[str] = set()
        if any(t in wants_grad for t in op.inputs):
            needed.update(op.reads)
        if any(name in targets for name in op.targets):
            needed.update(op.bypass_reads)
        for tensor in sorted(needed):
            reads.setdefault(tensor, []).append(op.name)
    return LayerNeeds(
        tuple(backward_ops), {t: tuple(ops) for t, ops in reads.items()}, frozenset(wants_grad)
    )
