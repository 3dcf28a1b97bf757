"""What a job in training holds on this worker: trainer, captured tensors, LoRA slot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_flexft.plan import OpenJob
from vllm_flexft.runner.capture import Capture
from vllm_flexft.runner.capture_op import Sites
from vllm_flexft.runner.slots import close_slot, open_slot
from vllm_flexft.train.adapter import Target
from vllm_flexft.train.model import LoraSlot, ServedModel
from vllm_flexft.train.stream import BackwardStream
from vllm_flexft.train.trainer import Trainer

logger = logging.getLogger("vllm.flexft")


class OpenedJob:
    def __init__(
        self,
        setup: OpenJob,
        view: ServedModel,
        sites: Sites,
        lora_manager: Any,
        stream: BackwardStream,
    ) -> None:
        """Raises what made opening fail, with everything let go again. `lora_manager` is the
        worker's `LRUCacheWorkerLoRAManager`."""
        self._releases: list[Callable[[], None]] = []

        def make_slots(targets: list[Target]) -> list[LoraSlot]:
            self._releases.append(lambda: close_slot(lora_manager, setup.lora_int_id))
            dtype = lora_manager.lora_config.lora_dtype
            return open_slot(lora_manager, setup.lora_int_id, setup.job.peft.r, targets, dtype)

        try:
            self.trainer = Trainer(setup, view, make_slots, setup.memory_bytes, stream)
            self._releases.append(self.trainer.close)
            self.capture = Capture(sites, self.trainer.store)
            self._releases.append(self.capture.remove)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Let go of all that the job held, in whatever state it is. Never raises."""
        while self._releases:
            try:
                self._releases.pop()()
            except Exception:
                logger.exception("closing a finetune job")
