"""A decoder layer as a small graph of ops, each stating what its backward reads.

With frozen base weights a linear's dX = dY W reads nothing that the forward made; what has to be
kept is what norms, the activation and attention read, and the inputs of the linears on which an
adapter (the bypass) hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CACHED = frozenset({"k", "v"})  # in the paged KV cache: never kept a second time


@dataclass(frozen=True, slots=True)
class Op:
    """output = f(inputs). Names are tensors of the layer.

    Attributes:
        reads: tensors that the gradient of some input needs, besides the output's gradient.
        bypass_reads: tensors that an adapter's gradient needs: the linear's input.
        targets: PEFT names of the linears whose adapter hangs on this op.
        flops: of the forward, a token; for attention a token of `context` keys.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    flops: float
    reads: tuple[str, ...] = ()
    bypass_reads: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """Ops in the order of the forward, from `residual_in` to `residual_out`.

    Attributes:
        sizes: numbers a token of every tensor of the layer.
        widths: numbers a token to keep of those tensors that may be kept.
    """

    ops: tuple[Op, ...]
    sizes: Mapping[str, int]
    widths: Mapping[str, int]
    producers: Mapping[str, Op] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "producers", {op.output: op for op in self.ops})

    @property
    def input(self) -> str:
        return self.ops[0].inputs[0]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the sizes of a Llama-shaped decoder follow from."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """`config`: a transformers config of one of the supported families."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        return cls(
            architecture=(config.architectures or ["unknown"])[0],
            num_layers=config.num_hidden_layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        """Of the linears of one decoder layer."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def weight_parameters(self) -> int:
        """Of the whole model; norms and biases, below a thousandth, are left out."""
        embeddings = (1 if self.tied_embeddings else 2) * self.hidden_size * self.vocab_size
        return self.num_layers * self.layer_parameters + embeddings

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """PEFT's name of each linear -> (inputs, outputs)."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, mlp = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, mlp),
            "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }
