"""Idle co-serving engine against transformers + peft: finetune tokens per second, same job.

    python -m benchmarks.train [--data-dir DIR] [--steps 3] [--rounds 2]

Both train the same LoRA (all linears) on the same rows with the same threads; rounds alternate.
A token is one that was trained: input tokens without padding, counted once, after the update.
peft runs both ways that people use, padded batches and row by row, and the faster one counts.
The last line is JSON: {"idle_vs_peft_fp32": x, "idle_vs_peft_bf16": y}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL_SIZE = "100m"
BATCH = 4
MAX_LENGTH = 512
WARM_STEPS = 1
PEFT = {"r": 16, "lora_alpha": 32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_from(data_dir: Path | None, count: int) -> list[dict[str, str]]:
    """GSM8K where it is at hand, else problems of the same length from the sample text."""
    if data_dir is not None:
        lines = (data_dir / "gsm8k_train.jsonl").read_text().splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    import random

    import sample_text

    rng = random.Random(0)
    rows = []
    for _ in range(count):
        pairs = [sample_text.question_and_answer(rng) for _ in range(rng.randint(6, 14))]
        text = [" ".join(pair) for pair in pairs]
        half = len(text) // 2
        rows.append({"prompt": " ".join(text[:half]), "completion": " " + " ".join(text[half:])})
    return rows


def run_engine(model: Path, data: Path, dtype: str, steps: int, work: Path) -> float:
    """Tokens per second of an engine that has nothing else to do."""
    from vllm import LLM

    from vllm_flexft.inprocess import wait_for_jobs

    job = {
        "name": "bench",
        "dataset": {"path": str(data), "max_length": MAX_LENGTH, "shuffle": False},
        "peft": PEFT,
        "training": {
            "max_steps": WARM_STEPS + steps,
            "train_batch_size": BATCH,
            "save_steps": 10_000,
        },
    }
    llm = LLM(
        str(model),
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        additional_config={
            "co_finetune": [job],
            "co_finetune_config": {"state_dir": str(work / "state")},
        },
    )
    (record,) = wait_for_jobs(llm)
    assert record.status == "succeeded", record.error
    lines = (record.job().output_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    first, last = metrics[WARM_STEPS - 1], metrics[-1]
    tokens = last["num_input_tokens"] - first["num_input_tokens"]
    return tokens / (last["time"] - first["time"])


def run_peft(model_dir: Path, data: Path, dtype: str, steps: int, padded: bool) -> float:
    """Tokens per second of the usual loop: AdamW, one update a batch of BATCH rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **PEFT))
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0
    )
    examples = list(tokenised(tokenizer, data))
    tokens, started = 0, 0.0
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            tokens, started = 0, time.perf_counter()
        batch = [examples[i % len(examples)] for i in range(step * BATCH, (step + 1) * BATCH)]
        count = sum(label != -100 for _, labels in batch for label in labels[1:])
        groups = [batch] if padded else [[example] for example in batch]
        for group in groups:
            backward(model, group, count, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in batch)
    return tokens / (time.perf_counter() - started)


def tokenised(tokenizer: Any, data: Path) -> Iterator[tuple[list[int], list[int]]]:
    for line in data.read_text().splitlines():
        row = json.loads(line)
        encoded = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id][:MAX_LENGTH]
        ends = [end for _, end in encoded["offset_mapping"]] + [10**9]
        labels = [
            token if end > len(row["prompt"]) else -100
            for token, end in zip(ids, ends, strict=False)
        ]
        yield ids, labels


def backward(model: Any, group: list[tuple[list[int], list[int]]], count: int, pad: int) -> None:
    import torch

    longest = max(len(ids) for ids, _ in group)
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in group])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in group])
    out = model(
        input_ids=input_ids,
        attention_mask=mask if len(group) > 1 else None,
        labels=labels,
        num_items_in_batch=count,
    )
    out.loss.backward()


def measure(kind: str, arguments: argparse.Namespace, work: Path) -> float:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--one", kind, "--work", str(work)]
    command += ["--steps", str(arguments.steps)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    done = subprocess.run(command, env=environment, check=False, capture_output=True)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr.decode()[-4000:]}")
    return float(done.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("VLLM_FLEXFT_DATA"))
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="of both; default: all cores but one, which a server's front end needs",
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, dtype = arguments.one.split(":")
        data = arguments.work / "rows.jsonl"
        model = arguments.work / "model"
        if kind == "engine":
            with tempfile.TemporaryDirectory() as folder:
                speed = run_engine(model, data, dtype, arguments.steps, Path(folder))
        else:
            speed = run_peft(model, data, dtype, arguments.steps, kind == "peft-padded")
        print(f"\n{speed}", flush=True)
        return
    from make_model import make_model

    result = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", size=MODEL_SIZE)
        rows = rows_from(arguments.data_dir, (WARM_STEPS + arguments.steps) * BATCH)
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for dtype in arguments.dtypes:
            speeds: dict[str, list[float]] = {"engine": [], "peft-padded": [], "peft-rows": []}
            for _ in range(arguments.rounds):
                for kind, values in speeds.items():
                    values.append(measure(f"{kind}:{dtype}", arguments, work))
                    print(f"{dtype:9} {kind:12} {values[-1]:8.1f} tokens/s", flush=True)
            medians = {kind: statistics.median(values) for kind, values in speeds.items()}
            best = max(medians["peft-padded"], medians["peft-rows"])
            name = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
            result[f"idle_vs_peft_{name}"] = round(medians["engine"] / best, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
