"""A server while a job trains: clients that go away, pauses over HTTP, a shutdown that drains."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.run_state import metrics
from harness.server import Server, TrainingProcess

from vllm_flexft.config import FinetuneJob, ServerOptions
from vllm_flexft.jobs.store import JobStore

pytestmark = pytest.mark.timeout(400)

STEPS = 100_000  # no test waits for the end
DRAIN_S = 90  # vLLM's shutdown timeout; a job that went on would use it up
PROMPTS = ["The captain said", "Where is the treasure?", "A B C D"]
SCHEMA = {
    "type": "object",
    "properties": {"ship": {"enum": ["sloop", "brig"]}, "guns": {"type": "boolean"}},
    "required": ["ship", "guns"],
    "additionalProperties": False,
}
# This model would make no end of white space.
WITHOUT_BLANKS = {"backend": "xgrammar", "disable_any_whitespace": True}


class Training:
    """The server, its job's folder, and what it answered before the job was there."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.store = JobStore(folder / "jobs.sqlite3")
        self.alone: list[str] = []

    def steps(self) -> int:
        try:
            return len(metrics(self.folder / "adapters" / "tuned"))
        except FileNotFoundError:
            return 0

    def wait_for_steps(self, count: int) -> None:
        self.wait_for_step(self.steps() + count)

    def wait_for_step(self, step: int, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while self.steps() < step:
            assert time.monotonic() < deadline, self.server.log_text()[-3000:]
            time.sleep(0.02)

    def post(self, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.server.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30) as r:
            return dict(json.load(r))

    def running(self) -> int:
        url = f"http://127.0.0.1:{self.server.port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        named = [line for line in lines if line.startswith("vllm:num_requests_running{")]
        return int(float(named[0].rsplit(" ", 1)[1]))

    def stream(self, max_tokens: int) -> Any:
        return self.server.client.completions.create(
            model=str(self.server.model),
            prompt=PROMPTS[0],
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@pytest.fixture(scope="module")
def training(
    tiny_model: Path,
    make_job: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("state")
    job = make_job("tuned", max_steps=STEPS, save_steps=25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /pause and /resume
        server = Server(
            tiny_model,
            *("--co-finetune", "--co-finetune-config.state_dir", str(folder)),
            *("--co-finetune-config.tpot_ms", "20"),
            *("--shutdown-timeout", str(DRAIN_S)),
            *("--structured-outputs-config", json.dumps(WITHOUT_BLANKS)),
            log=folder / "server.log",
        )
    try:
        server.wait_until_up()
        outcome = Training(server, folder)
        outcome.alone = [server.complete(prompt) for prompt in PROMPTS]
        full = FinetuneJob.from_mapping(job)
        options = ServerOptions.from_mapping({"state_dir": str(folder)})
        outcome.store.submit(full.with_output_dir(options), model=str(tiny_model))
        outcome.wait_for_steps(1)
        yield outcome
    finally:
        server.kill()


def test_client_that_goes_away_in_mid_stream_leaves_no_request_behind(training: Training) -> None:
    stream = training.stream(max_tokens=480)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert training.running() >= 1
    stream.close()
    deadline = time.monotonic() + 10
    while training.running():
        assert time.monotonic() < deadline, "the request of a client that is gone still runs"
        time.sleep(0.05)
    training.wait_for_steps(2)
    assert [training.server.complete(prompt) for prompt in PROMPTS] == training.alone


def test_json_schema_over_http_is_kept_while_a_job_trains(training: Training) -> None:
    reply = training.server.client.completions.create(
        model=str(training.server.model),
        prompt="Which ship?",
        max_tokens=60,
        temperature=0.0,
        extra_body={"structured_outputs": {"json": SCHEMA}},
    )
    said = json.loads(reply.choices[0].text)
    assert set(said) == {"ship", "guns"}
    training.wait_for_steps(1)


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_pause_over_http_stops_the_job_until_resume(training: Training, mode: str) -> None:
    text: list[str] = []

    def read(stream: Any) -> None:
        text.extend(part.choices[0].text for part in stream)

    reader = threading.Thread(target=read, args=(training.stream(max_tokens=24),))
    reader.start()
    assert training.post(f"/pause?mode={mode}") == {"status": "paused"}
    time.sleep(0.5)  # the thread that writes metrics
    before = training.steps()
    time.sleep(1.0)
    assert training.steps() == before, "a paused engine trained"
    assert training.post("/resume")["status"] == "resumed"
    reader.join(30)
    assert not reader.is_alive()
    if mode != "abort":
        assert "".join(text) == training.alone[0]
    training.wait_for_steps(2)
    assert training.store.get("tuned").status == "running"


def test_shutdown_that_drains_ends_with_the_last_request_and_the_job_goes_on_later(
    training: Training, tiny_model: Path, tmp_path: Path
) -> None:
    """SIGTERM with --shutdown-timeout: requests in flight are answered in full, the job does not
    hold the server up, and the next engine goes on with it."""
    whole = "".join(part.choices[0].text for part in training.stream(200))
    stream = training.stream(200)
    parts = [next(stream).choices[0].text]
    seconds: list[float] = []
    stopper = threading.Thread(
        target=lambda: seconds.append(training.server.terminate(2 * DRAIN_S))
    )
    stopper.start()
    parts.extend(part.choices[0].text for part in stream)
    stopper.join(DRAIN_S)
    assert "".join(parts) == whole
    assert seconds, "the job held the shutdown up"
    assert "request processing complete" in training.server.log_text(), "it ran into its timeout"
    assert training.store.get("tuned").status == "queued", "the job was not given back"
    before = training.steps()
    print(f"SIGTERM at step {before}: gone after {seconds[0]:.1f} s")

    process = TrainingProcess(tiny_model, training.folder, [], tmp_path / "log")
    try:
        training.wait_for_step(before + 2)
        training.store.request_cancel(training.store.get("tuned").id)
        assert process.wait() == 0
    finally:
        process.kill()
    record = training.store.get("tuned")
    assert (record.status, record.attempts) == ("cancelled", 2)
    lines = metrics(training.folder / "adapters" / "tuned")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > before
