"""Keys and values read back from vLLM's paged cache are those that the forward wrote."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.gradients import Case, Row, tokens_of
from harness.peft_reference import PeftTrainer

from vllm_flexft.runner.kv_reader import CPU_LAYOUTS, _read_rows, kv_reader_for

# 35 to 350 tokens, written in uneven chunks: partial blocks, several blocks, several sequences.
CASE = Case(
    (Row(0, 60, 60), Row(300, 260, 300), Row(3000, 700, 800)), budgets=(90.0, 37.0), window=61
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("qwen2", "float32"),
        ("qwen3", "float32"),
        ("mistral", "float32"),
        ("llama", "bfloat16"),
    ],
)
def test_keys_and_values_read_back_are_those_of_transformers(family, dtype, bench, monkeypatch):
    """Those of every token, also of the ones that Mistral's sliding window has left behind."""
    from vllm_flexft.train.backward import MicroBatchBackward

    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    load = MicroBatchBackward._load_kv

    def record(self: Any, geometry: Any, fresh: bool) -> None:
        load(self, geometry, fresh)
        (layer,) = (layer.index for layer in self.model.layers if layer.attention is geometry)
        # the next layer's take their place
        seen[layer] = self._kv.k.clone(), self._kv.v.clone()

    monkeypatch.setattr(MicroBatchBackward, "_load_kv", record)
    bench = bench(family, dtype)
    bench.measure(CASE)
    for layer, expected in enumerate(keys_and_values(bench, getattr(torch, dtype))):
        for got, want in zip(seen[layer], expected, strict=True):
            error = (got.float() - want.float()).abs().max() / want.float().abs().max()
            assert error <= TOLERANCE[dtype], (layer, error)


def keys_and_values(bench: Any, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer K and V of all sequences, each (T, K, E), from transformers' own cache."""
    from transformers import DynamicCache

    reference = PeftTrainer(bench.model, CASE.peft(), dtype=dtype)
    reference.randomise(seed=1)  # the adapter that the job starts from
    caches = []
    for ids, _ in tokens_of(CASE, reference.tokenizer):
        cache = DynamicCache()  # without a config: it keeps more than the sliding window
        with torch.no_grad():
            reference.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        caches.append(cache)
    return [
        (
            torch.cat([cache.layers[layer].keys[0].transpose(0, 1) for cache in caches]),
            torch.cat([cache.layers[layer].values[0].transpose(0, 1) for cache in caches]),
        )
        for layer in range(len(caches[0].layers))
    ]


@pytest.mark.parametrize("isa", CPU_LAYOUTS)
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(2, 32, 64), (3, 128, 128), (1, 96, 32)])
def test_what_vllms_own_kernel_wrote_is_read_back_exactly(isa, heads, tokens, dim):
    from vllm import _custom_ops as ops

    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if isa == "amx" else torch.float32
    length = tokens + tokens // 2 + 5
    key, value = (torch.randn(length, heads, dim, generator=draw).to(dtype) for _ in range(2))
    cache = torch.zeros(5, heads, tokens, 2 * dim, dtype=dtype)
    halves = cache.view(5, heads, 2 * tokens, dim).chunk(2, dim=2)
    block_ids = torch.tensor([3, 1])
    slots = (block_ids[:, None] * tokens + torch.arange(tokens)).flatten()[:length]
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)
    k, v = CPU_LAYOUTS[isa](cache, block_ids)
    assert torch.equal(k[:length], key)
    assert torch.equal(v[:length], value)


def test_rows_of_a_cache_with_keys_beside_values_come_in_block_order():
    """The logical view of vLLM's CUDA backends: (blocks, heads, tokens, 2 x head dim)."""
    blocks, heads, tokens, dim = 5, 3, 4, 2
    cache = torch.arange(blocks * heads * tokens * 2 * dim).view(blocks, heads, tokens, 2 * dim)
    k, v = _read_rows(cache, torch.tensor([4, 1]))
    for i, (block, token) in enumerate((b, t) for b in (4, 1) for t in range(tokens)):
        assert torch.equal(k[i], cache[block, :, token, :dim])
        assert torch.equal(v[i], cache[block, :, token, dim:])


def test_a_quantised_cache_is_refused_with_the_flag_to_set():
    attention = SimpleNamespace(kv_cache_dtype="fp8_e4m3")
    with pytest.raises(ValueError, match=r"fp8_e4m3.*--kv-cache-dtype auto"):
        kv_reader_for(attention)


def test_an_unknown_cpu_layout_is_refused_with_the_known_ones():
    attention = SimpleNamespace(kv_cache_dtype="auto", kv_cache=torch.empty(0), isa="neon")
    with pytest.raises(ValueError, match=r"'neon'.*vec, vec16, amx"):
        kv_reader_for(attention)
