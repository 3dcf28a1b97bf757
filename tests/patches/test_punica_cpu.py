"""Segment-GEMM LoRA on CPU against a float64 reference, token by token."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers.utils import LoRAMapping

from flexft_patches import punica_cpu
from flexft_patches.punica_cpu import Segment, SegmentPunicaWrapperCPU, segments_of

MAX_RANK, MAX_TOKENS = 16, 256
# Largest difference, relative to the largest entry of the reference.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def make_wrapper(lora_ids, slots, prompt_ids=()):
    """A wrapper for a batch whose tokens have these adapter ids; `slots[i]` is the id in slot i."""
    wrapper = SegmentPunicaWrapperCPU(MAX_TOKENS, MAX_TOKENS, "cpu")
    mapping = LoRAMapping(
        index_mapping=tuple(lora_ids), prompt_mapping=tuple(prompt_ids), is_prefill=True
    )
    wrapper.update_metadata(mapping, slots, len(slots) + 1, 1000)
    return wrapper


def make_weights(slots, width_in, widths_out, ranks, dtype, seed=0):
    """Stacked A and B as vLLM allocates them: zero beyond a slot's rank."""
    g = torch.Generator().manual_seed(seed)
    lora_a, lora_b = [], []
    for width in widths_out:
        a = torch.zeros(slots, 1, MAX_RANK, width_in, dtype=dtype)
        b = torch.zeros(slots, 1, width, MAX_RANK, dtype=dtype)
        for slot, rank in enumerate(ranks):
            a[slot, 0, :rank] = torch.randn(rank, width_in, generator=g).to(dtype)
            b[slot, 0, :, :rank] = torch.randn(width, rank, generator=g).to(dtype)
        lora_a.append(a)
        lora_b.append(b)
    return tuple(lora_a), tuple(lora_b)


def reference(y, x, lora_a, lora_b, lora_ids, slots, scale):
    """y + x A^T B^T * scale in float64, one token at a time."""
    out = y.double().clone()
    for token, lora_id in enumerate(lora_ids):
        if lora_id > 0:
            slot, column = slots.index(lora_id), 0
            for a, b in zip(lora_a, lora_b, strict=True):
                term = b[slot, 0].double() @ (a[slot, 0].double() @ x[token].double()) * scale
                out[token, column : column + len(term)] += term
                column += len(term)
    return out


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    lora_ids=st.lists(st.sampled_from([0, 7, 9, 12]), min_size=1, max_size=40),
    widths_out=st.lists(st.integers(1, 33), min_size=1, max_size=3),
    ranks=st.tuples(*[st.integers(0, MAX_RANK)] * 3),
    seed=st.integers(0, 99),
)
def test_linear_equals_float64_reference(dtype, scale, lora_ids, widths_out, ranks, seed):
    slots = [9, 12, 7]
    lora_a, lora_b = make_weights(3, 31, widths_out, ranks, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lora_ids), 31, generator=g).to(dtype)
    y = torch.randn(len(lora_ids), sum(widths_out), generator=g).to(dtype)
    expected = reference(y, x, lora_a, lora_b, lora_ids, slots, scale)
    make_wrapper(lora_ids, slots).add_lora_linear(y, x, lora_a, lora_b, scale, tuple(widths_out))
    assert relative_error(y, expected) < TOLERANCE[dtype]


def test_rows_without_an_adapter_are_bit_identical_with_all_slots_full():
    lora_a, lora_b = make_weights(2, 32, [24], [16, 16], torch.bfloat16)
    x, y = torch.randn(6, 32).bfloat16(), torch.randn(6, 24).bfloat16()
    before = y.clone()
    lora_ids = [0, 0, 5, 6, 0, 5]
    make_wrapper(lora_ids, [5, 6]).add_lora_linear(y, x, lora_a, lora_b, 1.0, (24,))
    assert torch.equal(y[[0, 1, 4]], before[[0, 1, 4]])
    assert not torch.equal(y[[2, 3, 5]], before[[2, 3, 5]])


def test_batch_without_adapters_is_bit_identical_and_reads_no_weights():
    y = torch.randn(4, 8)
    before = y.clone()
    unreadable = (torch.full((1, 1, MAX_RANK, 8), torch.nan),)
    make_wrapper([0] * 4, [3]).add_lora_linear(y, y, unreadable, unreadable, 1.0, (8,))
    assert torch.equal(y, before)


def written_in_place(a):
    a[0, 0, :3] = 2.0


def written_through_a_view(a):
    a[0, 0].narrow(0, 0, 3).copy_(torch.full((3, 8), 2.0))


def written_in_inference_mode(a):
    with torch.inference_mode():
        a[0, 0, :3].fill_(2.0)


def written_by_foreach(a):
    torch._foreach_copy_([a[0, 0, :3]], [torch.full((3, 8), 2.0)])


@pytest.mark.parametrize(
    "write",
    [written_in_place, written_through_a_view, written_in_inference_mode, written_by_foreach],
)
def test_weights_written_between_two_steps_are_seen(write):
    lora_a, lora_b = make_weights(1, 8, [8], [0], torch.float32)
    wrapper = make_wrapper([1], [1])
    x = torch.ones(1, 8)
    wrapper.add_lora_linear(torch.zeros(1, 8), x, lora_a, lora_b, 1.0, (8,))
    write(lora_a[0])
    lora_b[0][0, 0, :, :3] = 1.0
    y = torch.zeros(1, 8)
    wrapper.add_lora_linear(y, x, lora_a, lora_b, 1.0, (8,))
    assert torch.equal(y, torch.full((1, 8), 3 * 8 * 2.0))


def test_logits_use_the_adapter_of_each_sampled_request():
    lora_a, lora_b = make_weights(2, 16, [40], [4, 8], torch.float32)
    x, y = torch.randn(3, 16), torch.randn(3, 40)
    expected = reference(y, x, lora_a, lora_b, [6, 0, 5], [5, 6], 1.0)
    wrapper = make_wrapper([5] * 9, [5, 6], prompt_ids=[6, 0, 5])
    wrapper.add_lora_logits(y, x, lora_a[0], lora_b[0], 1.0)
    assert relative_error(y, expected) < TOLERANCE[torch.float32]


def test_logits_narrower_than_the_padded_vocabulary_take_its_first_columns():
    lora_a, lora_b = make_weights(1, 16, [40], [4], torch.float32)
    x, y = torch.randn(1, 16), torch.zeros(1, 37)
    expected = reference(torch.zeros(1, 40), x, lora_a, lora_b, [5], [5], 1.0)
    make_wrapper([5], [5], prompt_ids=[5]).add_lora_logits(y, x, lora_a[0], lora_b[0], 1.0)
    assert relative_error(y, expected[:, :37]) < TOLERANCE[torch.float32]


def test_embedding_adds_b_times_the_looked_up_rows_of_a():
    _, (lora_b,) = make_weights(2, 16, [24], [4, 8], torch.float32)
    x, y = torch.randn(3, MAX_RANK), torch.randn(3, 24)
    expected = y.double().clone()
    expected[1] += lora_b[1, 0].double() @ x[1].double()
    make_wrapper([0, 6, 0], [5, 6]).add_lora_embedding(y, x, lora_b)
    assert relative_error(y, expected) < TOLERANCE[torch.float32]


def test_segments_join_equal_neighbours_and_leave_out_rows_without_an_adapter():
    assert segments_of([7, 7, 0, 7, 9], {7: 1, 9: 0}) == (
        Segment(0, 2, 1),
        Segment(3, 4, 1),
        Segment(4, 5, 0),
    )


def test_vllm_selects_the_segment_wrapper_once_it_is_installed():
    from vllm.lora.punica_wrapper import get_punica_wrapper

    from flexft_patches import punica_cpu

    punica_cpu.install()
    wrapper = get_punica_wrapper(8, max_batches=8, device="cpu", lora_config=None)
    assert isinstance(wrapper, SegmentPunicaWrapperCPU)


class _Linear(torch.nn.Module):
    """As vLLM's LoRA layers call the wrapper."""

    def __init__(self, wrapper, lora_a, lora_b, slices):
        super().__init__()
        self.base = torch.nn.Linear(lora_a[0].shape[-1], sum(slices), bias=False)
        self.punica_wrapper, self.output_slices = wrapper, slices
        self.lora_a_stacked, self.lora_b_stacked = lora_a, lora_b

    def forward(self, x):
        y = self.base(x)
        self.punica_wrapper.add_lora_linear(
            y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return torch.relu(y)


def test_compiled_code_takes_the_adapters_of_each_step_from_the_engine_that_runs():
    """One compiled model; the segments change between two steps, and with the engine."""
    lora_a, lora_b = make_weights(2, 8, [6, 6], [3, 3], torch.float32)
    first, second = make_wrapper([1, 1, 0, 2], [1, 2]), make_wrapper([0, 2, 2, 2], [1, 2])
    model = _Linear(first, lora_a, lora_b, (6, 6)).requires_grad_(False)
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        plain = torch.relu(model.base(x))
        assert torch.equal(compiled(x), plain), "no engine is named"
        for wrapper in (first, second):
            model.punica_wrapper = wrapper
            expected = model(x)
            assert not torch.equal(expected, plain)
            model.punica_wrapper = first
            layer = SimpleNamespace(
                punica_wrapper=wrapper, output_slices=(6, 6),
                lora_a_stacked=lora_a, lora_b_stacked=lora_b,
            )  # fmt: skip
            manager = SimpleNamespace(modules={"linear": layer})
            with punica_cpu.in_use(SimpleNamespace(_adapter_manager=manager)):
                torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(compiled(x), plain)
