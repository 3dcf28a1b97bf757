"""Cost of finetune work in forward-token equivalents, from the model's shape.

One unit is one token through all decoder layers. A frozen layer's backward is one GEMM a linear
(dX, no dW) plus what it recomputes, so a window of W tokens through one of L layers costs about
W / L times `BACKWARD_RATIO`; a supervised token of the loss costs two GEMMs with the LM head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# dX (1.0) + norms, activation, attention's five GEMMs for two, adapter gradients (about 0.4)
BACKWARD_RATIO = 1.4


@dataclass(frozen=True, slots=True)
class UnitCosts:
    num_layers: int
    layer_parameters: int  # linears of one decoder layer
    head_parameters: int  # the LM head

    @classmethod
    def from_hf_config(cls, config: Any) -> UnitCosts:
        """`config`: a transformers text config of a Llama-shaped decoder."""
        hidden = config.hidden_size
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            num_layers=config.num_hidden_layers,
            layer_parameters=attention + 3 * hidden * config.intermediate_size,
            head_parameters=hidden * config.vocab_size,
        )

    def layer_slice(self, tokens: int) -> float:
        return BACKWARD_RATIO * tokens / self.num_layers

    def loss_slice(self, tokens: int) -> float:
        return 2 * tokens * self.head_parameters / (self.num_layers * self.layer_parameters)
