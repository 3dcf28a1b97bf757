"""Gradients of one optimizer step, as a co-serving engine computes them and as PEFT does.

The engine's are read off the trained adapter: one step of SGD without clipping takes
`learning_rate * gradient` off it, so nothing inside the package is touched to see them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sample_text
import torch
from make_model import make_model
from torch import Tensor

from harness.engine import CoServingEngine
from harness.peft_reference import PeftTrainer, tokenise, write_rows

# Large, so that what is subtracted from the adapter dwarfs it: rounding the difference to fp32
# then costs 6e-8 of each gradient.
LEARNING_RATE = 1e6
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OnStep = Callable[[CoServingEngine, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """A piece of text: `prompt` characters of it, then `completion` characters to learn."""

    at: int
    prompt: int
    completion: int

    def text(self) -> tuple[str, str]:
        text = _corpus()
        border = self.at + self.prompt
        return text[self.at : border], text[border : border + self.completion]


@dataclass(frozen=True, slots=True)
class Case:
    """One optimizer step: what is trained, on which rows, and how the engine cuts it up.

    Everything below the line must leave the gradients as they are.
    """

    rows: tuple[Row, ...]
    targets: tuple[str, ...] = ALL_LINEAR
    layers: tuple[int, ...] | None = None
    rank: int = 4
    alpha: float = 8
    rslora: bool = False
    max_length: int = 400
    completion_only_loss: bool = True
    # ---
    window: int = 256
    lane_tokens: int = 2048  # at least the longest sequence
    budgets: tuple[float, ...] = (4096.0,)  # units of the engine's steps, over and over
    min_chunk: int = 16
    recomputed: tuple[str, ...] = ()
    drop_blocks_at: tuple[int, ...] = ()  # steps before which all KV blocks are taken away
    requests_at: tuple[int, ...] = ()  # steps before which an inference request arrives

    def peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "use_rslora": self.rslora,
            "layers_to_transform": None if self.layers is None else list(self.layers),
        }


@dataclass(slots=True)
class Measured:
    """What a job left, and what happened to it on its way."""

    gradients: dict[str, Tensor]
    loss: float
    forward_drops: int = 0  # times that blocks were lost before the backward had begun
    backward_drops: int = 0
    mixed_steps: int = 0  # steps that held both finetuning and inference tokens


class GradientBench:
    """One model, served by an engine of its own and known to PEFT."""

    def __init__(self, model: Path, work: Path, *, dtype: str = "float32", **options: Any) -> None:
        self.model, self.work, self.dtype = model, work, dtype
        self.engine = CoServingEngine(
            model, work / "state", dtype=dtype, **{"max_lora_rank": 256, **options}
        )
        self._names = (f"case-{i}" for i in itertools.count())

    @property
    def runner(self) -> Any:
        """vLLM's model runner, with the co-serving mixin in it."""
        return self.engine.core.model_executor.driver_worker.worker.model_runner

    def served_model(self) -> Any:
        """What training sees of the model (`vllm_flexft.train.model.ServedModel`)."""
        from vllm_flexft.runner.view import served_model

        groups = enumerate(self.runner.kv_cache_config.kv_cache_groups)
        kv_group_of = {name: index for index, group in groups for name in group.layer_names}
        return served_model(self.runner.get_model(), self.runner.vllm_config, kv_group_of)

    def measure(self, case: Case) -> Comparison:
        """Train `case` in the engine and in PEFT: in fp32, and in the engine's dtype."""
        folder = self.work / next(self._names)
        folder.mkdir()
        reference = PeftTrainer(self.model, case.peft())
        reference.randomise(seed=1)
        adapter = reference.save(folder / "init")
        tokens = tokens_of(case, reference.tokenizer)
        expected = {torch.float32: reference.gradients(tokens)}
        loss = reference.last_loss
        if self.dtype != "float32":
            dtype = getattr(torch, self.dtype)
            reference = PeftTrainer(self.model, case.peft(), dtype=dtype, adapter_dir=adapter)
            expected[dtype] = reference.gradients(tokens)
        measured = self.train(
            case, adapter, write_rows(folder / "rows.jsonl", [row.text() for row in case.rows])
        )
        targets = sum(label != -100 for _, labels in tokens for label in labels[1:])
        return Comparison(measured, expected, loss, targets)

    def row_with_border_at(self, tokens: int) -> Row:
        """A row whose prompt is so many tokens; the completion goes on."""
        from transformers import AutoTokenizer

        encoded = AutoTokenizer.from_pretrained(self.model)(
            _corpus()[: 20 * tokens], return_offsets_mapping=True
        )
        end = encoded["offset_mapping"][tokens - 1][1]
        return Row(0, end, 100)

    def train(self, case: Case, adapter: Path, dataset: Path) -> Measured:
        """One optimizer step of `case` in the engine, from `adapter`."""
        from safetensors.torch import load_file

        job = {
            "dataset": {
                "path": str(dataset),
                "max_length": case.max_length,
                "completion_only_loss": case.completion_only_loss,
                "shuffle": False,
            },
            "peft": {**case.peft(), "init_adapter": str(adapter)},
            "training": {
                "optim": "sgd",
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "max_steps": 1,
                "train_batch_size": len(case.rows),
            },
        }
        measured = Measured({}, 0.0)
        with _cut_up(case):
            output = self._run(job, _disturb(case, measured))
        before = load_file(adapter / "adapter_model.safetensors")
        after = load_file(output / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        measured.gradients = {
            name: (before[name].double() - after[name].double()) / LEARNING_RATE for name in before
        }
        measured.loss = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        return measured

    def _run(self, job: Mapping[str, Any], on_step: OnStep) -> Path:
        """Like `CoServingEngine.run`, with a say before each step and requests among them."""
        engine = self.engine
        name = engine.submit(job)
        deadline = time.monotonic() + 240.0
        step = 0
        while True:
            if engine.scheduler.has_requests():
                if engine.scheduler._runs:
                    on_step(engine, step)
                    step += 1
                engine.llm.llm_engine.step()
            elif (record := engine.store.get(name)).status in ("succeeded", "failed"):
                break
            else:
                time.sleep(0.002)
            assert time.monotonic() < deadline, "the job did not end"
        assert record.status == "succeeded", record.error
        return record.job().output_dir


# Together they have grouped, multi-head and multi-query attention, tied and untied embeddings,
# heads that are wider than hidden_size / num_heads, and a sliding window that sequences outgrow.
# Three layers: adapters can sit on the lowest, on a middle and on the upper ones only.
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(num_key_value_heads=2),
    "qwen2": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": dict(num_key_value_heads=1, hidden_size=96),
    "mistral": dict(num_key_value_heads=2, sliding_window=48),
}
KV_BLOCKS = 160  # 20480 tokens: more than two full lanes and the requests among them need


class Benches:
    """(family, dtype) -> its bench, with an engine that is loaded at its first use."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[tuple[str, str], GradientBench] = {}

    def __call__(self, family: str, dtype: str = "float32") -> GradientBench:
        if (family, dtype) not in self._made:
            work = self._folders.mktemp(f"{family}-{dtype}")
            model = make_model(
                work / "model", arch=family, dtype=dtype, num_hidden_layers=3, **MODELS[family]
            )
            self._made[family, dtype] = GradientBench(
                model, work, dtype=dtype, num_gpu_blocks_override=KV_BLOCKS
            )
        return self._made[family, dtype]


@dataclass(frozen=True, slots=True)
class Comparison:
    measured: Measured
    expected: dict[torch.dtype, dict[str, Tensor]]
    expected_loss: float
    num_targets: int

    def errors(self, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        return relative_errors(self.measured.gradients, self.expected[dtype])

    def worst(self, dtype: torch.dtype = torch.float32) -> float:
        return max(self.errors(dtype).values())


def relative_errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """max |got - expected| / max |expected| of each tensor."""
    assert got.keys() == expected.keys()
    return {
        name: float((got[name].double() - want.double()).abs().max() / want.abs().max())
        for name, want in expected.items()
    }


def tokens_of(case: Case, tokenizer: Any) -> list[tuple[list, list]]:
    """(token ids, labels) of each row, as the reference sees them."""
    return [
        tokenise(tokenizer, *row.text(), case.max_length, case.completion_only_loss)
        for row in case.rows
    ]


@contextlib.contextmanager
def _cut_up(case: Case) -> Iterator[None]:
    """Make the engine cut its work as the case says, where it would choose by load and size."""
    from harness.rooms import work_a_step
    from vllm_flexft.graph import job_memory, windows
    from vllm_flexft.sched import run
    from vllm_flexft.train.trainer import Trainer

    budgets = itertools.cycle(case.budgets)
    plan = Trainer._plan_memory

    def plan_memory(*args: Any) -> Any:
        """The plan, without what the case wants recomputed; `residual_in` leads to all of it."""
        made = plan(*args)
        for layer, choice in made.kept.items():
            names = {name for name in choice.kept if name not in case.recomputed}
            if names != set(choice.kept):
                kept = tuple(n for n in made.graph.widths if n in names | {"residual_in"})
                made.kept[layer] = dataclasses.replace(choice, kept=kept)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(windows.WINDOW, "cpu", case.window)
        patch.setattr(job_memory, "SERVED_LANES", job_memory.Lanes(2, case.lane_tokens))
        patch.setattr(run, "MIN_CHUNK", case.min_chunk)
        work_a_step(patch, lambda: next(budgets))
        patch.setattr(Trainer, "_plan_memory", plan_memory)
        yield


def _disturb(case: Case, measured: Measured) -> OnStep:
    """Takes blocks away and sends inference requests at the steps of the case."""

    def on_step(engine: CoServingEngine, step: int) -> None:
        run = next(iter(engine.scheduler._runs), None)
        if step in case.drop_blocks_at:
            engine.scheduler._drafts.take_back()
            in_backward = any(batch.slices_done for batch in run._active)
            while run.release_blocks(engine.scheduler._lender):
                if in_backward:
                    measured.backward_drops += 1
                else:
                    measured.forward_drops += 1
        if step in case.requests_at:
            _send_request(engine, step)
        if run._opened and engine.llm.llm_engine.has_unfinished_requests():
            measured.mixed_steps += 1

    return on_step


def _send_request(engine: CoServingEngine, number: int) -> None:
    from vllm import SamplingParams

    engine.llm.llm_engine.add_request(
        f"request-{time.monotonic_ns()}",
        _corpus()[number * 37 : number * 37 + 20 + 40 * (number % 5)],
        SamplingParams(temperature=0.0, max_tokens=3 + number % 6, ignore_eos=True),
    )


@cache
def _corpus() -> str:
    """60,000 characters of English, with a few that take several tokens each."""
    rng = random.Random(7)
    sentences = (
        sample_text.sentence(rng) + rng.choice(["", " – ", " Größe: ", " 漢字 ", " 12 + 30 = 42. "])
        for _ in range(1200)
    )
    return " ".join(sentences)[:60_000]


def replace(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)
