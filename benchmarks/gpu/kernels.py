"""Times every Triton kernel at Llama-3.1-8B's shapes, against plain torch and the GPU's ceiling.

    python -m benchmarks.gpu.kernels [--output FILE.json] [--only NAME]
    TRITON_INTERPRET=1 python -m benchmarks.gpu.kernels      # no GPU: tiny shapes, interpreted

The ceilings are measured in the same run: a copy of 1 GiB, and a GEMM of 8192³ in bf16. Times are
medians with a cold L2 cache (triton.testing.do_bench). Bytes and FLOP are what the op has to move
and to compute; what a kernel reads or computes twice counts once. The dry run's times mean nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.cases import LLAMA_8B, TINY, Case, all_cases


def seconds(op: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return triton.testing.do_bench(op, return_mode="median") * 1e-3
    start = time.perf_counter()
    op()
    return time.perf_counter() - start


def ceilings(device: str) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a GEMM."""
    big = device == "cuda"
    source = torch.empty(2**30 if big else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if big else 64
    a, b = torch.ones(2, n, n, dtype=torch.bfloat16, device=device)
    return {
        "bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), device),
        "flop_per_s": 2 * n**3 / seconds(lambda: a @ b, device),
    }


def measure(case: Case, ceiling: dict[str, float], device: str) -> dict[str, Any]:
    op, plain = seconds(case.op, device), seconds(case.plain, device)
    limit = max(case.num_bytes / ceiling["bytes_per_s"], case.flop / ceiling["flop_per_s"])
    return {
        "case": case.name,
        "seconds": op,
        "plain_seconds": plain,
        "bytes_per_s": case.num_bytes / op,
        "flop_per_s": case.flop / op,
        "of_ceiling": limit / op,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args()
    if torch.cuda.is_available():
        device, name, setup = "cuda", torch.cuda.get_device_name(), (LLAMA_8B, torch.bfloat16)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter has no bf16 GEMM.
        device, name, setup = "cpu", "interpreter", (TINY, torch.float32)
    else:
        raise SystemExit("no CUDA device; for a dry run on CPU set TRITON_INTERPRET=1")
    ceiling = ceilings(device)
    print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}: "
        f"{ceiling['bytes_per_s'] / 1e9:.0f} GB/s, {ceiling['flop_per_s'] / 1e12:.1f} TFLOP/s"
    )
    results = []
    for case in all_cases(*setup, device):
        if not case.name.startswith(args.only):
            continue
        r = measure(case, ceiling, device)
        results.append(r)
        print(
            f"{r['case']:32} {r['seconds'] * 1e6:10.1f} us {r['bytes_per_s'] / 1e9:8.0f} GB/s "
            f"{r['flop_per_s'] / 1e12:7.1f} TFLOP/s {r['of_ceiling']:6.1%} of the ceiling, "
            f"{r['plain_seconds'] / r['seconds']:6.2f} x plain torch",
            flush=True,
        )
    if args.output is not None:
        record = {
            "device": name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "ceiling": ceiling,
            "cases": results,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
