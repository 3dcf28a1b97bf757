"""Ends an engine whose server is gone.

vLLM's engine process outlives a server that was killed with SIGKILL. Without finetuning it would
sleep for good; with a job it would go on training and hold the job's lease, while the same command
is started again beside it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

logger = logging.getLogger("vllm.flexft")

PATIENCE_S = 20.0  # for an orderly end: the job goes back to the queue


def end_with_parent() -> None:
    """Watch the process that started this one; returns at once. For the engine's own process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = threading.Thread(
            target=_end_after, args=(parent.sentinel,), name="flexft-orphan", daemon=True
        )
        watch.start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    logger.error("the server is gone: the engine ends, its finetune jobs go back to the queue")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_S)
    os.kill(os.getpid(), signal.SIGKILL)
