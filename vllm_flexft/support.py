"""What co-serving does not support: refused at start, by the option's name, with what to do.

Three checks, since they see different things: the command line (front end), `EngineArgs` (before
vLLM turns them into a config, so that its own error does not come first), and the finished
`VllmConfig` (model, types).
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

VLLM_SERIES = "0.32."
PLATFORMS = ("cpu",)  # "cuda" joins once steps have run on a GPU; till then by an option
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DTYPES = ("float32", "bfloat16")
CUDA_DTYPES = ("bfloat16",)  # vLLM's LoRA kernels for GPUs assert half precision


class Unsupported(NamedTuple):
    """An option that co-serving refuses.

    Args:
        option: as the user knows it.
        used: whether `EngineArgs` ask for it.
        remedy: why not, and what to do.
    """

    option: str
    used: Callable[[Any], Any]
    remedy: str


_ONE_GPU = "for now co-serving runs on one device; leave it at 1"
_NOT_YET = "not handled yet; leave it out"
_OWN_CLASS = "--co-finetune sets its own; leave it out"
_MOVING_WEIGHTS = "the backward reads the base weights while serving; leave it out"

_ENGINE_ARGS = (
    Unsupported("--pipeline-parallel-size", lambda a: a.pipeline_parallel_size > 1, _ONE_GPU),
    Unsupported("--tensor-parallel-size", lambda a: a.tensor_parallel_size > 1, _ONE_GPU),
    Unsupported(
        "--data-parallel-size",
        lambda a: a.data_parallel_size > 1 or a.data_parallel_external_lb,
        "for now co-serving runs on one device; start one server a replica",
    ),
    Unsupported(
        "--prefill-context-parallel-size", lambda a: a.prefill_context_parallel_size > 1, _ONE_GPU
    ),
    Unsupported(
        "--decode-context-parallel-size", lambda a: a.decode_context_parallel_size > 1, _ONE_GPU
    ),
    Unsupported(
        "--enable-elastic-ep",
        lambda a: a.enable_elastic_ep,
        "ranks that come and go would lose the job in training; leave it out",
    ),
    Unsupported(
        "--enable-eplb",
        lambda a: a.enable_eplb,
        "it moves expert weights that the backward reads; leave it out",
    ),
    Unsupported("--nnodes", lambda a: a.nnodes > 1, "for now co-serving runs on one machine"),
    Unsupported(
        "--distributed-executor-backend",
        lambda a: a.distributed_executor_backend not in (None, "mp", "uni"),
        "use mp or uni, or leave it out",
    ),
    Unsupported(
        "--speculative-config",
        lambda a: a.speculative_config or a.spec_method or a.spec_model or a.spec_tokens,
        "speculative decoding is not handled yet; leave it out",
    ),
    Unsupported(
        "--kv-transfer-config",
        lambda a: a.kv_transfer_config,
        "KV connectors are not handled yet: they would move training's blocks; leave it out",
    ),
    Unsupported("--kv-offloading-size", lambda a: a.kv_offloading_size, _NOT_YET),
    Unsupported("--ec-transfer-config", lambda a: a.ec_transfer_config, _NOT_YET),
    Unsupported("--kv-sharing-fast-prefill", lambda a: a.kv_sharing_fast_prefill, _NOT_YET),
    Unsupported(
        "--no-enable-chunked-prefill",
        lambda a: a.enable_chunked_prefill is False,
        "training sequences ride as prefill chunks; leave it out",
    ),
    Unsupported(
        "--enable-dbo",
        lambda a: a.enable_dbo or a.ubatch_size > 1,
        "micro-batched steps are not handled yet; leave it out",
    ),
    Unsupported(
        "--enable-sleep-mode",
        lambda a: a.enable_sleep_mode,
        "a sleeping engine gives up the weights and blocks that training holds; leave it out",
    ),
    Unsupported("--cpu-offload-gb", lambda a: a.cpu_offload_gb > 0, _MOVING_WEIGHTS),
    Unsupported("--offload-group-size", lambda a: a.offload_group_size > 0, _MOVING_WEIGHTS),
    Unsupported("--weight-transfer-config", lambda a: a.weight_transfer_config, _MOVING_WEIGHTS),
    Unsupported(
        "--quantization",
        lambda a: a.quantization,
        "quantised base weights are not handled yet; serve the model in bfloat16 or float32",
    ),
    Unsupported("--kv-cache-dtype-skip-layers", lambda a: a.kv_cache_dtype_skip_layers, _NOT_YET),
    Unsupported(
        "--fully-sharded-loras",
        lambda a: a.fully_sharded_loras,
        "training writes to plain LoRA slots; leave it out",
    ),
    Unsupported(
        "--skip-tokenizer-init",
        lambda a: a.skip_tokenizer_init or a.tokens_only,
        "training data are read with the model's tokenizer; leave it out",
    ),
    Unsupported(
        "--runner pooling",
        lambda a: a.runner not in ("auto", "generate") or a.convert not in ("auto", "none"),
        "co-serving needs a generating model; serve pooling models without --co-finetune",
    ),
    Unsupported(
        "--model-impl",
        lambda a: a.model_impl not in ("auto", "vllm"),
        "only vLLM's own model implementations are supported; leave it out",
    ),
    Unsupported("--scheduler-cls", lambda a: a.scheduler_cls is not None, _OWN_CLASS),
    Unsupported("--worker-cls", lambda a: a.worker_cls != "auto", _OWN_CLASS),
)


def check_front_end(args: Namespace) -> None:
    """Refuse front ends that do not load plugins.

    Raises:
        ValueError: naming the option.
    """
    if getattr(args, "grpc", False):
        _refuse("--grpc", "it loads no endpoint plugins; use the HTTP server")
    _check_rust_front_end()


def check_engine_args(
    args: EngineArgs, *, headless: bool = False, experimental_cuda: bool = False
) -> None:
    """Refuse what can be seen in the engine's arguments and in the environment.

    Args:
        experimental_cuda: the server option of that name.

    Raises:
        ValueError: naming the first unsupported option and what to do instead.
    """
    import vllm
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(VLLM_SERIES):
        _refuse(
            f"vLLM {vllm.__version__}",
            f"this version of vllm-flexft works with vLLM {VLLM_SERIES}*; "
            f"install vllm=={VLLM_SERIES}*",
        )
    if current_platform.is_rocm() or current_platform.device_type not in (*PLATFORMS, "cuda"):
        name = current_platform.device_name or current_platform.device_type
        _refuse(f"platform {name}", f"use one of: {', '.join(PLATFORMS)}")
    if current_platform.device_type == "cuda" and not experimental_cuda:
        _refuse(
            "platform cuda",
            "no step of it has run on a GPU (docs/gpu.md says what is known); "
            """use cpu, or try it with --co-finetune-config '{"experimental_cuda": true}'""",
        )
    if headless:
        _refuse("--headless", "adapters are published by the API server; leave it out")
    _check_rust_front_end()
    if _environment_flag("VLLM_LORA_ENABLE_DUAL_STREAM"):
        _refuse("VLLM_LORA_ENABLE_DUAL_STREAM", "training uses its own stream; unset it")
    for option in _ENGINE_ARGS:
        if option.used(args):
            _refuse(option.option, option.remedy)


def check_engine_config(vllm_config: VllmConfig) -> None:
    """Refuse models and types that can only be seen in the finished config.

    Raises:
        ValueError: naming what is unsupported and what is supported.
    """
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    dtype = _dtype_name(model.dtype)
    dtypes = CUDA_DTYPES if current_platform.device_type == "cuda" else DTYPES
    architectures = ", ".join(ARCHITECTURES)
    if model.runner_type != "generate":
        _refuse(f"runner {model.runner_type}", "co-serving needs a generating model")
    if model.architecture not in ARCHITECTURES:
        _refuse(f"architecture {model.architecture}", f"supported are {architectures}")
    if model.quantization is not None:
        _refuse(
            f"quantization {model.quantization} of the model",
            "serve an unquantised checkpoint of it",
        )
    if dtype not in dtypes:
        _refuse(f"--dtype {dtype}", f"use one of: {', '.join(dtypes)}")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", dtype):
        _refuse(
            f"--kv-cache-dtype {cache_dtype}",
            f"the backward reads keys and values in the model's {dtype}; leave it at auto",
        )
    if current_platform.is_cpu() and vllm_config.use_v2_model_runner:
        _refuse("model runner V2 on CPU", "unset VLLM_USE_V2_MODEL_RUNNER, or set it to 0")
    lora_dtype = _dtype_name(vllm_config.lora_config.lora_dtype)
    if lora_dtype not in ("auto", dtype):
        _refuse(f"--lora-dtype {lora_dtype}", f"the model is in {dtype}; leave it at auto")


def _check_rust_front_end() -> None:
    if _environment_flag("VLLM_USE_RUST_FRONTEND"):
        _refuse("VLLM_USE_RUST_FRONTEND", "the Rust front end loads no plugins; unset it")


def _environment_flag(name: str) -> bool:
    return os.environ.get(name, "0").strip().lower() not in ("", "0", "false")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(option: str, remedy: str) -> None:
    raise ValueError(f"--co-finetune does not work with {option}: {remedy}")
