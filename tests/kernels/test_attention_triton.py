import pytest
import torch
from harness.attention_case import error, sequence

from flexft_kernels import attention
from flexft_kernels.attention import KeysValues
from flexft_kernels.attention_triton import Tiles, attention_backward_varlen

# P and dS are rounded before their GEMMs, and the result after: 2⁻⁹ each in bf16, 2⁻¹² in fp16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}
# The smallest tiles that a tensor core takes: tiny shapes have several of them.
SMALL = (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
WIDE = (Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1))


def backward(case, device, *, cut, tiles=SMALL, use_out=False):
    """Gradients of one sequence from two windows, the later one first."""
    q, k, v, dout, out = (x.to(device) for x in (case.q, case.k, case.v, case.dout, case.out))
    dk, dv = torch.zeros(2, *k.shape, device=device)
    dq = torch.full_like(q, torch.nan)
    for start, stop in ((cut, len(q)), (0, cut)):
        rows = slice(start, stop)
        if start < stop:
            dq[rows] = attention_backward_varlen(
                dout[rows],
                q[rows],
                KeysValues(k, v, dk, dv),
                out[rows] if use_out else None,
                [(0, stop - start, 0, start)],
                scale=case.scale,
                sliding_window=case.sliding_window,
                tiles=tiles,
            )
    assert dq.dtype == q.dtype
    return dq.cpu(), dk.cpu(), dv.cpu()


@pytest.mark.parametrize(
    ("shape", "sliding_window", "cut", "use_out"),
    [
        ((1, 1, 1, 2), None, 0, False),
        ((19, 4, 1, 8), 5, 7, True),
        ((29, 6, 2, 17), None, 11, False),
        ((37, 3, 3, 24), 17, 20, False),
        ((37, 3, 3, 24), None, 0, True),
    ],
    ids=str,
)
def test_two_windows_are_autograd_of_the_whole(shape, sliding_window, cut, use_out, dtype, device):
    case = sequence(*shape, sliding_window, dtype)
    grads = backward(case, device, cut=cut, use_out=use_out)
    assert error(case, grads) <= TOLERANCE[dtype]


@pytest.mark.parametrize("sliding_window", [None, 13])
def test_the_size_of_tiles_changes_rounding_only(sliding_window, device):
    case = sequence(41, 6, 2, 8, sliding_window)
    assert error(case, backward(case, device, cut=17, tiles=WIDE)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_as_launched(head_dim, device):
    case = sequence(5, 2, 1, head_dim, None, torch.bfloat16)
    assert error(case, backward(case, device, cut=2, tiles=None)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_blocks_of_a_cache_in_any_order_are_the_sequences(sliding_window, device):
    """Three sequences in a window, the second begun before it; what no query sees is NaN."""
    lengths, q_starts, block_size, width = [9, 21, 3], [0, 8, 0], 4, 6
    cases = [sequence(n, 4, 2, 8, sliding_window, seed=n) for n in lengths]
    pool = torch.randperm(20).tolist()
    cache = torch.full((20, 2, block_size, 16), torch.nan)  # (B, K, N, 2E)
    k_cache, v_cache = cache.permute(0, 2, 1, 3).split(8, dim=-1)
    table = torch.full((3, width), 19, dtype=torch.int32)
    segments, row, key = [], 0, 0
    for i, (case, length, q_start) in enumerate(zip(cases, lengths, q_starts, strict=True)):
        for position in range(length):
            if position % block_size == 0:
                table[i, position // block_size] = pool.pop()
            if position > (-1 if sliding_window is None else q_start - sliding_window):
                block, slot = table[i, position // block_size], position % block_size
                k_cache[block, slot], v_cache[block, slot] = case.k[position], case.v[position]
        segments.append((row, row + length - q_start, key, q_start))
        row, key = row + length - q_start, key + length
    tails = [slice(q_start, None) for q_start in q_starts]
    q, dout = (
        torch.cat([getattr(c, name)[tail] for c, tail in zip(cases, tails, strict=True)])
        for name in ("q", "dout")
    )
    rest = {"scale": cases[0].scale, "sliding_window": sliding_window}
    sums = torch.full((2, key, 2, 8), 7.0)  # added to, where a key is seen
    expected = sums.clone()
    expected_dq = attention.attention_backward_varlen(
        dout, q, KeysValues(k_cache, v_cache, *expected, table), None, segments, **rest
    )
    cache, sums = cache.to(device), sums.to(device)
    k_cache, v_cache = cache.permute(0, 2, 1, 3).split(8, dim=-1)
    kv = KeysValues(k_cache, v_cache, *sums, table.to(device))
    dq = attention_backward_varlen(
        dout.to(device), q.to(device), kv, None, segments, tiles=SMALL, **rest
    )
    torch.testing.assert_close(dq.cpu(), expected_dq, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(sums.cpu(), expected, atol=4e-6, rtol=2e-6)
    # Of the reference: the sequence that is whole in the window has autograd's gradients.
    torch.testing.assert_close(expected_dq[:9].double(), cases[0].grads[0], atol=2e-6, rtol=2e-6)


def test_rows_of_no_segment_get_a_zero_gradient(device):
    q = torch.randn(7, 2, 16, device=device)
    k, v, dk, dv = torch.randn(4, 7, 1, 16, device=device)
    kv = KeysValues(k, v, dk, dv)
    dq = attention_backward_varlen(q, q, kv, None, [(2, 5, 0, 0)], scale=1.0, tiles=SMALL)
    assert bool((dq[:2] == 0).all())
    assert bool((dq[5:] == 0).all())
    assert bool((dq[2:5] != 0).any())
