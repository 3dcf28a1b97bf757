"""Language model head, cross-entropy and the gradient of the hidden states in one pass.

    z = h Wᵀ,   loss = logsumexp(z) - z[target],   dh = scale (softmax(z) - onehot(target)) W

Logits exist for one block of rows at a time and become their own gradient in place, as in
Wijmans et al. 2024, https://arxiv.org/abs/2411.09009, and Liger-Kernel's fused linear
cross-entropy. The head is frozen: there is no dW.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The softmax of so many rows is done at a time, in fp32: 8 rows × 32000 × 4 bytes are 1 MiB, what
# a core's L2 cache holds.
_SOFTMAX_ROWS = 8


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    scale: float,
    *,
    row_block: int = 256,
    vocab_size: int | None = None,
    need_grad: bool = True,
    workspace: Tensor | None = None,
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss, number of right predictions and the gradient of `scale * loss_sum`.

    h_ND: (N, D) final hidden states of the supervised positions. weight_VD: (V, D), of h's dtype;
    rows from `vocab_size` on are padding and take no part. targets_N: (N,) int64 below vocab_size.
    workspace: optional (>= row_block, vocab_size) of h's dtype, for the logits; a new one each
    call costs its page faults, up to 10 ms at V = 32000 in fp32. cross_entropy: what takes the
    place of `_cross_entropy_`.

    Returns `loss_sum` (0-d fp32, unscaled), `num_correct` (0-d int64: targets that argmax finds)
    and dh (N, D) in h's dtype, None without `need_grad`. The logits are rounded to h's dtype as by
    the served head; everything after is in fp32 until the gradient of the logits is rounded.
    """
    cross_entropy = cross_entropy or _cross_entropy_
    weight_VD = weight_VD[:vocab_size]
    num_rows, vocab = h_ND.shape[0], weight_VD.shape[0]
    if workspace is None:
        workspace = h_ND.new_empty(min(row_block, num_rows), vocab)
    loss_N = torch.empty(num_rows, dtype=torch.float32, device=h_ND.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=h_ND.device)
    dh_ND = torch.empty_like(h_ND) if need_grad else None
    for start in range(0, num_rows, row_block):
        block = slice(start, min(start + row_block, num_rows))
        logits_NV = workspace[: block.stop - block.start]
        torch.mm(h_ND[block], weight_VD.t(), out=logits_NV)
        num_correct += cross_entropy(logits_NV, targets_N[block], loss_N[block])
        if dh_ND is not None:
            # alpha is applied before the result is rounded.
            dh = dh_ND[block]
            torch.addmm(dh, logits_NV, weight_VD, beta=0.0, alpha=scale, out=dh)
    return loss_N.sum(), num_correct, dh_ND


def _cross_entropy_(logits_NV: Tensor, targets_N: Tensor, loss_N: Tensor) -> Tensor:
    """Turn logits into softmax - onehot in place, fill loss_N; returns the number of hits."""
    num_correct = torch.zeros((), dtype=torch.int64, device=logits_NV.device)
    rows_fp32 = torch.empty(
        _SOFTMAX_ROWS, logits_NV.shape[1], dtype=torch.float32, device=logits_NV.device
    )
    for start in range(0, logits_NV.shape[0], _SOFTMAX_ROWS):
        logits = logits_NV[start : start + _SOFTMAX_ROWS]
        targets = targets_N[start : start + _SOFTMAX_ROWS, None]
        z = rows_fp32[: logits.shape[0]].copy_(logits)
        z_max, z_target = z.amax(dim=-1), z.gather(1, targets).squeeze(1)
        # torch's argmax is 10 times slower than amax on CPU: only a hit may need it, for a tie.
        hits = z_target == z_max
        num_correct += (z[hits].argmax(dim=-1) == targets[hits, 0]).sum()
        torch.softmax(z, dim=-1, out=z)
        # The largest probability is 1 / sum(exp(z - z_max)).
        loss = z_max - z.amax(dim=-1).log() - z_target
        loss_N[start : start + _SOFTMAX_ROWS] = loss
        logits.copy_(z)
        # p - 1 from the loss: exact also where p rounds to 1 in logits' dtype.
        logits.scatter_(1, targets, torch.expm1(-loss).to(logits.dtype).unsqueeze(1))
    return num_correct
