"""What a training step computes: FLOP a token, in products of matrices."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexft.graph.memory import MemoryPlan
from vllm_flexft.graph.ops import LayerGraph, ModelShape, Op
from vllm_flexft.graph.prune import LayerNeeds

# Where the forward of attention has two products, scores and their product with V, its backward has
# five: the scores again, dP, dV, dQ and dK.
ATTENTION_BACKWARD = 2.5
ADAPTER_FLOPS = 6.0  # a parameter: forward, its own gradient, that of its input


@dataclass(frozen=True, slots=True)
class TrainingWork:
    """FLOP a token, of a sequence whose every token is a target."""

    forward: float
    backward: float
    recomputed: float
    adapter: float
    head: float

    @classmethod
    def of(cls, shape: ModelShape, memory: MemoryPlan, parameters: int) -> TrainingWork:
        """`memory`: made for sequences of the length in question, as attention's share grows with
        it. `parameters`: of the adapter."""
        graph = memory.graph
        return cls(
            forward=shape.num_layers * sum(op.flops for op in graph.ops if _multiplies(op)),
            backward=sum(_backward(graph, needs) for needs in memory.needs.values()),
            recomputed=memory.recompute_flops,
            adapter=ADAPTER_FLOPS * parameters,
            head=2 * 2.0 * shape.hidden_size * shape.vocab_size,  # logits, and dX
        )

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed + self.adapter + self.head


def _backward(graph: LayerGraph, needs: LayerNeeds) -> float:
    """Of one layer: dX = dY W where an input's gradient is formed, and attention's."""
    return sum(
        op.flops * (ATTENTION_BACKWARD if op.name == "attention" else 1.0)
        for op in graph.ops
        if _multiplies(op) and op.name in needs.backward_ops and needs.input_grads & {*op.inputs}
    )


def _multiplies(op: Op) -> bool:
    return bool(op.targets) or op.name == "attention"
