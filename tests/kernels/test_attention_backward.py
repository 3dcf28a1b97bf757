import pytest
import torch
from harness.attention_case import error, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from flexft_kernels import attention as module
from flexft_kernels.attention import KeysValues, attention_backward, attention_backward_varlen

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def in_windows(case, borders, *, forget_dk_of=None, shift=None):
    """Gradients from windows taken last to first; `forget_dk_of` and `shift` break one of them."""
    dk, dv = torch.zeros(case.k.shape), torch.zeros(case.v.shape)
    dq = torch.empty_like(case.q)
    for i in reversed(range(len(borders) - 1)):
        start, stop = borders[i], borders[i + 1]
        rows = slice(start, stop)
        # Keys from the window's border on belong to windows done before, and are there too.
        dq[rows] = attention_backward(
            case.dout[rows],
            case.q[rows],
            KeysValues(case.k, case.v, dk.clone() if i == forget_dk_of else dk, dv),
            q_start=start - 1 if i == shift else start,
            scale=case.scale,
            sliding_window=case.sliding_window,
        )
    return dq, dk, dv


SHAPES = [(1, 1, 1, 2), (3, 2, 2, 17), (17, 4, 1, 8), (47, 6, 3, 16), (123, 12, 4, 64)]
SHAPES += [(257, 3, 3, 5)]  # (tokens, H, K, E): MHA, MQA, GQA


@pytest.mark.parametrize("sliding_window", [None, 1, 17, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_window_is_autograd(shape, sliding_window, dtype):
    case = sequence(*shape, sliding_window, dtype)
    dq, dk, dv = in_windows(case, [0, shape[0]])
    assert dq.dtype == dtype
    assert error(case, (dq, dk, dv)) <= TOLERANCE[dtype]


def test_sums_of_half_precision_windows_are_fp32(dtype):
    case = sequence(71, 6, 2, 16, None, dtype)
    _, dk, dv = in_windows(case, [0, 20, 47, 71])
    assert error(case, (case.grads[0], dk, dv)) <= TOLERANCE[torch.float32]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 70), max_size=5),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    sliding_window=st.sampled_from([None, 2, 5, 16, 70]),
    rows_at_once=st.sampled_from([1, 7, 128]),
    bytes_at_once=st.sampled_from([1, 1 << 22]),
)
def test_any_windows_last_to_first_add_up_to_the_whole(
    cuts, heads, sliding_window, rows_at_once, bytes_at_once
):
    case = sequence(71, *heads, 8, sliding_window)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_SCORE_ROWS", rows_at_once)
        patch.setattr(module, "_SCORE_BYTES", bytes_at_once)
        grads = in_windows(case, [0, *sorted(cuts), 71])
    assert error(case, grads) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("sliding_window", [None, 17])
@pytest.mark.parametrize(
    "broken", [{"forget_dk_of": 1}, {"forget_dk_of": 2}, {"shift": 1}], ids=str
)
def test_the_comparison_finds_a_forgotten_sum_and_a_shifted_border(broken, sliding_window):
    case = sequence(71, 6, 2, 8, sliding_window)
    assert error(case, in_windows(case, [0, 20, 47, 71])) <= TOLERANCE[torch.float32]
    assert error(case, in_windows(case, [0, 20, 47, 71], **broken)) > 1e-2


@pytest.mark.parametrize("off_by", [-1, 1])
def test_the_comparison_finds_a_sliding_window_off_by_one(off_by):
    right, wrong = (sequence(71, 6, 2, 8, window) for window in (17, 17 + off_by))
    assert error(right, in_windows(wrong, [0, 20, 47, 71])) > 1e-2


@pytest.mark.parametrize(("sliding_window", "first"), [(None, 0), (5, 26)])
def test_keys_that_no_query_sees_are_neither_read_nor_written(sliding_window, first):
    case = sequence(71, 4, 2, 8, sliding_window)
    rows, unseen = slice(30, 47), torch.ones(71, dtype=torch.bool)
    unseen[first:47] = False
    k, v = case.k.clone(), case.v.clone()
    k[unseen] = v[unseen] = torch.nan
    dk, dv = torch.full(k.shape, 7.0), torch.full(v.shape, 7.0)
    dq = attention_backward(
        case.dout[rows],
        case.q[rows],
        KeysValues(k, v, dk, dv),
        q_start=30,
        scale=case.scale,
        sliding_window=sliding_window,
    )
    assert all(bool(torch.isfinite(x).all()) for x in (dq, dk, dv))
    assert bool((dk[unseen] == 7.0).all())
    assert bool((dv[unseen] == 7.0).all())
    assert bool((dv[~unseen] != 7.0).all())


def test_views_of_a_cache_and_of_a_merged_projection_are_accepted():
    case = sequence(47, 4, 2, 8)
    cache = torch.stack((case.k, case.v)).permute(2, 1, 0, 3).contiguous()  # (K, S, 2, E)
    k, v = cache.permute(2, 1, 0, 3)
    q = torch.cat((torch.randn(47, 1, 8), case.q), dim=1)[:, 1:]
    dk, dv = torch.zeros(2, 47, 8).transpose(0, 1), torch.zeros(2, 47, 8).transpose(0, 1)
    dq = attention_backward(case.dout, q, KeysValues(k, v, dk, dv), q_start=0, scale=case.scale)
    assert error(case, (dq, dk, dv)) <= TOLERANCE[torch.float32]


def test_a_window_over_several_sequences_is_each_sequence_alone():
    lengths = [17, 47, 3]
    cases = [sequence(n, 4, 2, 8, 11, seed=n) for n in lengths]
    dout, q, k, v, out = (
        torch.cat([getattr(case, name) for case in cases])
        for name in ("dout", "q", "k", "v", "out")
    )
    dk, dv, dq = torch.zeros(k.shape), torch.zeros(v.shape), torch.empty_like(q)
    # Two windows of rows; the border cuts the second sequence at its token 23.
    windows = [
        (slice(40, 67), [(0, 24, 17, 23), (24, 27, 64, 0)]),
        (slice(0, 40), [(0, 17, 0, 0), (17, 40, 17, 0)]),
    ]
    for rows, segments in windows:
        dq[rows] = attention_backward_varlen(
            dout[rows],
            q[rows],
            KeysValues(k, v, dk, dv),
            out[rows],
            segments,
            scale=cases[0].scale,
            sliding_window=11,
        )
    parts = zip(*(x.split(lengths) for x in (dq, dk, dv)), strict=True)
    for case, grads in zip(cases, parts, strict=True):
        assert error(case, grads) <= TOLERANCE[torch.float32]


def test_it_runs_on_inference_tensors():
    with torch.inference_mode():
        q = torch.randn(17, 4, 8)
        k, v, dk, dv = torch.randn(4, 17, 2, 8)
        dq = attention_backward(q, q, KeysValues(k, v, dk, dv), q_start=0, scale=1.0)
    assert bool(torch.isfinite(dq).all())
