"""The door into vLLM, with vLLM's real parser and config classes; no engine is started."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness.model_config import save_config
from vllm.config import CompilationMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_flexft import plugin
from vllm_flexft.plugin import PUBLISHED_ADAPTERS
from vllm_flexft.wiring import CoServeConfig

plugin.register()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("model"), dtype="float32")


@pytest.fixture
def environment(monkeypatch):
    """Undoes what the plugin writes to os.environ."""
    monkeypatch.setenv("VLLM_PLUGINS", "to be removed")
    monkeypatch.delenv("VLLM_PLUGINS")
    return monkeypatch


@pytest.fixture
def job_file(tmp_path):
    def write(name="tiny", file="job.yaml", **sections):
        path = tmp_path / file
        path.write_text(yaml.safe_dump({"name": name, "dataset": {"path": "t.jsonl"}, **sections}))
        return str(path)

    return write


def parse(*argv, model="MODEL"):
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(["--model", model, *argv])


def from_command_line(*argv, model):
    engine_args = AsyncEngineArgs.from_cli_args(parse(*argv, model=model))
    return engine_args.create_engine_config()


def in_process(model, **kwargs):
    return EngineArgs(model=model, **kwargs).create_engine_config()


# ---- the flag


def test_engine_config_without_the_flag_is_that_of_stock_vllm(model):
    def dump(plugins, prologue):
        code = (
            f"{prologue}\n"
            "from vllm.engine.arg_utils import EngineArgs\n"
            f"config = EngineArgs(model={model!r}, max_loras=3).create_engine_config()\n"
            "config.instance_id = ''\n"
            "print(config, config.compute_hash(), config.parallel_config.worker_cls,"
            " config.scheduler_config.scheduler_cls, config.additional_config)"
        )
        environment = {**os.environ, "VLLM_PLUGINS": plugins}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        return out.stdout.splitlines()[-1]

    stock = dump("", "")
    assert b"LlamaForCausalLM" in stock or b"model=" in stock
    assert dump("flexft", "from vllm_flexft.plugin import register; register()") == stock


def test_register_twice_adds_the_options_once():
    plugin.register()
    parser = make_arg_parser(FlexibleArgumentParser())
    assert [a.dest for a in parser._actions].count("co_finetune") == 1


def test_without_the_flag_nothing_is_written_to_the_namespace(environment):
    args = parse()
    AsyncEngineArgs.from_cli_args(args)
    assert (args.co_finetune, args.additional_config) == (None, {})
    assert "VLLM_PLUGINS" not in os.environ


def test_bare_flag_co_serves_without_a_job(model, environment):
    config = from_command_line("--co-finetune", model=model)
    assert CoServeConfig.from_vllm_config(config).jobs == ()


def test_flag_takes_several_job_files(model, environment, job_file):
    files = [job_file("one", "1.yaml"), job_file("two", "2.yaml")]
    config = from_command_line("--co-finetune", *files, model=model)
    jobs = CoServeConfig.from_vllm_config(config).jobs
    assert [(entry.source, entry.job.name) for entry in jobs] == list(
        zip(files, ("one", "two"), strict=True)
    )


@pytest.mark.parametrize("form", ["string", "list"])
def test_vllm_config_file_names_the_job(model, environment, job_file, tmp_path, form):
    path = job_file("tiny")
    config_file = tmp_path / "serve.yaml"
    value = path if form == "string" else [path]
    config_file.write_text(yaml.safe_dump({"model": model, "co-finetune": value}))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--config", str(config_file)])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert [e.job.name for e in CoServeConfig.from_vllm_config(config).jobs] == ["tiny"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--co-finetune-config", '{"tpot_ms": 50}'),
        ("--co-finetune-config.tpot_ms", "50"),
        ("--co-finetune-config.tpot_ms=50",),
    ],
)
def test_options_take_json_and_dotted_keys(model, environment, argv):
    config = from_command_line("--co-finetune", *argv, model=model)
    assert CoServeConfig.from_vllm_config(config).options.tpot_ms == 50


@pytest.mark.parametrize("form", ["path", "list of paths", "mapping", "list of mappings"])
def test_llm_in_process_takes_the_same_job_as_the_flag(model, environment, job_file, form):
    path = job_file("tiny", peft={"r": 4})
    mapping = yaml.safe_load(Path(path).read_text())
    value = {"path": path, "list of paths": [path], "mapping": mapping}.get(form, [mapping])
    ours = in_process(model, additional_config={"co_finetune": value})
    flag = from_command_line("--co-finetune", path, model=model)
    (a,), (b,) = (CoServeConfig.from_vllm_config(config).jobs for config in (ours, flag))
    assert a.job == b.job


def test_what_travels_is_plain_json(model, environment, job_file):
    config = from_command_line("--co-finetune", job_file("a"), "/missing.yaml", model=model)
    carried = config.additional_config
    assert json.loads(json.dumps(carried)) == carried
    assert [sorted(entry) for entry in carried["co_finetune"]] == [
        ["job", "source"],
        ["error", "source"],
    ]


def test_reading_the_arguments_again_in_an_api_server_changes_nothing(environment, job_file):
    args = parse("--co-finetune", job_file("a"))
    AsyncEngineArgs.from_cli_args(args)
    first = json.dumps(args.additional_config)
    AsyncEngineArgs.from_cli_args(args)
    assert json.dumps(args.additional_config) == first


# ---- bad input


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "missing.yaml"),
        ("name: [", "YAML"),
        ("name: a\ndataset: {path: t.jsonl}\nlearning_rte: 1\n", "learning_rte"),
        ("name: a\ndataset: {path: t.jsonl}\npeft: {r: -3}\n", "peft.r"),
    ],
)
def test_bad_job_file_is_one_error_line_and_the_server_comes_up(
    model, environment, tmp_path, caplog, content, named
):
    path = tmp_path / "missing.yaml"
    if content is not None:
        path.write_text(content)
    config = from_command_line("--co-finetune", str(path), model=model)
    (entry,) = CoServeConfig.from_vllm_config(config).jobs
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert entry.job is None
    assert len(errors) == 1
    assert "\n" not in errors[0]
    assert named in errors[0]
    assert entry.error in errors[0]


def test_each_mistake_of_an_inline_job_is_a_line_with_its_name_unknown_keys_first(
    model, environment, caplog
):
    job = {"name": "pybad", "dataset": {"path": "t.jsonl"}, "peft": {"r": 0}, "lora": {}}
    config = in_process(model, additional_config={"co_finetune": [job]})
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    start = "Finetune job pybad (inline) is refused: "
    assert [line.removeprefix(start).split(":")[0] for line in errors] == ["lora", "peft.r"]
    (entry,) = CoServeConfig.from_vllm_config(config).jobs
    assert entry.name == "pybad"


def test_it_travels_whether_the_user_set_the_rank(model, environment):
    for argv, given in (((), False), (("--max-lora-rank", "16"), True)):
        config = from_command_line("--co-finetune", *argv, model=model)
        assert CoServeConfig.from_vllm_config(config).rank_was_given is given


@pytest.mark.parametrize(
    ("value", "named"),
    [('{"tpot_ms": -1}', "tpot_ms"), ('{"tpot": 1}', "tpot"), ("{", "JSON"), ("[1]", "object")],
)
def test_bad_options_refuse_to_start_by_name(environment, capsys, value, named):
    with pytest.raises((ValueError, SystemExit)) as error:
        AsyncEngineArgs.from_cli_args(parse("--co-finetune", "--co-finetune-config", value))
    assert named in str(error.value) + capsys.readouterr().err


def test_options_without_the_flag_are_refused(environment):
    with pytest.raises(ValueError, match="without --co-finetune"):
        AsyncEngineArgs.from_cli_args(parse("--co-finetune-config.tpot_ms", "50"))


@pytest.mark.parametrize("taken", ["served", "adapter", "other job"])
def test_name_in_use_is_refused_and_says_by_what(model, environment, job_file, tmp_path, taken):
    argv = {
        "served": ("--served-model-name", "same"),
        "adapter": ("--lora-modules", f"same={tmp_path}"),
        "other job": (),
    }[taken]
    jobs = [job_file("same", "last.yaml")]
    if taken == "other job":
        jobs.insert(0, job_file("same", "first.yaml"))
    config = from_command_line("--co-finetune", *jobs, *argv, model=model)
    entry = CoServeConfig.from_vllm_config(config).jobs[-1]
    assert "'same' is already used by" in entry.error


# ---- LoRA limits


@pytest.mark.parametrize(
    ("r", "argv", "expected"),
    [(4, (), 16), (24, (), 32), (200, (), 256), (4, ("--max-lora-rank", "64"), 64)],
)
def test_max_lora_rank_is_the_smallest_that_serves_user_and_jobs(
    model, environment, job_file, r, argv, expected
):
    config = from_command_line("--co-finetune", job_file(peft={"r": r}), *argv, model=model)
    assert config.lora_config.max_lora_rank == expected


@pytest.mark.parametrize("given", [8, 16])
def test_rank_beyond_an_explicit_limit_refuses_the_job(model, environment, job_file, given):
    argv = ("--co-finetune", job_file(peft={"r": 32}), "--max-lora-rank", str(given))
    config = from_command_line(*argv, model=model)
    (entry,) = CoServeConfig.from_vllm_config(config).jobs
    assert entry.error == (
        f"peft.r is 32, but the server was started with --max-lora-rank {given}; "
        "raise or leave out --max-lora-rank, or lower peft.r"
    )


def test_training_slots_come_on_top_of_the_users_max_loras(model, environment):
    argv = ("--max-loras", "3", "--max-cpu-loras", "5")
    config = from_command_line("--co-finetune", *argv, model=model)
    ours = CoServeConfig.from_vllm_config(config)
    assert (config.lora_config.max_loras, config.lora_config.max_cpu_loras) == (4, 6)
    assert (ours.serving_max_loras, ours.num_training_slots) == (3, 1)


def test_adapter_cache_has_room_for_published_adapters_unless_the_user_set_it(model, environment):
    config = from_command_line("--co-finetune", "--max-loras", "3", model=model)
    assert config.lora_config.max_loras == 4
    assert config.lora_config.max_cpu_loras == 4 + PUBLISHED_ADAPTERS


def test_second_config_of_the_same_arguments_is_the_same(model, environment, job_file):
    engine_args = EngineArgs(model=model, additional_config={"co_finetune": job_file()})
    first, second = engine_args.create_engine_config(), engine_args.create_engine_config()
    assert first.lora_config == second.lora_config
    assert engine_args.max_loras == 1


def test_the_model_stays_compiled_on_cpu_as_without_the_plugin(model, environment):
    config = in_process(model, additional_config={"co_finetune": []}).compilation_config
    plain = in_process(model).compilation_config
    assert config.mode == plain.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert config.custom_ops == plain.custom_ops
    assert config.inductor_compile_config == plain.inductor_compile_config


def test_what_the_user_says_of_compiling_holds(model, environment):
    eager = in_process(model, additional_config={"co_finetune": []}, enforce_eager=True)
    assert eager.compilation_config.mode == CompilationMode.NONE


def test_an_engine_beside_a_co_serving_one_that_has_lora_is_compiled_as_vllm_has_it(
    model, environment
):
    in_process(model, additional_config={"co_finetune": []})
    assert in_process(model, enable_lora=True).compilation_config.mode == CompilationMode.NONE


def test_users_additional_config_is_not_changed(model, environment, job_file):
    mine = {"co_finetune": job_file(), "mine": 1}
    config = in_process(model, additional_config=mine)
    assert set(mine) == {"co_finetune", "mine"}
    assert config.additional_config["mine"] == 1


# ---- worker, scheduler, plugins


def test_worker_and_scheduler_are_ours(model, environment):
    config = from_command_line("--co-finetune", model=model)
    assert config.parallel_config.worker_cls == plugin.WORKERS["cpu"]
    assert config.scheduler_config.scheduler_cls == plugin.SCHEDULER


def test_async_scheduling_gets_the_async_scheduler():
    class SchedulerConfig:
        async_scheduling = True
        scheduler_cls = None

    assert plugin.scheduler_for(SchedulerConfig()) == plugin.ASYNC_SCHEDULER


def test_allowlist_keeps_every_plugin_that_was_on_and_adds_ours(environment, monkeypatch):
    class Point:
        def __init__(self, name):
            self.name = name

    found = {
        "vllm.general_plugins": [Point("flexft"), Point("other")],
        "vllm.stat_logger_plugins": [Point("stats")],
        "vllm.endpoint_plugins": [Point("routes of someone else")],
    }
    monkeypatch.setattr(plugin, "entry_points", lambda group: found.get(group, []))
    plugin.allow_plugins()
    assert os.environ["VLLM_PLUGINS"] == "flexft,other,stats"


def test_users_own_allowlist_is_left_alone(environment, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "flexft")
    AsyncEngineArgs.from_cli_args(parse("--co-finetune"))
    assert os.environ["VLLM_PLUGINS"] == "flexft"


def test_help_text_of_the_parser_can_be_built():
    parser = argparse.ArgumentParser()
    plugin.add_options(parser)
    assert "--co-finetune" in parser.format_help()
