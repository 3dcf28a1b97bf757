"""A job's LoRA gradients on a GPU, through the whole engine, equal PEFT's on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.gradients import Case, GradientBench, Row

# Five long rows of different text and scaling 1, as in training: what bf16 rounds off averages out.
ROWS = tuple(Row(9000 * i, (1, 250, 700)[i % 3], 900) for i in range(5))
CASE = Case(ROWS, rank=16, alpha=16, completion_only_loss=False, budgets=(300.0, 99.0))


def test_bf16_gradients_equal_pefts(make, tmp_path, engine_options, record_property):
    bench = GradientBench(make("bfloat16"), tmp_path, dtype="bfloat16", **engine_options)
    worst = bench.measure(CASE).worst(torch.bfloat16)
    record_property("largest error of a bf16 gradient", worst)
    assert worst <= 4e-2


def test_fp32_gradients_equal_pefts(
    make, tmp_path, engine_options, on_gpu, monkeypatch, record_property
):
    """vLLM's LoRA kernels for GPUs take no fp32: its forward takes torch's GEMMs in their place."""
    if on_gpu:
        serve_fp32(monkeypatch)
        engine_options["enforce_eager"] = True
    bench = GradientBench(make("float32"), tmp_path, **engine_options)
    worst = bench.measure(CASE).worst()
    record_property("largest error of an fp32 gradient", worst)
    assert worst <= 1e-4


def serve_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from vllm_flexft import support

    def wrapper(cls: Any) -> str:
        return "flexft_patches.punica_cpu.SegmentPunicaWrapperCPU"

    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(wrapper))
    monkeypatch.setattr(support, "CUDA_DTYPES", support.DTYPES)
    assert not torch.backends.cuda.matmul.allow_tf32
