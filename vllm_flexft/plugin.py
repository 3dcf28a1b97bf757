"""The one door into vLLM: called by vLLM in every process, through `vllm.general_plugins`.

Adds `--co-finetune` and `--co-finetune-config` to vLLM's command line and turns an engine that asks
for them, or `LLM(..., additional_config={"co_finetune": ...})`, into a co-serving one. An engine
that does not ask is left exactly as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

NAME = "flexft"

WORKERS = {
    "cpu": "vllm_flexft.runner.worker.CoServeCPUWorker",
    "cuda": "vllm_flexft.runner.worker.CoServeGPUWorker",
}
SCHEDULER = "vllm_flexft.sched.scheduler.CoServeScheduler"
ASYNC_SCHEDULER = "vllm_flexft.sched.scheduler.CoServeAsyncScheduler"

PUBLISHED_ADAPTERS = 2  # that vLLM's cache of adapters has room for beyond the LoRA slots

# An allowlist in VLLM_PLUGINS holds for all groups. Those of these groups would be loaded without
# one; endpoint plugins other than ours would not, and stay off.
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def register() -> None:
    """Install the command-line and engine-config patches. Idempotent; imports no torch code."""
    from flexft_patches import cli_args, engine_config, from_cli_args

    cli_args.install(add_options)
    from_cli_args.install(read_options)
    engine_config.install(build_engine_config)
    # vLLM warns of every scheduler class but its own, as if async scheduling had been turned off.
    logging.getLogger("vllm.config.scheduler").addFilter(_not_about_our_scheduler)


def _not_about_our_scheduler(record: logging.LogRecord) -> bool:
    return record.args not in ((SCHEDULER,), (ASYNC_SCHEDULER,))


def install_worker_patches() -> None:
    """Patches that a co-serving worker needs before it loads the model.

    CPU: LoRA by segment GEMMs, and plain weights kept for the backward. CUDA: none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from flexft_patches import cpu_weights, punica_cpu

        punica_cpu.install()
        cpu_weights.install()


class _StoreExplicitly(argparse._StoreAction):
    """Stores the value and that it was given, which a value equal to the default does not tell."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, f"{self.dest}_was_given", True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to vLLM's parser."""
    group = parser.add_argument_group(
        title="FinetuneConfig",
        description="Finetune LoRA adapters while serving (vllm-flexft).",
    )
    group.add_argument(
        "--co-finetune",
        nargs="*",
        default=None,
        metavar="JOB.yaml",
        help="Finetune in the serving engine's spare time: job files to start with. Without a "
        "file the server takes jobs later.",
    )
    group.add_argument(
        "--co-finetune-config",
        type=_json_object,
        default=None,
        help="Server-wide finetuning options. Should either be a valid JSON string or JSON keys "
        "passed individually, as in --co-finetune-config.tpot_ms 50.",
    )
    for action in parser._actions:
        if action.dest == "max_lora_rank":
            action.__class__ = _StoreExplicitly


def read_options(args: argparse.Namespace) -> None:
    """Move the options into `args.additional_config`, from where every process gets them.

    Raises:
        ValueError: a wrong `--co-finetune-config`, or a front end that cannot co-serve.
    """
    from vllm_flexft import support, wiring

    carried = dict(getattr(args, "additional_config", None) or {})
    if getattr(args, "co_finetune", None) is not None:
        carried.setdefault(wiring.JOBS_KEY, args.co_finetune)
    if getattr(args, "co_finetune_config", None) is not None:
        if not wiring.requested(carried):
            raise ValueError("--co-finetune-config was given without --co-finetune")
        carried.setdefault(wiring.OPTIONS_KEY, args.co_finetune_config)
    if not wiring.requested(carried):
        return
    support.check_front_end(args)
    names = list(getattr(args, "served_model_name", None) or [args.model])
    names += [module.name for module in getattr(args, "lora_modules", None) or []]
    explicit = getattr(args, "max_lora_rank_was_given", False)
    args.additional_config = wiring.normalise(
        carried, max_rank=args.max_lora_rank if explicit else None, reserved_names=names
    )
    allow_plugins()


def build_engine_config(
    create: Callable[[], VllmConfig], engine_args: EngineArgs, headless: bool
) -> VllmConfig:
    """vLLM's engine config, changed where co-serving needs it.

    `engine_args` keep the user's values, so that building a second config gives the same.

    Raises:
        ValueError: an option or a model that co-serving does not support, by name.
    """
    carried = getattr(engine_args, "additional_config", None)
    if not isinstance(carried, dict) or carried.get("co_finetune") in (None, False):
        return create()

    from vllm.platforms import current_platform

    from flexft_patches import cpu_compile
    from vllm_flexft import support, wiring

    support.check_engine_args(
        engine_args,
        headless=headless,
        experimental_cuda=wiring.read_options(carried).experimental_cuda,
    )
    names = engine_args.served_model_name or engine_args.model
    # LLM(...) does not tell a value from its default; 16 given there counts as not given.
    explicit = engine_args.max_lora_rank != type(engine_args).max_lora_rank
    engine_args.additional_config = carried = wiring.normalise(
        carried,
        max_rank=engine_args.max_lora_rank if explicit else None,
        reserved_names=[names] if isinstance(names, str) else names,
    )
    changed = _lora_and_worker(engine_args, carried)
    if current_platform.is_cpu():
        cpu_compile.install(_co_serves)
    with _Overridden(engine_args, **changed):
        vllm_config = create()
    support.check_engine_config(vllm_config)
    # Only now is it known whether vLLM schedules asynchronously: it decides while it builds the
    # config, whatever the scheduler's class, and a class of the other kind would not fit.
    vllm_config.scheduler_config.scheduler_cls = scheduler_for(vllm_config.scheduler_config)
    return vllm_config


def scheduler_for(scheduler_config: Any) -> str:
    """Our scheduler that goes with vLLM's sync or async one."""
    return ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER


def allow_plugins() -> None:
    """Let vLLM load our endpoint plugin, which it does only for names in `VLLM_PLUGINS`.

    Where the user has set the variable it names us already, or this code would not run.
    """
    if "VLLM_PLUGINS" in os.environ:
        return
    found = {point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(found | {NAME}))


def _lora_and_worker(engine_args: EngineArgs, carried: dict[str, Any]) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from vllm_flexft import wiring

    training_slots = wiring.read_options(carried).max_jobs_at_once
    max_loras = engine_args.max_loras + training_slots
    if engine_args.max_cpu_loras:
        max_cpu_loras = engine_args.max_cpu_loras + training_slots
    else:
        # vLLM's default, max_loras, has no room for an adapter just published: loading it would
        # evict one that requests use, which is then read from disk again in the middle of a step.
        max_cpu_loras = max_loras + PUBLISHED_ADAPTERS
    return {
        "enable_lora": True,
        "max_lora_rank": wiring.required_rank(carried, engine_args.max_lora_rank),
        "max_loras": max_loras,
        "max_cpu_loras": max_cpu_loras,  # the training adapters live in this cache as well
        "worker_cls": WORKERS[current_platform.device_type],
    }


def _co_serves(vllm_config: VllmConfig) -> bool:
    from vllm_flexft import wiring

    carried = vllm_config.additional_config
    return isinstance(carried, dict) and wiring.requested(carried)


class _Overridden:
    """Attributes of an object that have other values inside the `with` block."""

    def __init__(self, target: Any, **values: Any) -> None:
        self.target, self.values = target, values

    def __enter__(self) -> None:
        self.saved = {name: getattr(self.target, name) for name in self.values}
        vars(self.target).update(self.values)

    def __exit__(self, *exc_info: object) -> None:
        vars(self.target).update(self.saved)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value
