"""The demo: a small model answers requests while a job finetunes it, in one vLLM server.

    make demo

Everything is made here and kept in .demo/: a model of 7 M parameters and a dataset
(examples/make_model.py), the server's log, the adapter, the loss curve. The model is kept for the
next run; the rest is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import demo_report as report
import sample_text
from demo_server import DemoError, Server, free_port
from demo_traffic import Traffic, ask
from openai import AsyncOpenAI

from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs.records import JobRecord
from vllm_flexft.jobs.states import FINISHED, JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.obs.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(".demo")  # relative to ROOT, where everything runs: printed commands can be pasted
MODEL, ROWS, STATE, LOG = DEMO / "model", DEMO / "pirate.jsonl", DEMO / "state", DEMO / "server.log"
JOB_FILE = Path("examples/jobs/pirate.yaml")
BASE = "base"  # the name under which the model itself is served

RATE = 5.0  # requests a second
# Where they alone take the latency objective, the job would never end: fewer after this time.
SLOW_AFTER_S, SLOW_RATE = 120.0, 1.0
AFTERWARDS_S = 15.0  # the same traffic once the job is done, to compare with
JOB_WITHIN_S = 300.0  # the job takes less than a minute on two free cores
SERVED_WITHIN_S = 20.0
POLL_S = 0.3

_BEGAN = time.monotonic()
_LOAD = os.getloadavg()[0]


def say(what: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:3.0f}s] {what}", flush=True)


def make_model_and_dataset() -> None:
    command = [sys.executable, "examples/make_model.py", str(MODEL), "--size", "demo"]
    command += ["--dataset", str(ROWS), "--dataset-format", "messages"]
    # A session of its own: on Ctrl-C it is killed by us, without a traceback on the screen.
    if subprocess.run(command, start_new_session=True).returncode != 0:
        raise DemoError("the model could not be made: " + " ".join(command))


def serve_command(port: int) -> list[str]:
    """MODEL stands before --co-finetune, which takes every word that follows it."""
    vllm = Path(sys.executable).with_name("vllm")
    return [
        *(
            str(vllm.relative_to(ROOT) if vllm.is_relative_to(ROOT) else vllm),
            "serve",
            str(MODEL),
            "--served-model-name",
            BASE,
        ),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
        "--enforce-eager",  # compiling takes a minute
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--co-finetune-config.state_dir", str(STATE)),
        *("--co-finetune", str(JOB_FILE)),
    ]


def all_questions() -> list[str]:
    draw = random.Random(1)
    return sorted({sample_text.question_and_answer(draw)[0] for _ in range(4000)})


def unseen_questions(questions: list[str]) -> list[str]:
    """Two of different kinds that no training row asks: answers show a style, not a memory."""
    rows = map(json.loads, ROWS.read_text().splitlines())
    asked = {row["messages"][0]["content"] for row in rows}
    by_kind = {q.split()[0]: q for q in questions if q not in asked}
    return list(islice(by_kind.values(), 2)) or questions[:2]


class Progress:
    """One line that is written over on a terminal, a line now and then in a file."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._next = 0.0

    def show(self, line: str) -> None:
        if self._live:
            print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + 5.0
            print(line, flush=True)

    def end(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="", flush=True)


async def watch(job: FinetuneJob, server: Server, traffic: Traffic) -> JobRecord:
    """Show the job's progress until it has ended. Raises DemoError if it does not succeed."""
    assert job.output_dir is not None
    store, progress = JobStore(STATE / "jobs.sqlite3"), Progress()
    began = time.monotonic()
    try:
        while True:
            server.check()
            record = next(iter(store.list()), None)
            if record is not None and record.status in FINISHED:
                break
            if time.monotonic() > began + JOB_WITHIN_S:
                raise server.failure(f"the job did not end within {JOB_WITHIN_S:.0f} s")
            if time.monotonic() > began + SLOW_AFTER_S and traffic.rate > SLOW_RATE:
                traffic.rate = SLOW_RATE
                progress.end()
                say(f"this machine is slow or busy: {SLOW_RATE:.0f} request a second from now on")
            losses = [m["loss"] for m in read_metrics(job.output_dir / METRICS_FILE)]
            now = report.latency(traffic.timings)
            progress.show(
                f"        step {len(losses):>2}/{job.training.max_steps}"
                + (f"  loss {losses[-1]:.2f}" if losses else "")
                + f"  |  {now.answered} requests answered, {now.failed} failed"
                + (f", {now.tpot_p50 * 1e3:.0f} ms a token" if now.answered else "")
            )
            await asyncio.sleep(POLL_S)
    finally:
        progress.end()
        store.close()
    if record.status != JobStatus.SUCCEEDED:
        raise server.failure(f"the job {record.status}: {record.error}")
    return record


async def wait_until_served(client: AsyncOpenAI, name: str, server: Server) -> None:
    deadline = time.monotonic() + SERVED_WITHIN_S
    while name not in {model.id async for model in client.models.list()}:
        if time.monotonic() > deadline:
            raise server.failure(f"the adapter was not served as {name!r}")
        await asyncio.sleep(POLL_S)


async def train_under_traffic(job: FinetuneJob, server: Server) -> list[str]:
    """The demo proper; returns the last screen."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    questions = all_questions()
    traffic = Traffic(client, BASE, questions, RATE)
    say(f"requests at {RATE:.0f} a second, while the job trains")
    sending = asyncio.create_task(traffic.run())
    try:
        record = await watch(job, server, traffic)
        trained = time.monotonic()
        say(f"the job is done; the same requests for {AFTERWARDS_S:.0f} s with nothing to train")
        await asyncio.sleep(AFTERWARDS_S)
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
    server.check()
    await wait_until_served(client, job.name, server)
    given = []
    for question in unseen_questions(questions):
        models = (BASE, job.name)
        given.append((question, [(m, await ask(client, m, question)) for m in models]))
    timings = traffic.timings
    assert job.output_dir is not None
    return report.last_screen(
        job,
        job_file=JOB_FILE,
        model=MODEL,
        adapter=job.output_dir.relative_to(ROOT),
        metrics=read_metrics(job.output_dir / METRICS_FILE),
        seconds=(record.finished_at or 0.0) - (record.started_at or 0.0),
        during=report.latency(t for t in timings if t.began < trained),
        after=report.latency(t for t in timings if t.began >= trained),
        given=given,
        picture=DEMO / "loss.png",
        load=_LOAD,
    )


def run() -> None:
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    say("a model of 7 M parameters, pre-trained for a minute on generated text")
    make_model_and_dataset()
    job = FinetuneJob.from_yaml(JOB_FILE)
    assert job.output_dir is not None
    for old in (STATE, job.output_dir):
        shutil.rmtree(old, ignore_errors=True)
    port = free_port()
    command = serve_command(port)
    say("$ " + " ".join(command))
    # 1 GiB of KV cache is plenty for this model. Nothing is looked up on the internet.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with Server(command, LOG, port=port, environment=environment) as server:
        server.wait_until_ready()
        screen = asyncio.run(train_under_traffic(job, server))
        say("shutting the server down")
    print("\n" + "\n".join(screen), flush=True)


def main() -> int:
    # A terminal that cannot show a character gets a question mark, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # shut the server down as well
    try:
        run()
    except DemoError as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the server is shut down", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
