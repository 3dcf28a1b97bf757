"""Which implementation an op takes, and that both take the same arguments."""

import importlib
import inspect

import pytest
import torch

from flexft_kernels import ops

OPS = [name for name, op in vars(ops).items() if hasattr(op, "__wrapped__")]


@pytest.mark.parametrize("name", OPS)
def test_the_triton_twin_takes_the_plain_ops_arguments(name):
    pytest.importorskip("triton")
    plain = getattr(ops, name).__wrapped__
    twin = getattr(importlib.import_module(f"{plain.__module__}_triton"), name)
    theirs, ours = (inspect.signature(op).parameters for op in (plain, twin))
    tuning = {"tiles", "cross_entropy"}
    assert [p for p in ours.values() if p.name not in tuning] == [
        p for p in theirs.values() if p.name not in tuning
    ]


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU: what an op does with it is not asked here."""

    is_cuda = True


def spied(half_only, monkeypatch):
    """An op by device, and the list of which implementation was called."""
    called = []

    def plain(x):
        called.append("plain")

    twin = type("module", (), {"plain": staticmethod(lambda x: called.append("triton"))})
    monkeypatch.setattr(ops, "import_module", lambda name: twin)
    return ops._by_device(plain, half_only=half_only), called


@pytest.mark.parametrize("half_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_tensors_device_decides(dtype, half_only, monkeypatch):
    op, called = spied(half_only, monkeypatch)
    op(torch.zeros(1, dtype=dtype))
    op(torch.zeros(1, dtype=dtype).as_subclass(OnGPU))
    op(torch.zeros(1, dtype=dtype))
    plain_on_gpu = half_only and dtype == torch.float32
    assert called == ["plain", "plain" if plain_on_gpu else "triton", "plain"]
