"""vLLM workers whose model runner also finetunes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_flexft.plugin import install_worker_patches
from vllm_flexft.runner.hook import add_finetuning
from vllm_flexft.wiring import CoServeConfig

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


class CoServeGPUWorker(_CoServeWorker, Worker):
    pass


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class CoServeCPUWorker(_CoServeWorker, CPUWorker):
        pass
