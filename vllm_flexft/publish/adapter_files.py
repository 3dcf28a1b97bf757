"""A LoRA adapter as PEFT's two files, written and read without building a PEFT model.

Tensors are named by PEFT's keys throughout training, so that a file is a dict and a dict a file:

    base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight    [R, in]
    base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight    [out, R]

They are stored in float32, the masters' dtype: PEFT keeps adapters of bf16 models in float32 by
default (`autocast_adapter_dtype`), vLLM casts as it loads, and `init_adapter` loses nothing.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_flexft.config import LINEAR_MODULES, JobError, PeftConfig
from vllm_flexft.publish import fsops
from vllm_flexft.publish.tensor_file import safetensors_chunks

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# target module -> the block of a decoder layer that holds it, in the order of the forward pass
MODULES = {
    module: "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    for module in LINEAR_MODULES
}
_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight"
)
# init_lora_weights that only set the start values; the others (PiSSA, OLoRA, CorDA, LoftQ)
# change the base weights too, which a serving engine cannot do for one adapter.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Set to anything but null, false or empty, each of these makes it another method than plain LoRA.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "fan_in_fan_out",
)


class AdapterError(JobError):
    """An adapter folder that cannot be read or used; the message names folder and reason."""


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json decides the adapter's function."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]  # those with weights in the file, in forward order
    layers: tuple[int, ...]  # likewise, ascending
    base_model: str | None


def adapter_key(layer: int, module: str, matrix: Literal["A", "B"]) -> str:
    """PEFT's name of one LoRA matrix."""
    return f"base_model.model.model.layers.{layer}.{MODULES[module]}.{module}.lora_{matrix}.weight"


def parse_adapter_key(key: str) -> tuple[int, str, str]:
    """(layer, module, "A" or "B"). Raises ValueError for a key that we would not write."""
    match = _KEY.fullmatch(key)
    if match is None or MODULES.get(match[3]) != match[2]:
        raise ValueError(f"{key!r} is none of the LoRA weights of {', '.join(MODULES)}")
    return int(match[1]), match[3], match[4]


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], peft: PeftConfig, base_model: str
) -> dict[str, fsops.FileSum]:
    """Write PEFT's two files into the existing `folder`; their sums by file name.

    `tensors`: every A and B, by `adapter_key`. Not atomic: callers write aside and rename.
    """
    weights, config = adapter_chunks(tensors, peft, base_model)
    return {
        WEIGHTS_FILE: fsops.write_file(folder / WEIGHTS_FILE, weights),
        CONFIG_FILE: fsops.write_file(folder / CONFIG_FILE, [config]),
    }


def adapter_chunks(
    tensors: Mapping[str, torch.Tensor], peft: PeftConfig, base_model: str
) -> tuple[Any, bytes]:
    """The content of the two files: chunks of the weights, and the config."""
    modules, layers, rank = _check_tensors(tensors)
    assert rank == peft.r, (rank, peft.r)
    chosen = peft.layers_to_transform
    assert chosen is None or set(chosen) == set(layers), (chosen, layers)
    # Only keys that PEFT has had for years: older releases load it, newer ones fill in the rest.
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None if chosen is None else list(layers),
        "loftq_config": {},
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": peft.r,
        "rank_pattern": {},
        "revision": None,
        # Never "all-linear": PEFT would then expect weights for linears that are not served.
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": peft.use_rslora,
    }
    masters = {name: t.to(torch.float32) for name, t in tensors.items()}
    return safetensors_chunks(masters), json.dumps(config, indent=2).encode() + b"\n"


def read_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], AdapterConfig]:
    """The float32 weights of a plain LoRA adapter, on CPU, and its config.

    `lora_dropout` is ignored: it acts only in training, and ours has none.
    Raises AdapterError for anything that would be another function than ours: DoRA, other PEFT
    types, biases, fully trained modules, ranks or alphas per module, foreign layers.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        tensors = {name: t.to(torch.float32) for name, t in load_file(path).items()}
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}"
            + (
                "; convert adapter_model.bin with PEFT's save_pretrained(safe_serialization=True)"
                if (folder / "adapter_model.bin").exists()
                else ""
            )
        ) from None
    except (OSError, SafetensorError) as e:
        raise AdapterError(f"{path} cannot be read: {e}") from e
    try:
        modules, layers, rank = _check_tensors(tensors)
    except ValueError as e:
        raise AdapterError(f"{path}: {e}") from e
    if rank != raw["r"]:
        raise AdapterError(f"{path} has rank {rank}, {CONFIG_FILE} says r = {raw['r']}")
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise AdapterError(f"{path}: {bad[0]} holds values that are not finite")
    config = AdapterConfig(
        r=rank,
        lora_alpha=raw["lora_alpha"],
        use_rslora=bool(raw.get("use_rslora", False)),
        target_modules=modules,
        layers=layers,
        base_model=raw.get("base_model_name_or_path"),
    )
    return tensors, config


def check_init_adapter(
    config: AdapterConfig, peft: PeftConfig, modules: Sequence[str], layers: Sequence[int]
) -> None:
    """Raises AdapterError, naming each difference, unless a job can start from the adapter.

    `modules`, `layers`: what the job trains on the model at hand.
    """
    pairs = {
        "r": (config.r, peft.r),
        "lora_alpha": (config.lora_alpha, peft.lora_alpha),
        "use_rslora": (config.use_rslora, peft.use_rslora),
        "target_modules": (sorted(config.target_modules), sorted(modules)),
        "layers_to_transform": (sorted(config.layers), sorted(layers)),
    }
    differences = [f"{k}: adapter {a}, job {b}" for k, (a, b) in pairs.items() if a != b]
    if differences:
        raise AdapterError(
            f"peft.init_adapter {peft.init_adapter}: {'; '.join(differences)}. "
            "Give the job the adapter's values"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{folder} is no PEFT adapter: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path} cannot be read: {e}") from e
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} is not a JSON object")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {raw.get('peft_type')!r}; only 'LORA' is supported")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias {raw['bias']!r}; only 'none' is supported")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights {raw['init_lora_weights']!r} changes the base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in _UNSUPPORTED:
        if raw.get(key):
            raise AdapterError(f"{path}: {key} = {raw[key]!r} is not supported, only plain LoRA")
    for key in ("r", "lora_alpha"):
        if isinstance(raw.get(key), bool) or not isinstance(raw.get(key), int | float):
            raise AdapterError(f"{path}: {key} is {raw.get(key)!r}, not a number")
    return raw


def _check_tensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """(modules in forward order, layers ascending, rank) of a complete set of A and B.

    Raises ValueError otherwise.
    """
    parsed = {parse_adapter_key(key): t for key, t in tensors.items()}
    if not parsed:
        raise ValueError("it holds no LoRA weights")
    found = {module for _, module, _ in parsed}
    modules = tuple(m for m in MODULES if m in found)
    layers = tuple(sorted({layer for layer, _, _ in parsed}))
    ranks = set()
    for place in itertools.product(layers, modules, "AB"):
        # A gap would be filled by PEFT with random values and by vLLM with none.
        if place not in parsed:
            raise ValueError("layer {} has no {}.lora_{}".format(*place))
        if parsed[place].dim() != 2:
            raise ValueError("layer {} {}.lora_{} is not a matrix".format(*place))
        ranks.add(parsed[place].shape[0 if place[2] == "A" else 1])
    if len(ranks) != 1:
        raise ValueError(f"it has different ranks: {sorted(ranks)}")
    return modules, layers, ranks.pop()
