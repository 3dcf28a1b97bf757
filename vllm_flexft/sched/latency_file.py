"""What the latency model has learnt, kept beside vLLM's compile cache for the next start.

One file for each model, engine configuration and machine, under `VLLM_CACHE_ROOT/flexft`. Read when
the engine starts and written when a job ends and when the engine stops, never in a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_flexft.sched.latency import Feature, LatencyModel

logger = logging.getLogger("vllm.flexft")

WORTH_KEEPING = 500  # steps: a new start learns as much in a minute
FORMAT = 1  # of the file and of what the costs mean


class LatencyFile:
    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """`identity`: all that step times depend on, plain data."""
        self.identity = {
            "format": FORMAT,
            "features": [feature.name for feature in Feature],
            **identity,
        }
        text = json.dumps(self.identity, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"step-times-{key[:16]}.json"

    def load(self, model: LatencyModel) -> bool:
        """Start `model` from the file, if there is one that fits; else leave it as it is."""
        try:
            content = json.loads(self.path.read_text())
            if content["identity"] != self.identity:
                raise ValueError("it is of another model, configuration or machine")
            model.restore(content["state"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("step times in %s are ignored: %s", self.path, error)
            return False
        logger.info("step times of earlier runs from %s", self.path)
        return True

    def save(self, state: Mapping[str, Any]) -> None:
        """Write `LatencyModel.state()` aside, then rename, once it says enough. Where that fails
        the next start is a cold one."""
        if state["num_observed"] < WORTH_KEEPING:
            return
        content = json.dumps({"identity": self.identity, "state": state})
        partial = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, prefix=self.path.stem, delete=False
            ) as file:
                partial = file.name
                file.write(content)
            os.replace(partial, self.path)
        except OSError as error:
            logger.warning("step times could not be kept in %s: %s", self.path, error)
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)


def latency_file(vllm_config: Any) -> LatencyFile:
    """Of an engine on this machine."""
    import torch
    import vllm
    from vllm import envs
    from vllm.platforms import current_platform

    device = vllm_config.device_config.device_type
    name = _cpu_name() if device == "cpu" else current_platform.get_device_name()
    identity = {
        "vllm": vllm.__version__,
        "model": vllm_config.model_config.compute_hash(),
        "parallel": vllm_config.parallel_config.compute_hash(),
        "eager": vllm_config.model_config.enforce_eager,
        "block_size": vllm_config.cache_config.block_size,
        "device": name,
        "threads": [os.cpu_count(), torch.get_num_threads()] if device == "cpu" else None,
    }
    return LatencyFile(Path(envs.VLLM_CACHE_ROOT) / "flexft", identity)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
