"""`flexft plan`: what a job will cost, from the model's config alone.

No weights are loaded, so a 70B job can be sized on a laptop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vllm_flexft.cli.plan_data import plan_data
from vllm_flexft.cli.plan_text import KVBlocks, draw, render
from vllm_flexft.cli.sizing import ITEMSIZE, longest_sequence, measured_flops, plan_job
from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.files import DataError
from vllm_flexft.graph.families import family_of
from vllm_flexft.graph.ops import ModelShape

Number = TypeVar("Number", int, float)

UNBOUNDED = 2**31  # positions, for a model whose config names no limit


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plan", help="what a job will cost in memory and time")
    parser.add_argument("model", help="model folder, config.json or Hugging Face id")
    parser.add_argument("job", nargs="?", help="job file; without one: all linears, r 8")
    parser.add_argument("--rank", type=_positive(int), help="LoRA rank, in place of the job's")
    parser.add_argument("--max-length", type=_positive(int), help="tokens, in place of the job's")
    parser.add_argument("--memory-gib", type=_positive(float), default=float("inf"), help="budget")
    parser.add_argument("--policy", choices=["auto", "fast", "minimal", "offload"], default="auto")
    parser.add_argument("--dtype", choices=list(ITEMSIZE), help="default: the model's")
    parser.add_argument(
        "--block-size",
        type=_positive(int),
        help="tokens of a KV-cache block (default: 16 where there is CUDA, else 128)",
    )
    parser.add_argument("--no-profile", action="store_true", help="do not measure this machine")
    parser.add_argument("--png", type=_png, metavar="FILE", help="draw it too (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """1 for a job whose data would be refused.

    Raises ValueError or OSError with a message for the user.
    """
    job = _job(arguments)
    config = _model_config(arguments.model)
    shape = ModelShape.from_hf_config(config)
    dtype = arguments.dtype or str(config.dtype or "bfloat16").removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise ValueError(
            f"the model's dtype {dtype} is not supported; give --dtype {' or '.join(ITEMSIZE)}"
        )
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is not None and (tokens := longest_sequence(job)) > longest:
        raise ValueError(
            f"{tokens} tokens are more than the model's {longest} positions; "
            f"give --max-length {longest} or less"
        )
    plan = plan_job(
        shape,
        job,
        dtype=dtype,
        budget_gib=arguments.memory_gib,
        policy=arguments.policy,
        positions=longest,
    )
    flops = None if arguments.no_profile else measured_flops(shape, dtype)
    print(render(plan, _kv_blocks(arguments.block_size), flops))
    if arguments.png is not None:
        draw(plan, arguments.png)
    if arguments.job is None:
        return 0
    try:
        data = plan_data(job, arguments.model, longest or UNBOUNDED)
    except DataError as error:
        print(f"flexft plan: the job would be refused: {error}", file=sys.stderr)
        return 1
    speed = None if flops is None else flops / plan.work.total
    print("", *data.lines(speed), sep="\n")
    return 0


def _model_config(model: str) -> Any:
    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or model[0] in ".~" or model.count("/") > 1):
        raise ValueError(f"{model}: no such folder; give a model folder, a config.json or an id")

    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig

    hub_logging.set_verbosity_error()  # not every retry without a network: the refusal says it
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{model}: no model config there ({reason}); give a model folder, a config.json or "
            "a Hugging Face id"
        ) from None
    family_of((config.architectures or ["unknown"])[0])
    return config


def _job(arguments: argparse.Namespace) -> FinetuneJob:
    """The job file, else all linears, with what the command line puts in its place."""
    if arguments.job is not None:
        job = FinetuneJob.from_yaml(Path(arguments.job))
    else:
        job = FinetuneJob.from_mapping({"name": "plan", "dataset": {"path": "rows.jsonl"}})
    changes = {"dataset.max_length": arguments.max_length, "peft.r": arguments.rank}
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        return job
    mapping = job.model_dump(mode="json")
    if job.validation is not None and arguments.max_length is not None:
        given["validation.max_length"] = arguments.max_length
    for key, value in given.items():
        section, name = key.split(".")
        mapping[section][name] = value
    return FinetuneJob.from_mapping(mapping)


def _kv_blocks(size: int | None) -> KVBlocks:
    """vLLM's own sizes where none is given."""
    if size is not None:
        return KVBlocks(size)
    import torch

    on_gpu = torch.cuda.is_available()
    return KVBlocks(16, ", as with CUDA") if on_gpu else KVBlocks(128, ", as on CPU")


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return Path(text)


def _positive(kind: type[Number]) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value

    number.__name__ = kind.__name__  # argparse names it where `text` is no number
    return number
