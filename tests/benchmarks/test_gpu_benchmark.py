"""The GPU benchmark's own arithmetic; `python -m benchmarks.gpu --dry-run` runs all of it."""

import itertools
import json
import statistics

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.co_serving.trace import Arrival
from benchmarks.gpu import workload
from benchmarks.gpu.__main__ import Run, parse, summary
from benchmarks.gpu.arrivals import OUTPUTS, PROMPTS, Lengths, from_traces, synthetic
from benchmarks.gpu.dedicated import DedicatedTrainer, best, measure
from benchmarks.gpu.workload import LLAMA_8B, TINY
from vllm_flexft.config import FinetuneJob


def test_synthetic_requests_come_at_the_rate_with_the_means_of_the_lengths():
    found = synthetic(20.0, 600.0, seed=0)
    assert len(found) / 600 == pytest.approx(20, rel=0.05)
    assert all(a.at_s < b.at_s for a, b in itertools.pairwise(found))
    # The cut takes some of a log-normal's mean: 4 % at sigma 1 and five means.
    assert statistics.fmean(a.prompt_tokens for a in found) == pytest.approx(PROMPTS.mean, rel=0.08)
    assert statistics.fmean(a.output_tokens for a in found) == pytest.approx(OUTPUTS.mean, rel=0.08)
    assert max(a.prompt_tokens for a in found) <= PROMPTS.most
    assert found == synthetic(20.0, 600.0, seed=0)


def test_a_traces_lengths_stay_and_its_gaps_are_scaled():
    trace = [Arrival(10.0 + 2 * i**2, 100 * i, i, "conv") for i in range(11)]
    found = from_traces(trace, 2.0, 5.0, Lengths(1, 1, 450), Lengths(1, 1, 8))
    assert [a.prompt_tokens for a in found] == [1, 100, 200, 300, 400, *[450] * 5]
    assert [a.output_tokens for a in found] == [2, 2, 2, 3, 4, 5, 6, 7, 8, 8]
    assert [a.at_s for a in found] == pytest.approx([5.0 * i**2 / 100 for i in range(10)])
    with pytest.raises(ValueError, match=r"11 arrivals, 12"):
        from_traces(trace, 11.0, 1.0, PROMPTS, OUTPUTS)


def test_a_token_multiplies_all_parameters_but_embedding_and_norms(tmp_path):
    """Counted by transformers in the model that is served."""
    folder = workload.write_model(tmp_path, TINY)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    counted = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name
    )
    assert workload.trained_parameters(TINY) == counted
    # Llama-3.1-8B: 8.03 G parameters, of which the embedding has 0.525 G.
    assert workload.trained_parameters(LLAMA_8B) == pytest.approx(7.505e9, rel=1e-3)
    assert workload.mfu(100.0, LLAMA_8B, 4 * 7.505e9 * 200) == pytest.approx(0.5, rel=1e-3)


def test_rows_have_the_length_and_the_job_takes_them(tmp_path):
    from vllm_flexft.data.dataset import TrainingData

    folder = workload.write_model(tmp_path / "model", TINY)
    rows = workload.write_rows(tmp_path / "rows.jsonl", TINY, count=5)
    job = FinetuneJob.from_mapping(workload.job(rows, TINY, tmp_path / "out"))
    data = TrainingData.load(job.dataset, AutoTokenizer.from_pretrained(folder), max_model_len=512)
    assert data.report.tokens == 5 * TINY.length
    # A row's first token is never predicted.
    assert data.report.targets >= 5 * (TINY.length - 1)


def test_the_trainer_makes_steps_of_each_micro_batch(tmp_path):
    folder = workload.write_model(tmp_path, TINY)
    trainer = DedicatedTrainer(folder, TINY, liger=False, checkpointing=True)
    before = [p.detach().clone() for p in trainer._parameters]
    found = measure(trainer, steps=1)
    assert list(found["tokens_per_second"]) == list(TINY.micro_batches)
    assert all(pace > 0 for pace in found["tokens_per_second"].values())
    assert any((p != q).any() for p, q in zip(trainer._parameters, before, strict=True))


def test_the_best_micro_batch_is_of_those_that_fitted():
    found = best({1: 10.0, 2: 30.0, 4: 20.0, 8: None})
    assert found == {"best_micro_batch": 2, "best_tokens_per_second": 30.0}


RATES = {"5": {"finetune_tps": 85.0, "attainment": 0.99, "tpot_mean_ms": 30.0}}


def test_the_summary_states_the_goals_figures():
    records = {
        "trainer": {"tokens_per_second": 100.0},
        "inference": {"rates": RATES, "memory": {}},
        "co_serving": {
            "idle": {"tokens_per_second": 110.0, "mfu": 0.56},
            "rates": RATES,
            "memory": {},
        },
    }
    found = summary(records)
    assert found["co_serving_vs_trainer"] == {"5": 0.85}
    assert found["idle_vs_trainer"] == 1.1
    assert found["idle_mfu"] == 0.56
    assert summary({}) == {}


def test_a_part_that_fails_is_written_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(run):
        raise OSError("no space left")

    monkeypatch.setattr(Run, "kernels", fail)
    monkeypatch.setattr(Run, "trainer", lambda run: {"tokens_per_second": 100.0})
    arguments = parse(["--dry-run", "--out", str(tmp_path), "--only", "kernels", "trainer"])
    assert Run(arguments, tmp_path).run() == 1
    read = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("dry-*.json")}
    assert read["dry-kernels.json"]["error"] == "no space left"
    assert read["dry-summary.json"]["trainer_tps"] == 100.0
