"""What finetune and inference work costs before anything was measured, from the model's shape.

The unit is one token's forward through all decoder layers: 2 FLOP a parameter of their linears. A
frozen layer's backward is one GEMM a linear (dX, no dW) plus what it recomputes; a supervised row
of the loss costs two GEMMs with the LM head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.windows import BACKWARD_RATIO
from vllm_flexft.sched.latency import Feature, Vector

# FLOP/s that the prior supposes. The first step corrects it; too fast would let that step be long.
CPU_FLOPS = 3e10  # one core with AVX2
CUDA_FLOPS = 5e13  # a fifth of an A100's peak
STEP_TOKENS = {"cpu": 16, "cuda": 256}  # a step reads all weights, whatever the number of rows
# AdamW moves 7 fp32 numbers a parameter, a snapshot 4, at about 1 FLOP's time a byte on CPU.
UPDATE_FLOPS, SAVE_FLOPS = 28.0, 16.0


@dataclass(frozen=True, slots=True)
class UnitCosts:
    num_layers: int
    layer_parameters: int  # linears of one decoder layer
    head_parameters: int  # the LM head
    query_width: int = 0  # heads x head dimension

    @classmethod
    def of(cls, shape: ModelShape) -> UnitCosts:
        return cls(
            num_layers=shape.num_layers,
            layer_parameters=shape.layer_parameters,
            head_parameters=shape.hidden_size * shape.vocab_size,
            query_width=shape.num_heads * shape.head_dim,
        )

    @property
    def token_flops(self) -> float:
        return 2.0 * self.num_layers * self.layer_parameters

    def units(self, device: str = "cpu") -> Vector:
        """Of each `Feature`."""
        # scores and their product with V: 4 FLOP a number of the query and key
        attended = 2.0 * self.query_width / self.layer_parameters
        amounts = {
            Feature.STEP: STEP_TOKENS.get(device, STEP_TOKENS["cuda"]),
            Feature.DECODE: 1.0,
            Feature.PREFILL: 1.0,
            Feature.CONTEXT: attended,
            Feature.CHUNKS: 0.5 * STEP_TOKENS.get(device, STEP_TOKENS["cuda"]),
            Feature.CHUNK: 1.0,
            Feature.CHUNK_CONTEXT: attended,
            Feature.LOSS: 2 * self.head_parameters / (self.num_layers * self.layer_parameters),
            Feature.LAYER: BACKWARD_RATIO / self.num_layers,
            # five products of that size where the forward has two
            Feature.LAYER_CONTEXT: 2.5 * attended / self.num_layers,
            Feature.UPDATE: UPDATE_FLOPS / self.token_flops,
            Feature.SAVE: SAVE_FLOPS / self.token_flops,
        }
        units = np.array([amounts[feature] for feature in Feature], dtype=np.float64)
        return np.maximum(units, 1e-12)

    def prior(self, device: str) -> Vector:
        """Seconds of each `Feature`, a first guess."""
        flops = CPU_FLOPS if device == "cpu" else CUDA_FLOPS
        return self.units(device) * (self.token_flops / flops)
