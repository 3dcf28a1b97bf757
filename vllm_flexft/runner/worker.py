"""vLLM workers whose model runner also finetunes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_flexft.plugin import install_worker_patches
from vllm_flexft.runner.hook import add_finetuning
from vllm_flexft.train.stream import prefer_forwards
from vllm_flexft.wiring import CoServeConfig, memory_budget

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _WorkerBase
else:
    _WorkerBase = object


class _CoServeWorker(_WorkerBase):
    def init_device(self) -> None:
        install_worker_patches()
        super().init_device()
        config = CoServeConfig.from_vllm_config(self.vllm_config)
        assert config is not None, "co-serving worker without co-serving configuration"
        add_finetuning(self.model_runner, config)
        if config.options.overlap_backward and self.device.type == "cuda":
            prefer_forwards(self.device)


class CoServeGPUWorker(_CoServeWorker, Worker):
    def init_device(self) -> None:
        """Finetuning's memory is taken from what the engine may use (`--gpu-memory-utilization`)
        before vLLM profiles: the KV cache gets what is left of the rest.

        Raises:
            ValueError: the rest is nothing; names the option.
        """
        super().init_device()
        config = CoServeConfig.from_vllm_config(self.vllm_config)
        assert config is not None
        reserved = reserved_bytes(config)
        if reserved >= self.requested_memory:
            raise ValueError(
                f"finetuning would take {reserved / 2**30:.1f} GiB of the "
                f"{self.requested_memory / 2**30:.1f} GiB that the engine may use; raise "
                "--gpu-memory-utilization, or lower memory_gib in --co-finetune-config"
            )
        self.requested_memory -= reserved


def reserved_bytes(config: CoServeConfig) -> int:
    """Of the GPU, for all jobs that train at a time."""
    options = config.options
    return math.ceil(memory_budget(options, "cuda") * options.max_jobs_at_once)


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class CoServeCPUWorker(_CoServeWorker, CPUWorker):
        pass
