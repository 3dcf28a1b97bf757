"""vllm_flexft/obs/metrics.py"""

import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.obs.metrics import MetricsWriter, read_metrics, restore

STEP = {
    "epoch": 0.5,
    "loss": 1.25,
    "learning_rate": 2e-4,
    "grad_norm": 0.8,
    "num_tokens": 100,
    "num_input_tokens": 300,
    "tokens_per_second": 42.0,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_step_line_has_exactly_the_documented_keys(tmp_path, path) -> None:
    MetricsWriter(tmp_path).log_step(step=1, **STEP)
    [line] = [json.loads(text) for text in path.read_text().splitlines()]
    assert list(line) == ["step", *STEP, "time"]
    assert line.items() >= STEP.items()


def test_a_validation_line_carries_the_evaluation(tmp_path, path) -> None:
    MetricsWriter(tmp_path).log_validation(step=3, eval_loss=1.5, eval_mean_token_accuracy=0.25)
    [line] = read_metrics(path)
    assert line.keys() == {"step", "eval_loss", "eval_mean_token_accuracy", "time"}


def test_each_line_is_on_disk_when_the_call_returns(tmp_path, path) -> None:
    writer = MetricsWriter(tmp_path / "new")
    for step in (1, 2):
        writer.log_step(step=step, **STEP)
        assert steps(tmp_path / "new" / "metrics.jsonl") == list(range(1, step + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_null_and_flagged(value, tmp_path, path) -> None:
    written = MetricsWriter(tmp_path).log_step(step=1, **STEP | {"loss": value})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["non_finite"] == {"loss": str(value)}
    assert written == line


class TestResume:
    def test_lines_of_lost_steps_are_dropped(self, tmp_path, path) -> None:
        writer = MetricsWriter(tmp_path)
        for step in range(1, 8):
            writer.log_step(step=step, **STEP)
            if step % 2 == 0:
                writer.log_validation(step=step, eval_loss=1, eval_mean_token_accuracy=0)
        writer.close()
        MetricsWriter(tmp_path, resume_step=4).log_step(step=5, **STEP)
        assert steps(path) == [1, 2, 2, 3, 4, 4, 5]

    def test_a_torn_last_line_is_dropped(self, tmp_path, path) -> None:
        path.write_text('{"step": 1}\n{"step": 2, "lo')
        MetricsWriter(tmp_path, resume_step=2).log_step(step=3, **STEP)
        assert steps(path) == [1, 3]

    def test_a_complete_last_line_without_its_newline_is_torn_too(self, path) -> None:
        path.write_text('{"step": 1}\n{"step": 2}')
        restore(path, 2)
        assert path.read_text() == '{"step": 1}\n'

    def test_a_fresh_start_drops_everything(self, tmp_path, path) -> None:
        path.write_text('{"step": 0, "eval_loss": 1.0}\n{"step": 1}\n')
        MetricsWriter(tmp_path, resume_step=0)
        assert steps(path) == []

    def test_nothing_is_rewritten_when_nothing_is_lost(self, path) -> None:
        path.write_text('{"step": 1}\n{"step": 2}\n')
        before = path.stat().st_ino
        restore(path, 2)
        assert path.stat().st_ino == before

    def test_lines_that_a_crash_kept_from_being_written_come_from_the_checkpoint(
        self, path
    ) -> None:
        path.write_text('{"step": 1}\n{"step": 2, "eval_loss": 1.0}\n{"step": 4}\n')
        history = [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 2, "eval_loss": 1.0}]
        restore(path, 3, history)
        assert read_metrics(path) == [
            {"step": 1},
            {"step": 2},
            {"step": 2, "eval_loss": 1.0},
            {"step": 3},
        ]

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(last=st.integers(0, 12), resume=st.integers(1, 14), cut=st.integers(0, 400))
    def test_any_cut_and_any_resume_give_the_undisturbed_file(
        self, tmp_path_factory, last, resume, cut
    ) -> None:
        whole = "".join(f'{{"step": {s}}}\n' for s in range(1, last + 1)).encode()
        path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
        path.write_bytes(whole[:cut])
        restore(path, resume)
        kept = path.read_bytes()
        assert whole.startswith(kept)
        complete = whole[:cut].count(b"\n")
        assert kept.count(b"\n") == min(complete, resume)


def test_reading_a_missing_file_gives_nothing(path) -> None:
    assert read_metrics(path) == []


class TestBackends:
    def test_none_is_imported_unless_asked_for(self, tmp_path) -> None:
        before = set(sys.modules)
        MetricsWriter(tmp_path).log_step(step=1, **STEP)
        assert not {"wandb", "tensorboard"} & (set(sys.modules) - before)

    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_one_that_is_not_installed_is_named_with_the_remedy(
        self, name, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)  # Python's own way to make an import fail
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        with pytest.raises(ValueError, match=f"pip install {name}"):
            MetricsWriter(tmp_path, report_to=[name])

    def test_an_unknown_one_is_refused(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="'mlflow' is none of tensorboard, wandb"):
            MetricsWriter(tmp_path, report_to=["mlflow"])

    def test_one_that_fails_is_switched_off_and_the_run_goes_on(
        self, tmp_path, path, caplog
    ) -> None:
        class Broken:
            calls = 0

            def log(self, step, values):
                self.calls += 1
                raise ConnectionError("no network")

            def close(self):
                raise AssertionError("it was switched off")

        writer, broken = MetricsWriter(tmp_path), Broken()
        writer._backends.append(broken)
        writer.log_step(step=1, **STEP)
        writer.log_step(step=2, **STEP)
        writer.close()
        assert (steps(path), broken.calls) == ([1, 2], 1)
        assert "Broken is switched off" in caplog.text

    def test_tensorboard_gets_every_scalar(self, tmp_path) -> None:
        pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        writer = MetricsWriter(tmp_path, report_to=["tensorboard"])
        writer.log_step(step=1, **STEP)
        writer.log_step(step=2, **STEP | {"loss": 1.0})
        writer.log_validation(step=2, eval_loss=1.5, eval_mean_token_accuracy=0.25)
        writer.close()
        events = EventAccumulator(str(tmp_path / "runs"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.25), (2, 1.0)]
        assert [e.value for e in events.Scalars("eval/eval_loss")] == [1.5]

    def test_wandb_gets_every_scalar_in_one_run_across_a_resume(
        self, tmp_path, monkeypatch
    ) -> None:
        pytest.importorskip("wandb", reason="wandb is not installed")
        monkeypatch.setenv("WANDB_MODE", "offline")
        for resume_step in (0, 1):
            writer = MetricsWriter(tmp_path, resume_step, report_to=["wandb"], run_name="gsm8k")
            run = writer._backends[0]._run
            writer.log_step(step=resume_step + 1, **STEP)
            assert run.summary["loss"] == 1.25
            assert run.id == (tmp_path / "wandb_run_id").read_text()
            writer.close()
