"""vllm_flexft/publish/tensor_file.py against safetensors' own reader and writer."""

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.publish.tensor_file import _DTYPES, safetensors_chunks

shapes = st.lists(st.integers(0, 5), max_size=3)
specs = st.dictionaries(
    st.text("abAB.é_0", max_size=12), st.tuples(st.sampled_from(list(_DTYPES)), shapes), max_size=6
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(specs)
def test_safetensors_reads_back_what_was_written(spec) -> None:
    torch.manual_seed(0)
    tensors = {n: (torch.randn(shape) * 9).to(dtype) for n, (dtype, shape) in spec.items()}
    data = b"".join(safetensors_chunks(tensors))
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_bytes_are_those_of_safetensors_itself() -> None:
    tensors = {n: torch.randn(3, 5) for n in ("b", "a", "c")}
    theirs = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert b"".join(safetensors_chunks(tensors)) == theirs


def test_strided_views_are_written_as_they_look() -> None:
    tensor = torch.arange(24.0).view(4, 6).t()[1:4:2]
    data = b"".join(safetensors_chunks({"x": tensor}))
    assert torch.equal(safetensors.torch.load(data)["x"], tensor)
