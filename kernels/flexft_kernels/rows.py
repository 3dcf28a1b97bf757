"""Rows of one matrix copied to rows of another: between a batch and the activation arena.

Which rows is data on the device, so that a captured graph can be replayed with others.
"""

from torch import Tensor


def copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows[i], :] = source[source_rows[i], :width] for each i with both rows >= 0.

    source: (S, at least width); target: (U, width); source_rows, target_rows: (n,) integers. No
    row of the target may be named twice. Converts to the target's dtype.
    """
    named = (source_rows >= 0) & (target_rows >= 0)
    picked = source[source_rows[named], : target.shape[1]]
    target[target_rows[named]] = picked.to(target.dtype)
