"""The GPU benchmark's own arithmetic; `python -m benchmarks.gpu --dry-run` runs all of it."""

import itertools
import json
import re
import statistics
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.co_serving.client import Answer
from benchmarks.co_serving.measures import JUDGED_TOKENS, judged
from benchmarks.co_serving.trace import Arrival
from benchmarks.gpu import serving, workload
from benchmarks.gpu.__main__ import TOLD, Run, overheads, parse, summary
from benchmarks.gpu.arrivals import OUTPUTS, PROMPTS, Lengths, Traffic, from_traces, synthetic
from benchmarks.gpu.checks import GROUPS, ROOT, read
from benchmarks.gpu.dedicated import DedicatedTrainer, best, fitting, measure
from benchmarks.gpu.serving import SLO, Setup
from benchmarks.gpu.sharing import DedicatedProcess
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


def rate(finetune_tps: float) -> dict[str, dict[str, float]]:
    return {"5": {**dict.fromkeys(TOLD, 0.0), "finetune_tps": finetune_tps}}


def test_the_summary_states_the_goals_figures():
    records = {
        "trainer": {
            "tokens_per_second": 100.0,
            "ways": {"sdpa": {"peak_bytes": 7}},
        },
        "inference": {
            "rounds": {"one": [1.0, 1.0, 1.0]},
            "rates": rate(0.0),
            "memory": {"kv_cache_tokens": 10},
        },
        "co_serving": {
            "rounds": {"one": [1.02, 1.01, 1.0]},
            "idle": {"tokens_per_second": 110.0, "mfu": 0.56},
            "rates": rate(85.0),
            "memory": {"kv_cache_tokens": 8},
        },
        "sharing": {"systems": {"spatial": rate(40.0)}, "memory": {"kv_cache_tokens": 4}},
        "checks": {"passed": 5, "failed": 0, "skipped": 1, "groups": {}},
    }
    found = summary(records)
    assert found["co_serving_vs_trainer"] == {"5": 0.85}
    assert found["idle_vs_trainer"] == 1.1
    assert found["idle_mfu"] == 0.56
    assert found["plugin_without_job"]["one"]["overhead"] == 0.01
    trained = {name: of["5"]["finetune_tps"] for name, of in found["systems"].items()}
    assert trained == {"inference": 0.0, "co_serving": 85.0, "spatial": 40.0}
    held = {name: of.get("kv_cache_tokens") for name, of in found["memory"].items()}
    assert held == {"inference": 10, "co_serving": 8, "sharing": 4, "trainer": None}
    assert found["checks"] == {"passed": 5, "failed": 0, "skipped": 1}
    assert summary({}) == {}


def test_an_overhead_comes_with_what_rounds_differ_by_anyway():
    found = overheads({"one": [1.01, 1.01, 1.01, 1.01]}, {"one": [0.9, 1.0, 1.0, 1.1]})
    assert found["one"]["overhead"] == 0.01
    assert found["one"]["spread"] > 0.01


def test_an_answer_cut_off_is_judged_by_its_tokens_so_far_where_there_are_enough():
    arrival = Arrival(0.0, 10, 400, "conv")

    def cut_off(last: int) -> Answer:
        tokens = [(1.0, 1), (1.0 + 0.02 * (last - 1), last)]
        return Answer(arrival, 0.0, tokens, ended=tokens[-1][0] + 0.02, error="cut off")

    few, enough = judged([cut_off(JUDGED_TOKENS - 1), cut_off(JUDGED_TOKENS)])
    assert not SLO.met(few)
    assert SLO.met(enough)
    assert enough.tpot_s == pytest.approx(0.02)


def test_an_answer_that_stood_still_until_it_was_cut_off_is_late():
    tokens = [(1.0, 1), (1.5, JUDGED_TOKENS)]
    (told,) = judged([Answer(Arrival(0.0, 10, 400, ""), 0.0, tokens, 9.0, "cut off")])
    assert not SLO.met(told)


class Small:
    """A trainer that has memory for so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows, self.cleared = rows, 0

    def step(self, micro_batch: int) -> None:
        if micro_batch > self.rows:
            raise torch.OutOfMemoryError

    def clear(self) -> None:
        self.cleared += 1


def test_a_micro_batch_is_halved_until_it_fits():
    trainer = Small(rows=3)
    assert fitting(trainer, 16) == 2
    assert trainer.cleared == 3
    with pytest.raises(torch.OutOfMemoryError):
        fitting(Small(rows=0), 4)


HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_ready_when_it_is_healthy_and_tells_what_taking_turns_stops(
    tmp_path, monkeypatch
):
    def command(setup, port, *options):
        return [sys.executable, "-c", HEALTHY, str(port)]

    monkeypatch.setattr(serving, "command", command)
    with serving.GpuServer(Setup(tmp_path, TINY, True, 1.0, Traffic(None)), "healthy") as server:
        server.wait_until_ready()
        assert server.engine() == []  # this one has no engine


def test_the_trainer_beside_a_server_logs_its_updates_until_it_is_killed(tmp_path):
    setup = Setup(tmp_path, TINY, True, 1.0, Traffic(None))
    trainer = DedicatedProcess(setup, tmp_path / "log.jsonl", 4, ["--tiny"])
    try:
        assert trainer.ready() == 4
        assert trainer.updates()[0].tokens == TINY.batch * TINY.length
    finally:
        trainer.close()


def test_the_checks_are_read_with_what_was_wrong_and_what_they_recorded(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('error', 0.5)\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_none(): pytest.skip('no graphs')\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", str(tmp_path)]
    subprocess.run(command, check=False, capture_output=True, cwd=tmp_path)
    tests, figures = read(report)
    assert tests["test_good"] == "passed"
    assert tests["test_bad"].startswith("failed: assert 1 == 2")
    assert tests["test_none"].startswith("skipped: ")
    assert figures == {"error": 0.5}


def test_every_test_for_a_gpu_is_in_a_group_of_the_checks():
    named = [test for group in GROUPS.values() for test in group.tests if "::" in test]
    written = [
        f"tests/gpu/{path.name}::{name}"
        for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(written)


def test_a_part_that_fails_is_written_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(run):
        raise OSError("no space left")

    monkeypatch.setattr(Run, "kernels", fail)
    monkeypatch.setattr(Run, "trainer", lambda run: {"tokens_per_second": 100.0, "ways": {}})
    arguments = parse(["--dry-run", "--out", str(tmp_path), "--only", "kernels", "trainer"])
    assert Run(arguments, tmp_path).run() == 1
    read = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("dry-*.json")}
    assert read["dry-kernels.json"]["error"] == "no space left"
    assert read["dry-summary.json"]["trainer_tps"] == 100.0
