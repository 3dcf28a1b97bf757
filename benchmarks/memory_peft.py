"""PEFT's side of benchmarks/memory.py: one training step of transformers + peft on one sequence."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_bytes import LiveBytes

LORA = {"r": 16, "lora_alpha": 32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftSide:
    """bf16, sdpa attention, AdamW; random tokens, all of them targets."""

    def __init__(self, model_dir: Path, checkpointing: bool) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **LORA)
        self._model = get_peft_model(base, lora)
        self._model.train()
        if checkpointing:
            self._model.enable_input_require_grads()
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self._vocab = base.config.vocab_size

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        ids = torch.randint(0, self._vocab, (1, request["length"]))
        return self._bytes(ids) if request["do"] == "bytes" else self._step(ids)

    def _bytes(self, ids: torch.Tensor) -> dict[str, Any]:
        """`kept`: live after the layers' forward, without the loss head; `peak`: of the step."""
        with LiveBytes() as tracker:
            inner: Any = self._model.base_model
            hidden = inner.model.model(input_ids=ids, use_cache=False).last_hidden_state
            kept = tracker.total
            del hidden
            before = tracker.peak = tracker.total
            self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            peak = tracker.peak - before
        self._optimizer.zero_grad()
        return {"kept": kept, "peak": peak}

    def _step(self, ids: torch.Tensor) -> dict[str, Any]:
        started = time.perf_counter()
        self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"seconds": time.perf_counter() - started}
