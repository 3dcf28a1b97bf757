"""The job schema: defaults, accepted spellings, round trip, hash, paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_flexft.config import (
    LINEAR_MODULES,
    DatasetConfig,
    FinetuneJob,
    JobError,
    PeftConfig,
    ServerOptions,
    SLOConfig,
    TrainingConfig,
    ValidationConfig,
)
from vllm_flexft.config.job import what_is_trained

MINIMAL = {"name": "a", "dataset": {"path": "train.jsonl"}}

DOCUMENTED = """
name: gsm8k                     # served under this name
dataset:
  path: train.jsonl
  format: auto
  columns: {prompt: question, completion: answer}
  max_length: 1024
  overlong: truncate
  completion_only_loss: true
  shuffle: true
validation:
  path: valid.jsonl
  every_steps: 50
peft:
  peft_type: lora
  r: 8
  lora_alpha: 16
  target_modules: all-linear
  layers_to_transform: null
  use_rslora: false
  init_adapter: null
training:
  num_train_epochs: 3
  max_steps: -1
  train_batch_size: 8
  optim: adamw_torch
  learning_rate: 2.0e-4
  lr_scheduler_type: linear
  warmup_ratio: 0.0
  weight_decay: 0.0
  max_grad_norm: 1.0
  seed: 42
  save_steps: 100
  save_total_limit: 2
  early_stopping_patience: null
slo:
  tpot_ms: 50
  ttft_ms: 5000
output_dir: adapters/gsm8k
"""


def job(**sections) -> FinetuneJob:
    return FinetuneJob.from_mapping({**MINIMAL, **sections})


def test_documented_job_is_read_and_equals_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(DOCUMENTED)
    read = FinetuneJob.from_yaml(tmp_path / "job.yaml")
    short = FinetuneJob.from_mapping(
        {
            "name": "gsm8k",
            "dataset": {
                "path": "train.jsonl",
                "columns": {"prompt": "question", "completion": "answer"},
            },
            "validation": {"path": "valid.jsonl"},
            "slo": {"tpot_ms": 50, "ttft_ms": 5000},
            "output_dir": "adapters/gsm8k",
        }
    )
    assert read == short


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: a\ndataset: {path: x.csv}\ntraining: {learning_rate: 2e-4, adam_epsilon: 1.0E-6}"
    )
    training = FinetuneJob.from_yaml(tmp_path / "job.yaml").training
    assert (training.learning_rate, training.adam_epsilon) == (2e-4, 1e-6)


names = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).filter(lambda s: s.strip("."))
jobs = st.fixed_dictionaries(
    {"name": names, "dataset": st.fixed_dictionaries({"path": st.text(min_size=1)})},
    optional={
        "validation": st.fixed_dictionaries(
            {"path": st.just("v.json")}, optional={"max_length": st.integers(2, 9999)}
        ),
        "peft": st.fixed_dictionaries(
            {},
            optional={
                "r": st.integers(1, 512),
                "lora_alpha": st.floats(1e-3, 1e6) | st.integers(1, 999),
                "target_modules": st.lists(st.sampled_from(LINEAR_MODULES), min_size=1),
                "layers_to_transform": st.lists(st.integers(0, 99), min_size=1)
                | st.integers(0, 99)
                | st.none(),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-300, 1e300),
                "seed": st.integers(0, 2**32 - 1),
                "save_total_limit": st.none() | st.integers(1, 9),
            },
        ),
        "slo": st.fixed_dictionaries({}, optional={"tpot_ms": st.floats(1, 1e6)}),
        "output_dir": st.just("out/é"),
    },
)


@given(mapping=jobs)
@settings(derandomize=True, deadline=None)
def test_job_yaml_reads_back_as_an_equal_job(tmp_path_factory, mapping) -> None:
    original = FinetuneJob.from_mapping(mapping)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(original.to_yaml(), encoding="utf-8", newline="")
    again = FinetuneJob.from_yaml(path)
    assert (again, again.config_hash()) == (original, original.config_hash())


def test_job_yaml_has_every_default_filled_in() -> None:
    written = yaml.safe_load(job(validation={"path": "v.csv"}, slo={}).to_yaml())
    for section, model in [
        (written, FinetuneJob),
        (written["dataset"], DatasetConfig),
        (written["validation"], ValidationConfig),
        (written["peft"], PeftConfig),
        (written["training"], TrainingConfig),
        (written["slo"], SLOConfig),
    ]:
        assert list(section) == list(model.model_fields)


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "from vllm_flexft.config import FinetuneJob\n"
        f"print(FinetuneJob.from_mapping({MINIMAL!r}).config_hash())"
    )
    root = Path(__file__).resolve().parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
    )
    assert other.stdout.strip() == job().config_hash()


def test_hash_ignores_order_and_spelling_but_not_values() -> None:
    one = job(peft={"target_modules": ["v_proj", "q_proj"], "lora_alpha": 32.0})
    same = job(peft={"lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "q_proj"]})
    other = job(peft={"lora_alpha": 32, "target_modules": ["q_proj"]})
    assert one.config_hash() == same.config_hash() != other.config_hash()


@pytest.mark.parametrize(
    "keys",
    [
        {"slo": {"tpot_ms": 80}},
        {"priority": 3, "weight": 2.0},
        {"training": {"save_steps": 7, "save_total_limit": None}},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_hash_ignores_what_the_weights_do_not_depend_on(keys: dict) -> None:
    assert job(**keys).config_hash() == job().config_hash()


def test_hash_depends_on_every_other_value() -> None:
    assert job(training={"seed": 1}).config_hash() != job().config_hash()
    ignored = {"slo", "priority", "weight", "report_to"}
    trained = what_is_trained(job().model_dump(mode="json"))
    assert trained.keys() == FinetuneJob.model_fields.keys() - ignored


def test_relative_paths_are_relative_to_base_dir(tmp_path: Path) -> None:
    mapping = {
        **MINIMAL,
        "validation": {"path": "/abs/v.csv"},
        "output_dir": "out",
        "peft": {"init_adapter": "start"},
    }
    read = FinetuneJob.from_mapping(mapping, base_dir=tmp_path)
    assert read.validation is not None
    assert [read.dataset.path, read.validation.path, read.output_dir, read.peft.init_adapter] == [
        str(tmp_path / "train.jsonl"),
        "/abs/v.csv",
        tmp_path / "out",
        tmp_path / "start",
    ]


def test_relative_paths_of_a_yaml_file_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text("name: a\ndataset: {path: train.jsonl}")
    monkeypatch.chdir(tmp_path)
    assert FinetuneJob.from_yaml("jobs/job.yaml").dataset.path == str(tmp_path / "train.jsonl")


def test_dataset_id_is_left_as_typed() -> None:
    assert job(dataset={"path": "org/name"}).dataset.path == "org/name"


def test_output_dir_defaults_to_the_state_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_FLEXFT_STATE_DIR", str(tmp_path / "state"))
    options = ServerOptions()
    assert job().resolve_output_dir(options) == tmp_path / "state" / "adapters" / "a"
    assert job().with_output_dir(options).output_dir == tmp_path / "state" / "adapters" / "a"
    assert job(output_dir="/x").resolve_output_dir(options) == Path("/x")


def test_state_dir_defaults_to_the_user_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_FLEXFT_STATE_DIR", raising=False)
    assert ServerOptions().state_dir == Path.home() / ".cache" / "vllm-flexft"


def test_trainer_batch_size_is_per_device_times_accumulation() -> None:
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert job(training=training).training.train_batch_size == 6
    assert job(training={"gradient_accumulation_steps": 2}).training.train_batch_size == 16


@pytest.mark.parametrize(
    ("section", "pasted"),
    [
        ("dataset", {"path": "train.jsonl", "packing": False}),
        ("dataset", {"path": "train.jsonl", "dataset_text_field": "text"}),
        ("dataset", {"path": "train.jsonl", "assistant_only_loss": True}),
        ("training", {"bf16": True, "packing": False, "fp16": False}),
        ("peft", {"lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}),
        ("peft", {"peft_type": "LORA", "use_dora": False, "modules_to_save": None}),
    ],
)
def test_pasted_keys_that_change_nothing_are_accepted(section: str, pasted: dict) -> None:
    assert job(**{section: pasted}) == job()


def test_dataset_text_field_renames_the_text_column() -> None:
    read = job(dataset={"path": "x.csv", "dataset_text_field": "body"})
    assert read.dataset.columns == {"text": "body"}


def test_validation_takes_left_out_keys_from_the_dataset() -> None:
    read = job(
        dataset={"path": "x.csv", "columns": {"text": "body"}, "max_length": 77},
        validation={"path": "y.csv", "max_length": 99},
    )
    assert read.validation is not None
    assert (read.validation.columns, read.validation.max_length) == ({"text": "body"}, 99)


def test_all_linear_is_the_seven_linears_and_a_list_is_in_layer_order() -> None:
    assert PeftConfig().target_module_names == LINEAR_MODULES
    subset = job(peft={"target_modules": ["down_proj", "q_proj"]}).peft
    assert subset.target_module_names == ("q_proj", "down_proj")


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert PeftConfig(r=16, lora_alpha=8).scaling == 0.5
    assert PeftConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().training.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("value", [-0.1, 1, 1.5])
def test_finetuning_cannot_be_promised_all_of_the_time(value):
    with pytest.raises(JobError, match="min_share"):
        ServerOptions.from_mapping({"min_share": value})
