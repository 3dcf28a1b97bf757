"""What the tests of the ops share: seeds, sizes, and how close is close.

Every op is compared with float64 autograd of an expression written in torch.nn.functional, on the
same (rounded) inputs, by the largest error over the largest value.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from harness.triton_interpreter import INTERPRETED, mend
from torch import Tensor

# Triton kernels run on a GPU, or in the process that test_triton_interpreter.py starts.
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*_triton.py"]
if INTERPRETED:
    mend()

# fp32: some tens of roundings of 2⁻²⁴. Half precision: two roundings of the result, of 2⁻⁹ (bf16)
# and 2⁻¹² (fp16), relative to the element and so less to the largest.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: the GPU, or the interpreter's CPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def max_rel() -> Callable[[Tensor, Tensor], float]:
    """Largest error of a tensor over the largest value of its float64 reference."""

    def max_rel(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        return float(error)

    return max_rel


@pytest.fixture
def close(
    max_rel: Callable[[Tensor, Tensor], float],
) -> Callable[[Tensor, Tensor, torch.dtype], None]:
    """Assert that an op's result is as near its float64 reference as `dtype` allows."""

    def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        assert max_rel(actual, expected) <= TOLERANCE[dtype]

    return close
