"""Activation memory: what is kept under a budget, how many bytes it takes, and the refusal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from harness.gradients import Case, Row
from harness.peft_reference import PeftTrainer, write_rows

from vllm_flexft.config import FinetuneJob
from vllm_flexft.graph.families import TARGETS
from vllm_flexft.graph.job_memory import SERVED_LANES, JobMemory, Lanes
from vllm_flexft.graph.memory import MemoryPlan, plan_memory
from vllm_flexft.graph.windows import backward_windows
from vllm_flexft.plan import Windows
from vllm_flexft.train.activations import ActivationStore
from vllm_flexft.train.model import ServedModel
from vllm_flexft.train.working import WorkingBuffers

JOB = FinetuneJob.from_mapping({"name": "job", "dataset": {"path": "rows.jsonl"}})
EVERYTHING = {"residual_in", "qkv", "attention", "residual_mid", "gate_up"}


def plan(model: ServedModel, lowest_layer: int = 0, **options: Any) -> MemoryPlan:
    settings: dict[str, Any] = {"tokens": 7, "context": 7, "memory_bytes": float("inf")}
    return plan_memory(
        model.shape,
        targets=tuple(TARGETS),
        layers=range(lowest_layer, len(model.layers)),
        itemsize=model.dtype.itemsize,
        **{**settings, **options},
    )


@pytest.mark.parametrize("policy", ["fast", "minimal"])
@pytest.mark.parametrize("lowest_layer", [0, 1, 2])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("llama", "bfloat16")])
def test_bytes_a_token_are_those_of_the_tensors(family, dtype, lowest_layer, policy, bench):
    model = bench(family, dtype).served_model()
    made = plan(model, lowest_layer, policy=policy)
    store = ActivationStore(made, Lanes(2, 10), model.dtype, model.device)
    assert store.num_bytes == 2 * 10 * made.bytes_per_token


def test_widths_are_those_that_the_capture_fills(bench):
    """Qwen3's heads are wider than its hidden size, and its backward reads keys before the norm."""
    widths = plan(bench("qwen3").served_model()).graph.widths
    hidden, heads, kv_heads, head_dim, mlp = 96, 4, 1, 32, 256
    assert widths == {
        "residual_in": hidden,
        "qkv": (heads + kv_heads) * head_dim,
        "attention": heads * head_dim,
        "residual_mid": hidden,
        "gate_up": 2 * mlp,
    }


def test_budget_for_everything_keeps_everything_and_a_byte_less_does_not(bench):
    model = bench("llama").served_model()
    everything = plan(model)
    assert all(set(choice.kept) == EVERYTHING for choice in everything.kept.values())
    needed = 7 * everything.bytes_per_token
    assert plan(model, memory_bytes=needed).recompute_flops == everything.recompute_flops
    less = plan(model, memory_bytes=needed - 1)
    assert less.recompute_flops > everything.recompute_flops
    assert 7 * less.bytes_per_token < needed


def test_refusal_names_a_budget_that_would_do(bench):
    model = bench("llama").served_model()
    with pytest.raises(ValueError, match="memory_gib") as refusal:
        plan(model, tokens=333, memory_bytes=1000.0, other_bytes=5e6)
    (needed,) = re.findall(r"memory_gib ([0-9.]+)", str(refusal.value))
    assert plan(model, tokens=333, memory_bytes=float(needed) * 2**30, other_bytes=5e6)


@pytest.mark.parametrize("refused_by", ["admission", "worker"])
def test_a_job_refused_for_memory_trains_with_the_memory_gib_that_the_refusal_names(
    refused_by, bench, tmp_path, monkeypatch
):
    """The floor is one lane of the longest sequence; a thousandth of a GiB less is refused."""
    from vllm_flexft.train.trainer import Trainer

    bench = bench("llama")
    scheduler = bench.engine.scheduler
    case = Case((Row(0, 200, 200),), targets=("q_proj",))
    dataset = write_rows(tmp_path / "rows.jsonl", [row.text() for row in case.rows])
    adapter = PeftTrainer(bench.model, case.peft()).save(tmp_path / "init")
    begun: list[Any] = []
    begin = Trainer.begin
    monkeypatch.setattr(Trainer, "begin", lambda self, new: (begun.extend(new), begin(self, new)))
    check = JobMemory.check

    def serve_with(memory_gib: float) -> None:
        config = scheduler._co_serve
        options = config.options.model_copy(update={"memory_gib": memory_gib})
        monkeypatch.setattr(scheduler, "_co_serve", dataclasses.replace(config, options=options))

    if refused_by == "worker":
        monkeypatch.setattr(JobMemory, "check", lambda *_: None)
    serve_with(1e-6)
    with pytest.raises(AssertionError, match="memory_gib") as failure:
        bench.train(case, adapter, dataset)
    (needed,) = re.findall(r"memory_gib ([0-9.]+)", str(failure.value))
    monkeypatch.setattr(JobMemory, "check", check)
    serve_with(float(needed) - 0.001)
    with pytest.raises(AssertionError, match=f"memory_gib {needed}"):
        bench.train(case, adapter, dataset)
    assert not begun
    serve_with(float(needed))
    assert torch.isfinite(torch.tensor(bench.train(case, adapter, dataset).loss))


def test_lanes_shrink_before_anything_is_recomputed_and_never_below_one_sequence(bench):
    shape = bench("llama").served_model().shape
    memory = JobMemory.of(shape, JOB, itemsize=4, policy="auto")
    wanted, longest = SERVED_LANES, 300
    state = memory.state_bytes
    for budget in (2**20 * x / 4 for x in range(4, 400)):
        lanes = memory.lanes_within(longest, budget)
        assert lanes in (wanted, Lanes(1, 2048), Lanes(1, longest))
        try:
            made = memory.plan(lanes, budget)
        except ValueError:
            assert lanes == Lanes(1, longest)
            with pytest.raises(ValueError, match="memory_gib"):
                memory.check(longest, budget)
            continue
        memory.check(longest, budget)
        kept = made.bytes_per_token * lanes.total_tokens
        assert state + memory.working_bytes(lanes) + kept <= budget
        if lanes != Lanes(1, longest):
            everything = memory.plan(lanes, float("inf"), "fast")
            assert made.recompute_flops == everything.recompute_flops
    assert memory.lanes_within(longest, float("inf")) == wanted == Lanes(2, 2048)
    assert memory.lanes_within(5000, float("inf")) == Lanes(2, 5000)


def test_working_buffers_take_the_bytes_that_the_plan_says(bench):
    model = bench("qwen3").served_model()
    for windows in (
        backward_windows(model.shape, "cpu"),
        Windows(layer=61, loss=7),
        Windows(1000, 999),
    ):
        memory = JobMemory.of(model.shape, JOB, 4, "auto", windows)
        for lanes in (Lanes(1, 33), Lanes(2, 10)):
            made = WorkingBuffers(model.shape, lanes, windows, model.dtype, model.device)
            assert made.num_bytes == memory.working_bytes(lanes)
            assert len(made.logits) == min(256, windows.loss)


@pytest.mark.parametrize("policy", ["auto", "fast", "minimal", "offload"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_equal_pefts_under_every_policy(family, policy, bench, monkeypatch):
    bench = bench(family)
    config = bench.engine.scheduler._co_serve
    options = config.options.model_copy(update={"activation_policy": policy})
    changed = dataclasses.replace(config, options=options)
    monkeypatch.setattr(bench.engine.scheduler, "_co_serve", changed)
    case = Case((Row(0, 300, 200), Row(50, 100, 300)), window=61, lane_tokens=500)
    assert bench.measure(case).worst() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_equal_pefts_where_layers_keep_different_tensors(family, bench, monkeypatch):
    """A budget half-way between the least and the most."""
    from vllm_flexft.train import trainer

    bench, trainers, begin = bench(family), [], trainer.Trainer.begin

    def begun(self, batches):
        trainers.append(self)
        begin(self, batches)

    monkeypatch.setattr(trainer.Trainer, "begin", begun)
    case = Case((Row(0, 300, 200), Row(50, 100, 300)), window=61, lane_tokens=1)
    bench.measure(case)
    setup = trainers[-1].setup
    memory = JobMemory.of(bench.served_model().shape, setup.job, 4, "auto", setup.windows)
    one = Lanes(1, setup.lane_tokens)
    least, most = (memory.taken_bytes(one, policy) for policy in ("minimal", "fast"))
    config = bench.engine.scheduler._co_serve
    options = config.options.model_copy(update={"memory_gib": (least + most) / 2 / 2**30})
    changed = dataclasses.replace(config, options=options)
    monkeypatch.setattr(bench.engine.scheduler, "_co_serve", changed)
    assert bench.measure(case).worst() <= 1e-5
    kept = {choice.kept for choice in trainers[-1].memory.kept.values()}
    assert len(kept) > 1


@pytest.mark.parametrize("targets", [("down_proj",), ("q_proj", "v_proj"), tuple(TARGETS)])
def test_every_kept_tensor_is_read_by_the_backward(targets, bench, tmp_path, monkeypatch):
    """Each kept tensor in turn is spoilt after the forward: the job must notice."""
    from vllm_flexft.train import trainer

    bench = bench("qwen3")
    case = Case((Row(0, 200, 200),), targets=targets, layers=(1, 2))
    adapter = PeftTrainer(bench.model, case.peft()).save(tmp_path / "init")
    dataset = write_rows(tmp_path / "rows.jsonl", [row.text() for row in case.rows])
    kept: list[tuple[int, str]] = []
    backward = trainer.Trainer._backward
    spoil: list[tuple[int, str] | None] = [None]

    def spoilt(self: Any, work: Any, shared: Any) -> Any:
        lanes = self.store._lanes
        kept[:] = list(lanes[0])
        if spoil[0] is not None and work.backward:
            for lane in lanes:
                lane[spoil[0]].fill_(float("nan"))
        return backward(self, work, shared)

    monkeypatch.setattr(trainer.Trainer, "_backward", spoilt)
    bench.train(case, adapter, dataset)
    assert kept
    for key in list(kept):
        spoil[0] = key
        with pytest.raises(AssertionError, match="diverged"):
            bench.train(case, adapter, dataset)
