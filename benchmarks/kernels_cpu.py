"""Times the backward ops on CPU against autograd of the expressions that transformers and PEFT use.

    OMP_NUM_THREADS=2 python -m benchmarks.kernels_cpu [--seconds 0.3] [--only attention]

Shapes are those of a 160M Llama: D = 768, F = 2048, H = 12, K = 4, E = 64, V = 32000, R = 8. Every
time is the best of as many runs as fit `--seconds`; op and baseline take turns. "x" is the
baseline's time over the op's. The machine must be idle otherwise: with more than one thread,
OpenMP threads that wait for a descheduled one can make an op of many short calls 100 times slower.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexft_kernels.attention import KeysValues, attention_backward
from flexft_kernels.linear_cross_entropy import linear_cross_entropy
from flexft_kernels.lora import Lora, lora_backward
from flexft_kernels.rms_norm import rms_norm, rms_norm_backward
from flexft_kernels.rope import rope_backward
from flexft_kernels.silu_mul import silu_mul, silu_mul_backward

D, F_, H, K, E, V, R, EPS = 768, 2048, 12, 4, 64, 32000, 8, 1e-5


@dataclass(frozen=True)
class Case:
    """One op at one shape: `work` in bytes or FLOP, and the op that it is measured against."""

    name: str
    work: float
    unit: str
    op: Callable[[], object]
    baseline: Callable[[], object] | None = None


def backward_of(output: Tensor, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def rms_norm_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    x, dy = randn(tokens, D, dtype=dtype), randn(tokens, D, dtype=dtype)
    weight = randn(D, dtype=dtype)

    def llama_rms_norm(x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * x32.to(dtype)

    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = llama_rms_norm(leaf)
    size = x.nbytes
    yield Case("rms_norm", 2 * size, "GB/s", lambda: rms_norm(x, weight, EPS))
    yield Case(
        "rms_norm_backward",
        3 * size,
        "GB/s",
        lambda: rms_norm_backward(dy, x, weight, EPS),
        backward_of(y, [leaf], dy),
    )


def rope_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    dy = randn(tokens, H, E, dtype=dtype)
    angles = torch.rand(tokens, E // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cos_sin = torch.cat((cos, sin), dim=-1)
    cos2, sin2 = (torch.cat((c, c), dim=-1)[:, None] for c in (cos, sin))
    with torch.enable_grad():
        leaf = dy.clone().requires_grad_()
        x1, x2 = leaf.chunk(2, dim=-1)
        y = leaf * cos2 + torch.cat((-x2, x1), dim=-1) * sin2
    yield Case(
        "rope_backward",
        2 * dy.nbytes,
        "GB/s",
        lambda: rope_backward(dy, cos_sin),
        backward_of(y, [leaf], dy),
    )


def silu_mul_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    gate_up, dact = randn(tokens, 2 * F_, dtype=dtype), randn(tokens, F_, dtype=dtype)
    out = torch.empty_like(gate_up)
    with torch.enable_grad():
        gate, up = (x.clone().requires_grad_() for x in gate_up.chunk(2, dim=-1))
        y = F.silu(gate) * up
    size = dact.nbytes
    yield Case("silu_mul", 3 * size, "GB/s", lambda: silu_mul(gate_up))
    yield Case(
        "silu_mul_backward",
        5 * size,
        "GB/s",
        lambda: silu_mul_backward(dact, gate_up, out=out),
        backward_of(y, [gate, up], dact),
    )


def attention_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    for q_start in (0, 2 * tokens, 2048 - tokens):
        stop = q_start + tokens
        q, dout = randn(tokens, H, E, dtype=dtype), randn(tokens, H, E, dtype=dtype)
        k, v = randn(stop, K, E, dtype=dtype), randn(stop, K, E, dtype=dtype)
        kv = KeysValues(k, v, torch.zeros(stop, K, E), torch.zeros(stop, K, E))
        with torch.enable_grad():
            leaves = [x.transpose(0, 1)[None].clone().requires_grad_() for x in (q, k, v)]
            mask = torch.ones(tokens, stop, dtype=torch.bool).tril(q_start) if q_start else None
            y = F.scaled_dot_product_attention(
                *leaves, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        yield Case(
            f"attention_backward S={stop}",
            5 * 2 * H * E * (tokens * q_start + tokens**2 / 2),
            "GFLOP/s",
            lambda q=q, kv=kv, dout=dout, q_start=q_start: attention_backward(
                dout, q, kv, q_start=q_start, scale=E**-0.5
            ),
            backward_of(y, leaves, dout.transpose(0, 1)[None]),
        )


def cross_entropy_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    h, weight = randn(tokens, D, dtype=dtype), randn(V, D, dtype=dtype) * 0.02
    targets = torch.randint(V, (tokens,))
    workspace = torch.empty(256, V, dtype=dtype)
    leaf = h.clone().requires_grad_()

    def baseline() -> object:
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(leaf, weight).float(), targets)
        return torch.autograd.grad(loss, leaf)

    yield Case(
        "linear_cross_entropy",
        2 * 2 * tokens * D * V,
        "GFLOP/s",
        lambda: linear_cross_entropy(h, weight, targets, 1 / tokens, workspace=workspace),
        baseline,
    )
    yield Case(
        "  without gradient",
        2 * tokens * D * V,
        "GFLOP/s",
        lambda: linear_cross_entropy(h, weight, targets, 1.0, need_grad=False, workspace=workspace),
    )


def lora_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    for width_in, width_out in ((D, D), (D, F_), (F_, D)):
        x, dy = randn(tokens, width_in, dtype=dtype), randn(tokens, width_out, dtype=dtype)
        a, b = randn(R, width_in, dtype=dtype), randn(width_out, R, dtype=dtype)
        dx = torch.zeros_like(x)
        lora = Lora(a, b, torch.zeros(a.shape), torch.zeros(b.shape), 2.0)
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]
            y = F.linear(F.linear(leaves[0], leaves[1]), leaves[2]) * 2.0
        yield Case(
            f"lora_backward {width_in}->{width_out}",
            2 * tokens * R * (2 * width_out + 3 * width_in),
            "GFLOP/s",
            lambda x=x, dy=dy, lora=lora, dx=dx: lora_backward(dy, x, lora, dx),
            backward_of(y, leaves, dy),
        )


def gemm_cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    """The frozen linears, with weights as they are stored, (out, in) row-major, and transposed."""
    for width_in, width_out in ((D, F_), (F_, D)):
        weight = randn(width_out, width_in, dtype=dtype)
        weight_t = weight.t().contiguous()
        x, dy = randn(tokens, width_in, dtype=dtype), randn(tokens, width_out, dtype=dtype)
        flop = 2 * tokens * width_in * width_out
        shape = f"{width_in}->{width_out}"
        yield Case(f"x @ W.T {shape}", flop, "GFLOP/s", lambda x=x, w=weight: x @ w.t())
        yield Case(
            f"dy @ W {shape}",
            flop,
            "GFLOP/s",
            lambda dy=dy, w=weight: dy @ w,
            lambda dy=dy, w=weight_t: dy @ w.t(),
        )


def best_times(case: Case, seconds: float) -> list[float]:
    """Best wall time in seconds of the op and, if there is one, the baseline."""
    functions = [case.op] if case.baseline is None else [case.op, case.baseline]
    best = [float("inf")] * len(functions)
    deadline = time.perf_counter() + seconds * len(functions)
    runs = 0
    while runs < 4 or time.perf_counter() < deadline:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
        runs += 1
    return best


GROUPS = {
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "silu_mul": silu_mul_cases,
    "attention": attention_cases,
    "cross_entropy": cross_entropy_cases,
    "lora": lora_cases,
    "gemm": gemm_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    parser.add_argument("--only", choices=GROUPS, help="one group of ops")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in args.tokens:
            print(f"\n{str(dtype).removeprefix('torch.')}, {tokens} tokens")
            for group in [args.only] if args.only else GROUPS:
                for case in GROUPS[group](tokens, dtype):
                    with torch.no_grad():
                        op, *baseline = best_times(case, args.seconds)
                    line = f"  {case.name:30} {op * 1e3:9.3f} ms {case.work / op / 1e9:8.1f} "
                    line += f"{case.unit:8}"
                    if baseline:
                        line += f" baseline {baseline[0] * 1e3:9.3f} ms {baseline[0] / op:6.2f} x"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
