"""LoRA on CPU: the stock punica wrapper against ours, paired in the same run.

    OMP_NUM_THREADS=2 python benchmarks/punica_cpu.py

Prints microseconds of one `add_lora_linear` for a merged q, k, v projection, median of alternating
runs, and their ratio. `1 adapter` is a training chunk or one tenant, `8 adapters` a decode batch.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from flexft_patches.punica_cpu import SegmentPunicaWrapperCPU

HIDDEN, KV, RANK, MAX_RANK, SLOTS = 768, 256, 8, 16, 9
SLICES = (HIDDEN, KV, KV)
# (adapters, tokens): runs of equal length, one an adapter
CASES = ((1, 1), (1, 8), (1, 64), (1, 512), (8, 8), (8, 64), (8, 512))
REPEATS = 15


def make(cls: type, lora_ids: list[int]) -> PunicaWrapperCPU:
    """A wrapper of class `cls`, ready for a prefill batch with these adapter ids."""
    wrapper = cls(1024, 1024, "cpu")
    mapping = LoRAMapping(tuple(lora_ids), tuple(sorted(set(lora_ids))), is_prefill=True)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, 1000)
    return wrapper


def paired(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, timed in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS + 2):
        for function, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return median(times[0][2:]), median(times[1][2:])  # two warm-up rounds


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    print("              dtype adapters tokens  stock us  ours us  ratio")
    for dtype in (torch.float32, torch.bfloat16):
        lora_a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, HIDDEN, dtype=dtype) for _ in SLICES)
        lora_b = tuple(torch.zeros(SLOTS, 1, n, MAX_RANK, dtype=dtype) for n in SLICES)
        for a, b in zip(lora_a, lora_b, strict=True):
            a[:, :, :RANK].normal_()
            b[..., :RANK].normal_()
        for adapters, tokens in CASES:
            lora_ids = [1 + t * adapters // tokens for t in range(tokens)]
            x = torch.randn(tokens, HIDDEN).to(dtype)
            y = torch.randn(tokens, sum(SLICES)).to(dtype)
            call = (y, x, lora_a, lora_b, 1.0, SLICES)
            runs = [
                partial(make(cls, lora_ids).add_lora_linear, *call)
                for cls in (PunicaWrapperCPU, SegmentPunicaWrapperCPU)
            ]
            stock, ours = paired(*runs)
            name = str(dtype).removeprefix("torch.")
            print(
                f"{name:>19} {adapters:8} {tokens:6} {stock * 1e6:9.0f} {ours * 1e6:8.0f}"
                f" {stock / ours:6.1f}"
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
