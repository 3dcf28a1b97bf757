import pytest
import torch

from flexft_kernels import rows, rows_triton


@pytest.mark.parametrize("op", [rows, rows_triton], ids=["plain", "triton"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 47, 1031])
def test_named_rows_are_copied_and_no_others(op, index_dtype, width, dtype, device):
    source = torch.randn(11, width + 3).to(device, dtype)
    target = torch.full((9, width), 7.0, dtype=dtype, device=device)
    read, write = [3, -1, 10, 5, 0], [8, 2, 0, -1, 4]
    indices = [torch.tensor(x, dtype=index_dtype, device=device) for x in (read, write)]
    op.copy_rows(source, indices[0], target, indices[1])
    copied = {8: 3, 0: 10, 4: 0}
    for row in range(9):
        expected = source[copied[row], :width] if row in copied else torch.full_like(target[0], 7)
        assert torch.equal(target[row], expected)


def test_rows_are_converted_to_the_targets_dtype(device):
    source, target = torch.randn(3, 17, device=device), torch.zeros(3, 17, device=device).bfloat16()
    index = torch.arange(3, device=device)
    rows_triton.copy_rows(source, index, target, index)
    assert torch.equal(target, source.bfloat16())
