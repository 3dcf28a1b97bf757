"""How long a slice of the backward is: known beforehand, for the memory plan and the scheduler."""

from __future__ import annotations

from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.plan import Windows

# Tokens of a layer's slice: enough for efficient GEMMs. On CPU fewer are, and a slice takes tens of
# milliseconds: of what a step has left, the part that no whole slice fills is lost.
WINDOW = {"cpu": 128, "cuda": 256}
MIN_LOSS_WINDOW = 32  # rows; the head's weights are read for each
MAX_LOGITS_ROWS = 256  # of a larger window of the loss, as many at a time
# A frozen layer's backward over its forward: dX (1.0) + norms, activation, attention's five GEMMs
# for two, adapter gradients (about 0.4)
BACKWARD_RATIO = 1.4


def backward_windows(shape: ModelShape, device: str) -> Windows:
    """With a window of the loss that takes as long as one of a layer: a row of the loss costs two
    GEMMs with the LM head."""
    layer = WINDOW[device]
    head = 2 * shape.hidden_size * shape.vocab_size
    loss = int(layer * BACKWARD_RATIO * shape.layer_parameters / head)
    return Windows(layer, min(layer, max(MIN_LOSS_WINDOW, loss)))


def logits_rows(windows: Windows) -> int:
    """Rows of logits that exist at a time."""
    return min(MAX_LOGITS_ROWS, windows.loss)
