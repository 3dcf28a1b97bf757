"""The trainer that the baselines share: transformers + peft, as a process of its own.

    python -m benchmarks.co_serving.trainer MODEL ROWS LOG --threads N [--micro-batch M]

It makes the same optimizer steps as the co-serving server's job, over and over, and appends a line
{"time", "tokens"} to LOG after each micro-batch, which is before its update: the figures of the
co-serving server count a token after its update only. Where --micro-batch is not given, it times a
step with each size first and takes the fastest; LOG's first line says which.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.co_serving.measures import Update
from benchmarks.train import BATCH, LINEARS, PEFT, backward, tokenised

MICRO_BATCHES = (1, 2, 4)  # sequences of a forward and backward; BATCH of them make a step
Row = tuple[list[int], list[int]]  # token ids, labels


class PeftTrainer:
    """AdamW over LoRA on all linears; padded micro-batches, sorted by length."""

    def __init__(self, model_dir: Path, rows: Path, threads: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **PEFT)
        self.model: Any = get_peft_model(base, lora)
        self.model.train()
        self._pad = tokenizer.pad_token_id
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=2e-4, weight_decay=0.0)
        examples = list(tokenised(tokenizer, rows))
        self._batches = _batches(examples)

    def step(self, micro_batch: int, done: Callable[[int], object] = lambda tokens: None) -> int:
        """One update; returns its input tokens. `done` is called with those of each micro-batch
        after its backward."""
        import torch

        batch = sorted(next(self._batches), key=lambda row: len(row[0]))
        count = sum(label != -100 for _, labels in batch for label in labels[1:])
        for start in range(0, len(batch), micro_batch):
            part = batch[start : start + micro_batch]
            backward(self.model, part, count, self._pad)
            done(sum(len(ids) for ids, _ in part))
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sum(len(ids) for ids, _ in batch)

    def fastest(self) -> int:
        """The micro-batch size with most tokens a second."""
        self.step(MICRO_BATCHES[0])  # first touch
        paces = {}
        for size in MICRO_BATCHES:
            started = time.perf_counter()
            tokens = self.step(size)
            paces[size] = tokens / (time.perf_counter() - started)
        return max(paces, key=lambda size: paces[size])


def _batches(examples: Sequence[Row]) -> Iterator[list[Row]]:
    rows = itertools.cycle(examples)
    while True:
        yield list(itertools.islice(rows, BATCH))


def read_log(log: Path) -> tuple[int | None, list[Update]]:
    """The micro-batch size, None before it is known, and the tokens so far."""
    text = log.read_text() if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        return None, []
    return lines[0]["micro_batch"], [Update(line["time"], line["tokens"]) for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch", type=int)
    arguments = parser.parse_args()
    trainer = PeftTrainer(arguments.model, arguments.rows, arguments.threads)
    micro_batch = arguments.micro_batch or trainer.fastest()
    with arguments.log.open("w", buffering=1) as log:
        print(json.dumps({"micro_batch": micro_batch}), file=log)
        while True:
            trainer.step(
                micro_batch,
                lambda tokens: print(json.dumps({"time": time.time(), "tokens": tokens}), file=log),
            )


if __name__ == "__main__":
    main()
