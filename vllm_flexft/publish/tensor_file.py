"""safetensors files written as a stream: no second copy in memory, and the sum comes for free.

Format: 8 bytes little-endian length N, N bytes of JSON header, then the raw tensors.
Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Tensors are laid out at multiples of 8 bytes of the file, as safetensors' own writer does.
_ALIGN = 8


def safetensors_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a .safetensors file that holds `tensors` (any device, any strides).

    Metadata is {"format": "pt"}, which transformers and PEFT write.
    """
    # Widest elements first, then by name: every tensor is then aligned to its element size.
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())
