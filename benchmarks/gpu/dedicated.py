"""The dedicated trainer: transformers + peft + SDPA alone on the device, at its best batch size.

    python -m benchmarks.gpu.dedicated MODEL [--tiny] [--liger] [--checkpointing] [--steps N]

It makes the job's optimizer steps (workload.py) with micro-batches of each size, stops at the first
that runs out of memory, and prints the tokens a second of each as one line of JSON.

With --log FILE it trains until it is killed, beside a server on the same device: a line
{"time", "tokens"} after each update, below a first one {"micro_batch"}. --micro-batch is halved
until it fits --memory-share of the device. It waits for the device after each micro-batch, so that
no more than one is queued when it is stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.workload import LINEARS, LLAMA_8B, PEFT, TINY, Size


class DedicatedTrainer:
    """AdamW over LoRA on all linears, random weights, rows of one length: no padding."""

    def __init__(self, model: Path, size: Size, *, liger: bool, checkpointing: bool) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        self.size = size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, size.dtype)
        with self.device:
            base: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model), dtype=dtype, attn_implementation="sdpa"
            )
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **PEFT)
        self.model: Any = get_peft_model(base, lora)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=2e-4, weight_decay=0.0, fused=True)
        vocab = size.config["vocab_size"]
        self._rows = torch.randint(10, vocab, (size.batch, size.length), device=self.device)

    def step(self, micro_batch: int, *, wait: bool = False) -> None:
        """One optimizer step; `wait`: for the device after each micro-batch."""
        import torch

        targets = self._rows[:, 1:].numel()
        for rows in self._rows.split(micro_batch):
            out = self.model(
                input_ids=rows, labels=rows, use_cache=False, num_items_in_batch=targets
            )
            out.loss.backward()
            if wait:
                self._wait()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds_a_step(self, micro_batch: int, steps: int) -> float:
        """The first step, which allocates, is not timed."""
        self.step(micro_batch)
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self.step(micro_batch)
        self._wait()
        return (time.perf_counter() - started) / steps

    def clear(self) -> None:
        """Give back what a step that ran out of memory left."""
        import torch

        self._optimizer.zero_grad()
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(trainer: DedicatedTrainer, steps: int) -> dict[str, Any]:
    """Tokens a second by micro-batch size; what did not fit is null."""
    import torch

    size, paces = trainer.size, dict[int, float | None]()
    for micro_batch in size.micro_batches:
        try:
            seconds = trainer.seconds_a_step(micro_batch, steps)
        except torch.OutOfMemoryError:
            paces[micro_batch] = None
            break
        paces[micro_batch] = size.batch * size.length / seconds
    return {"tokens_per_second": paces, "peak_bytes": trainer.peak_bytes(), **best(paces)}


def best(paces: dict[int, float | None]) -> dict[str, Any]:
    """Raises ValueError where no size fitted."""
    fitted = {size: pace for size, pace in paces.items() if pace is not None}
    pace_of: Callable[[int], float] = lambda size: fitted[size]  # noqa: E731
    fastest = max(fitted, key=pace_of)
    return {"best_micro_batch": fastest, "best_tokens_per_second": fitted[fastest]}


def train(trainer: DedicatedTrainer, micro_batch: int, log: Path) -> None:
    """Never ends. Raises OutOfMemoryError where not even one row fits."""
    micro_batch = fitting(trainer, micro_batch)
    tokens = trainer.size.batch * trainer.size.length
    with log.open("w", buffering=1) as file:
        print(json.dumps({"micro_batch": micro_batch}), file=file)
        while True:
            trainer.step(micro_batch, wait=True)
            print(json.dumps({"time": time.time(), "tokens": tokens}), file=file)


def fitting(trainer: DedicatedTrainer, micro_batch: int) -> int:
    """The largest of `micro_batch` and its halves that does not run out of memory."""
    import torch

    while True:
        try:
            trainer.step(micro_batch)
            return micro_batch
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        trainer.clear()
        micro_batch //= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--log", type=Path, help="train until killed")
    parser.add_argument("--micro-batch", type=int, default=max(LLAMA_8B.micro_batches))
    parser.add_argument("--memory-share", type=float, default=1.0, help="of the device's memory")
    arguments = parser.parse_args()
    _limit_memory(arguments.memory_share)
    trainer = DedicatedTrainer(
        arguments.model,
        TINY if arguments.tiny else LLAMA_8B,
        liger=arguments.liger,
        checkpointing=arguments.checkpointing,
    )
    if arguments.log is not None:
        train(trainer, min(arguments.micro_batch, trainer.size.batch), arguments.log)
    print(json.dumps(measure(trainer, arguments.steps)))


def _limit_memory(share: float) -> None:
    import torch

    if share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


if __name__ == "__main__":
    main()
