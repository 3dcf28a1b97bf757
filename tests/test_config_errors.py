"""Every refused job says the key's path, the value and what would be accepted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vllm_flexft.config import FinetuneJob, JobError, ServerOptions

MINIMAL = {"name": "a", "dataset": {"path": "train.jsonl"}}


def refusal(**sections) -> str:
    with pytest.raises(JobError) as caught:
        FinetuneJob.from_mapping({**MINIMAL, **sections})
    return str(caught.value)


def yaml_refusal(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as caught:
        FinetuneJob.from_yaml(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("peft", "r", 0, "an integer, 1 to 512"),
        ("peft", "r", 513, "an integer, 1 to 512"),
        ("peft", "r", "8", "an integer, 1 to 512"),
        ("peft", "r", True, "an integer, 1 to 512"),
        ("peft", "r", 8.0, "an integer, 1 to 512"),
        ("peft", "peft_type", "ia3", "lora"),
        ("peft", "lora_alpha", 0, "a number > 0"),
        ("peft", "target_modules", ["lm_head"], "'lm_head' is no target; expected all-linear"),
        ("peft", "target_modules", ["qkv", "q_proj", "mlp"], "'qkv', 'mlp' are no targets"),
        ("peft", "target_modules", [], "some of q_proj, k_proj"),
        ("peft", "target_modules", ".*proj", "all-linear, or a list out of q_proj"),
        ("peft", "layers_to_transform", [-1], "a layer index >= 0"),
        ("peft", "layers_to_transform", True, "a layer index >= 0"),
        ("peft", "use_rslora", "yes", "true or false"),
        ("peft", "lora_dropout", 0.1, "training.weight_decay"),
        ("peft", "bias", "all", "only `none` is accepted"),
        ("training", "learning_rate", 0, "a number > 0"),
        ("training", "learning_rate", float("nan"), "a number > 0"),
        ("training", "learning_rate", "fast", "a number > 0"),
        ("training", "max_steps", 0, "-1 (train by epochs), or an integer > 0"),
        ("training", "max_steps", -2, "-1 (train by epochs), or an integer > 0"),
        ("training", "warmup_ratio", 1.5, "a number in [0, 1]"),
        ("training", "warmup_steps", 0.1, "use warmup_ratio"),
        ("training", "adam_beta1", 1, "a number in [0, 1)"),
        ("training", "optim", "adamw_8bit", "one of adamw_torch, sgd"),
        ("training", "lr_scheduler_type", "polynomial", "one of linear, cosine"),
        ("training", "seed", -1, "an integer, 0 to 2**32 - 1"),
        ("training", "gradient_accumulation_steps", 0, "an integer >= 1"),
        ("training", "fp16", True, "the server's --dtype"),
        ("training", "packing", True, "share a batch without padding"),
        ("slo", "tpot_ms", 0, "milliseconds > 0"),
    ],
)
def test_impossible_value_is_refused_with_path_value_and_remedy(
    section: str, key: str, value: object, expected: str
) -> None:
    message = refusal(**{section: {key: value}})
    assert "\n" not in message
    assert message.startswith(f"{section}.{key}: ")
    assert repr(value) in message
    assert expected in message


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, "..", "a@step-1", "a\n", 5, None])
def test_name_that_is_no_name_is_refused(name: object) -> None:
    assert refusal(name=name).startswith("name: got ")


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ("training", "learning_rat", "did you mean training.learning_rate?"),
        ("training", "Learning-Rate", "did you mean training.learning_rate?"),
        ("dataset", "max_lenght", "did you mean dataset.max_length?"),
        ("training", "r", "it belongs at peft.r"),
        ("training", "max_length", "it belongs at dataset.max_length"),
        ("training", "num_epochs", "use training.num_train_epochs"),
        ("peft", "lora_r", "use peft.r"),
        ("peft", "lora_rank", "use peft.r"),
        ("training", "lr", "use training.learning_rate"),
        ("training", "batch_size", "use training.train_batch_size"),
        ("dataset", "cutoff_len", "use dataset.max_length"),
        ("peft", "use_dora", "vLLM serves no DoRA"),
        ("peft", "modules_to_save", "not supported"),
        ("training", "deepspeed", "vllm serve --tensor-parallel-size"),
        ("peft", "zzz", "accepted here: peft_type, r, lora_alpha"),
    ],
)
def test_unknown_key_is_refused_with_the_name_of_ours(
    section: str, key: str, suggestion: str
) -> None:
    message = refusal(**{section: {**MINIMAL.get(section, {}), key: 1}})
    assert message.startswith(f"{section}.{key}: ")
    assert suggestion in message


def test_top_level_key_of_a_section_is_refused_with_its_place() -> None:
    assert "it belongs at training.learning_rate" in refusal(learning_rate=1.0)


def test_every_common_trainer_key_gets_more_than_a_list_of_keys() -> None:
    """Keys of TrainingArguments that people set; the reference is the class itself."""
    common = [
        "fp16",
        "deepspeed",
        "gradient_checkpointing",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "load_best_model_at_end",
        "dataloader_num_workers",
        "neftune_noise_alpha",
        "push_to_hub",
        "resume_from_checkpoint",
        "torch_compile",
        "optim_args",
        "lr_scheduler_kwargs",
        "data_seed",
        "run_name",
        "per_device_eval_batch_size",
        "label_smoothing_factor",
        "use_liger_kernel",
    ]
    fields = set(TrainingArguments.__dataclass_fields__)
    assert set(common) <= fields
    generic = [key for key in common if "accepted here" in refusal(training={key: "x"})]
    assert generic == []


def test_all_mistakes_are_told_one_a_line() -> None:
    message = refusal(name=1, peft={"r": 0, "lora_r": 1}, training={"seed": "x"})
    starts = [line.split(":")[0] for line in message.split("\n")]
    assert sorted(starts) == ["name", "peft.lora_r", "peft.r", "training.seed"]


def test_missing_keys_are_named() -> None:
    with pytest.raises(JobError) as caught:
        FinetuneJob.from_mapping({"dataset": {}})
    lines = str(caught.value).split("\n")
    assert [line.split(",")[0] for line in lines] == ["name: missing", "dataset.path: missing"]


def test_preference_format_is_refused_by_name() -> None:
    message = refusal(dataset={"path": "x.csv", "format": "preference"})
    assert message.startswith("dataset.format: got 'preference'")
    assert "completion: chosen" in message


def test_columns_the_wrong_way_round_are_refused() -> None:
    message = refusal(dataset={"path": "x.csv", "columns": {"question": "prompt"}})
    assert message.startswith("dataset.columns: ")
    assert "'question' is no column of ours" in message


@pytest.mark.parametrize(
    "training",
    [
        {"warmup_ratio": 0.1, "warmup_steps": 5},
        {"train_batch_size": 5, "per_device_train_batch_size": 2},
    ],
)
def test_keys_that_contradict_each_other_are_refused(training: dict) -> None:
    assert "give one of them" in refusal(training=training)


def test_early_stopping_without_validation_is_refused() -> None:
    message = refusal(training={"early_stopping_patience": 3})
    assert message.startswith("training.early_stopping_patience: got 3")
    assert "validation.path" in message


@pytest.mark.parametrize("section", ["dataset", "validation", "peft", "training", "slo"])
def test_section_that_is_no_mapping_is_refused(section: str) -> None:
    assert refusal(**{section: "x"}).startswith(f"{section}: got 'x', expected ")


def test_reporter_that_is_not_installed_is_refused_with_the_remedy() -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert refusal(report_to=["wandb"]).endswith("pip install wandb")


def test_unknown_reporter_is_refused() -> None:
    assert "'mlflow' is none of tensorboard, wandb" in refusal(report_to="mlflow")


def test_mapping_that_is_none_is_refused() -> None:
    with pytest.raises(JobError, match="expected a mapping"):
        FinetuneJob.from_mapping([1])  # type: ignore[arg-type]


def test_key_that_is_no_string_is_refused() -> None:
    assert "keys are strings" in refusal(training={1: 2})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\ndataset: {path: [}\n", "line 2, column 18: not YAML"),
        ("name: a\n\tb: 1\n", "line 2, column 1: not YAML"),
        ("name: a\nname: b\n", "line 2, column 1: not YAML: duplicate key 'name'"),
        ("", "the file is empty"),
        ("- 1\n", "expected a mapping"),
        ("name: &x [*x]\n", "name: got [[...]]"),
        (b"name: \xff\n", "not UTF-8 at byte 6"),
    ],
)
def test_file_that_is_no_job_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    path = tmp_path / "job.yaml"
    assert yaml_refusal(path, text).startswith(f"{path}: {expected}")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such file"):
        FinetuneJob.from_yaml(tmp_path / "job.yaml")


def test_every_line_of_a_yaml_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    lines = yaml_refusal(path, "name: a\ndataset: {}\npeft: {r: 0}\n").split("\n")
    assert [line.split(": ")[:2] for line in lines] == [
        [str(path), "dataset.path"],
        [str(path), "peft.r"],
    ]


def test_server_option_is_refused_with_the_flag_it_came_from() -> None:
    with pytest.raises(JobError) as caught:
        ServerOptions.from_mapping({"tpot": 5, "max_jobs_at_once": 0})
    lines = str(caught.value).split("\n")
    assert lines[1].startswith("co-finetune-config.max_jobs_at_once: got 0, expected")
    assert lines[0].startswith("co-finetune-config.tpot: unknown key")
