"""A server that is killed or stopped while a job trains, and started again with the same command.

VLLM_FLEXFT_SERVER_KILLS sets how often it is killed (default 2; each costs a start, 20 s).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.run_state import assert_same_run, check_checkpoints, metrics
from harness.server import Server, TrainingProcess

from vllm_flexft.jobs.store import JobStore

KILLS = int(os.environ.get("VLLM_FLEXFT_SERVER_KILLS", "2"))
STEPS, SAVE_STEPS = 40 + 25 * KILLS, 3  # some are left whatever the kills let pass
STOP_S = 30.0  # vLLM ends its processes at once; on a busy machine that takes a few seconds

pytestmark = pytest.mark.timeout(300 + 60 * KILLS)


@pytest.fixture
def job(make_job: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_job("tuned", max_steps=STEPS, save_steps=SAVE_STEPS)


class Interrupted:
    """The command, always the same, by vLLM's own configuration file."""

    def __init__(self, model: Path, job: dict[str, Any], folder: Path) -> None:
        self.model, self.folder, self.starts = model, folder, 0
        self.output_dir = folder / "adapters" / "tuned"
        job_file, self.config_file = folder / "job.yaml", folder / "vllm.yaml"
        job_file.write_text(yaml.safe_dump(job))
        self.config_file.write_text(
            yaml.safe_dump(
                {
                    "co-finetune": [str(job_file)],
                    "co-finetune-config": f'{{"state_dir": "{folder}"}}',
                }
            )
        )

    def start(self) -> Server:
        self.starts += 1
        log = self.folder / f"server-{self.starts}.log"
        return Server(self.model, "--config", str(self.config_file), log=log)

    def steps(self) -> int:
        try:
            return len(metrics(self.output_dir))
        except FileNotFoundError:
            return 0

    def wait_for_training(self, server: Server, timeout: float = 240.0) -> None:
        """Until this start has written a line of metrics."""
        deadline = time.monotonic() + timeout
        while "] step " not in server.log_text():
            assert server.process.poll() is None, server.log_text()[-3000:]
            assert time.monotonic() < deadline, server.log_text()[-3000:]
            time.sleep(0.01)


def test_killed_and_stopped_server_ends_with_the_undisturbed_adapter(
    tiny_model: Path,
    job: dict[str, Any],
    tmp_path: Path,
) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert TrainingProcess(tiny_model, undisturbed, [job], undisturbed / "log").wait() == 0
    work = tmp_path / "work"
    work.mkdir()
    command, dice = Interrupted(tiny_model, job, work), random.Random(1)

    for number in range(1, KILLS + 1):
        server = command.start()
        try:
            command.wait_for_training(server)
            time.sleep(dice.uniform(0, 2.0))
            if number % 2 == 0:  # the engine has to notice by itself
                server.kill_api_server()
        finally:
            server.kill()
        sound = check_checkpoints(command.output_dir)
        print(f"kill {number} at step {command.steps()}; sound: {sound}")

    server = command.start()
    try:
        command.wait_for_training(server)
        seconds = server.terminate()
    finally:
        server.kill()
    print(f"SIGTERM at step {command.steps()}: all gone after {seconds:.1f} s")
    assert seconds < STOP_S
    store = JobStore(work / "jobs.sqlite3")
    assert store.get("tuned").status in ("queued", "running")  # running: of a dead owner

    server = command.start()
    try:
        server.wait_until_up()
        deadline = time.monotonic() + 120
        while "tuned" not in server.models():
            assert time.monotonic() < deadline, server.log_text()[-3000:]
            time.sleep(0.1)
        assert server.complete("The captain said", "tuned")
        assert store.get("tuned").attempts == KILLS + 2
        assert "Traceback" not in server.log_text()
    finally:
        server.kill()
    check_checkpoints(command.output_dir)
    reference = undisturbed / "adapters" / "tuned"
    difference = assert_same_run(command.output_dir, reference)
    print(f"largest difference of the adapters: {difference}")
