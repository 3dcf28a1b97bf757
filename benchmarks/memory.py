"""What the forward leaves behind for the backward: ours against PEFT's, in measured bytes.

    python -m benchmarks.memory [--quick]

Measured with a tracker that sees every storage made and freed (live_bytes.py): live bytes after a
forward pass less those before. PEFT runs with and without gradient checkpointing;
ours is the arena, adapter state and working buffers of a real engine that trains the same rows.
The last line is JSON:
  kept_vs_peft          our activations / PEFT's without checkpointing, 1,024 tokens, all-linear
  kept_vs_checkpointing our activations under the least budget / PEFT's with checkpointing
  step_time_vs_peft     time of a training step under that same budget / PEFT's
  plan_vs_measured      largest relative difference between `flexft plan` and what was measured
  linear_1k_to_32k      bytes at 32k tokens / (32 x bytes at 1k), from a run at each length
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.live_bytes import LiveBytes

LENGTH = 1024
SHARE = 0.12  # of PEFT's activations: the budget that ours is given
PEFT = {"r": 16, "lora_alpha": 32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUNDS = 3


def random_rows(model: Path, path: Path, length: int, count: int) -> Path:
    """`count` texts of at least `length` tokens; the job cuts them to exactly that."""
    import random

    import sample_text
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        text, size = [], 0
        while size < 2 * length:  # a whole text has fewer tokens than its pieces
            piece = " ".join(sample_text.question_and_answer(rng)) + " "
            size += len(tokenizer(piece, add_special_tokens=False)["input_ids"])
            text.append(piece)
        lines.append(json.dumps({"text": "".join(text)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def measure_peft(model_dir: Path, checkpointing: bool) -> dict[str, float]:
    """Live bytes after the forward of one sequence of LENGTH tokens, and seconds a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **PEFT))
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, base.config.vocab_size, (1, LENGTH))

    def hidden() -> torch.Tensor:
        """Up to the final norm: the loss head is another matter, and ours keeps nothing for it."""
        return model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state

    with LiveBytes() as tracker:
        before = tracker.total
        out = hidden()
        kept = tracker.total - before
        del out
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return {"kept": kept, "seconds": min(times[1:])}


def measure_engine(
    model: Path, work: Path, length: int, memory_gib: float | None, policy: str, steps: int
) -> dict[str, float]:
    """Live bytes that a job of `length`-token sequences adds to an engine, and seconds a step."""
    from vllm import LLM

    from vllm_flexft.cli.plan import plan_job
    from vllm_flexft.config import FinetuneJob
    from vllm_flexft.inprocess import wait_for_jobs
    from vllm_flexft.sched import scheduler
    from vllm_flexft.train.backward import MicroBatchBackward
    from vllm_flexft.train.trainer import Trainer

    scheduler.MIN_LANE_TOKENS, scheduler.NUM_LANES = 1, 1  # one sequence: as PEFT has it
    data = random_rows(model, work / "rows.jsonl", length, 1)
    job = {
        "name": "bench",
        "dataset": {"path": str(data), "max_length": length, "shuffle": False},
        "peft": PEFT,
        "training": {"max_steps": steps, "train_batch_size": 1, "save_steps": 10_000},
    }
    options: dict[str, Any] = {
        "state_dir": str(work / "state"),
        "activation_policy": policy,
        "ttft_ms": 1e7,  # nothing else is served: the whole backward may fit one step
    }
    if memory_gib is not None:
        options["memory_gib"] = memory_gib
    llm = LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=length + 64,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**30,
        additional_config={"co_finetune": [job], "co_finetune_config": options},
    )
    result: dict[str, float] = {"working": 0.0}
    tracker = LiveBytes()
    construct, begin = Trainer.__init__, Trainer.begin
    run_slice, update = MicroBatchBackward._run_slice, Trainer._update

    def tracked_init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        result["before"] = tracker.total
        construct(self, *args, **kwargs)
        result["store"] = self.store.num_bytes

    def tracked_begin(self: Trainer, batches: Any) -> None:
        before = tracker.total
        begin(self, batches)
        grown = tracker.total - before
        result["begun"] = max(result.get("begun", 0.0), grown)  # the residual stream's gradient

    def tracked_slice(self: MicroBatchBackward, part: Any) -> None:
        result.setdefault("first_slice", tracker.total)
        run_slice(self, part)
        grown = tracker.total - result["first_slice"] + result.get("begun", 0.0)
        result["working"] = max(result["working"], grown)

    def tracked_update(self: Trainer, step: Any) -> float:
        norm = update(self, step)
        state = self.adapter.master.nbytes + self.adapter.grad.nbytes
        moments = self.optimizer._optimizer.state[self.optimizer._parameter]
        result["state"] = state + sum(moments[key].nbytes for key in ("exp_avg", "exp_avg_sq"))
        return norm

    if steps == 1:  # a tracker in the way of every operation: not while time is taken
        Trainer.__init__, Trainer.begin = tracked_init, tracked_begin  # type: ignore
        MicroBatchBackward._run_slice = tracked_slice  # type: ignore
        Trainer._update = tracked_update  # type: ignore
        with tracker:
            wait_for_jobs(llm)
        result["measured"] = result["store"] + result["working"] + result["state"]
    else:
        wait_for_jobs(llm)
    parsed = FinetuneJob.from_mapping(job)
    from transformers import AutoConfig

    from vllm_flexft.graph.ops import ModelShape

    planned = plan_job(
        ModelShape.from_hf_config(AutoConfig.from_pretrained(model)),
        parsed,
        dtype="bfloat16",
        budget_gib=memory_gib if memory_gib is not None else float("inf"),
        policy="auto" if policy == "offload" else policy,  # type: ignore[arg-type]
    )
    result["planned_activations"] = planned.activations
    result["planned"] = planned.activations + planned.working + planned.state
    lines = (work / "state/adapters/bench/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    if steps > 1:
        times = [b["time"] - a["time"] for a, b in itertools.pairwise(metrics)]
        result["seconds"] = min(times)
    return result


def in_process(kind: str, *arguments: Any, threads: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", kind, *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    done = subprocess.run(command, env=environment, check=False, capture_output=True)
    if done.returncode:
        sys.exit(f"{kind} {arguments} failed:\n{done.stderr.decode()[-4000:]}")
    values: dict[str, float] = json.loads(done.stdout.decode().splitlines()[-1])
    print(f"{kind:8} {' '.join(map(str, arguments)):60.60} {values}", flush=True)
    return values


def one(kind: str, arguments: list[str]) -> dict[str, float]:
    model = Path(arguments[0])
    if kind == "peft":
        return measure_peft(model, arguments[1] == "checkpointing")
    length, memory, policy, steps = arguments[1:]
    with tempfile.TemporaryDirectory() as folder:
        gib = None if memory == "none" else float(memory)
        return measure_engine(model, Path(folder), int(length), gib, policy, int(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="lengths up to 4k in place of 32k")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], arguments.one[1:])))
        return
    from make_model import make_model

    threads = arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", size="100m", dtype="bfloat16")
        small = make_model(
            Path(folder) / "small", size="tiny", dtype="bfloat16", max_position_embeddings=40_000
        )
        plain = in_process("peft", model, "plain", threads=threads)
        checkpointing = in_process("peft", model, "checkpointing", threads=threads)
        # The state and working buffers come on top of the activations' share.
        fast = in_process("engine", model, LENGTH, "none", "fast", 1, threads=threads)
        other = fast["planned"] - fast["planned_activations"]
        budget = (SHARE * plain["kept"] + other) / 2**30
        ours = in_process("engine", model, LENGTH, budget, "auto", 1, threads=threads)
        least = in_process("engine", model, LENGTH, "none", "minimal", 1, threads=threads)
        timed = in_process("engine", model, LENGTH, budget, "auto", ROUNDS + 2, threads=threads)
        longest = 4096 if arguments.quick else 32_768
        short = in_process("engine", small, LENGTH, "none", "auto", 1, threads=threads)
        long = in_process("engine", small, longest, "none", "auto", 1, threads=threads)
    runs = (fast, ours, least, short, long)
    growth = (long["store"] + long["working"]) / (short["store"] + short["working"])
    print(
        json.dumps(
            {
                "kept_vs_peft": round(ours["store"] / plain["kept"], 4),
                "kept_vs_checkpointing": round(least["store"] / checkpointing["kept"], 4),
                "step_time_vs_peft": round(timed["seconds"] / plain["seconds"], 3),
                "plan_vs_measured": round(
                    max(abs(run["planned"] / run["measured"] - 1) for run in runs), 4
                ),
                "linear_1k_to_32k": round(growth * LENGTH / longest, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
