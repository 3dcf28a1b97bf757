"""`vllm serve MODEL --co-finetune ...` as a user runs it: HTTP in, adapters out.

Three servers in turn: a plain one for reference, one with good and bad job files, and one restarted
on the state that the second left.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.run_state import check_checkpoints, metrics
from harness.server import Server

from vllm_flexft.config import FinetuneJob, ServerOptions
from vllm_flexft.jobs.store import JobStore

pytestmark = pytest.mark.timeout(600)

PROMPTS = [
    "The captain said",
    "Where is the treasure?",
    "Once upon a time there was a ship",
    "A B C D",
    "12 + 7 =",
    "The parrot",
]
LONG, SHORT = 120, 4  # optimizer steps: the long job outlasts the requests sent meanwhile


class State:
    """What the second and third server share."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.options = ServerOptions.from_mapping({"state_dir": str(folder)})

    def store(self) -> JobStore:
        return JobStore(self.folder / "jobs.sqlite3")

    def output_dir(self, name: str) -> Path:
        return self.folder / "adapters" / name

    def full(self, job: dict[str, Any]) -> FinetuneJob:
        return FinetuneJob.from_mapping(job).with_output_dir(self.options)

    def wait_for(self, *names: str, timeout: float = 180.0) -> None:
        store, deadline = self.store(), time.monotonic() + timeout
        while {store.get(name).status for name in names} & {"queued", "running"}:
            assert time.monotonic() < deadline, [store.get(name) for name in names]
            time.sleep(0.1)
        store.close()


class Outcome:
    """The second server and what was seen while its jobs trained."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.during: list[str] = []
        self.steps_before = self.steps_after = 0
        self.adapter_answers: dict[str, str] = {}


@pytest.fixture(scope="module")
def state(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    return State(tmp_path_factory.mktemp("state"), tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Server]:
    """Answers of a server that does not co-serve, and that server, stopped."""
    server = Server(
        tiny_model, "--enforce-eager", log=tmp_path_factory.mktemp("plain") / "server.log"
    )
    try:
        server.wait_until_up()
        answers = [server.complete(prompt) for prompt in PROMPTS]
        server.terminate()
    finally:
        server.kill()
    return answers, server


@pytest.fixture(scope="module")
def files(
    state: State, make_job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two good job files and six that cannot be taken, each for one reason."""
    folder = tmp_path_factory.mktemp("jobs")
    taken = make_job("taken", max_steps=2)
    store = state.store()
    store.submit(state.full(taken), model=str(state.model))
    store.request_cancel(store.get("taken").id)
    store.close()
    good = make_job("short", max_steps=SHORT, save_steps=2)
    jobs: dict[str, Any] = {
        "long": make_job("long", max_steps=LONG, save_steps=50),
        "unknown-key": good | {"name": "u", "lora": {"r": 8}},
        "impossible": make_job("i", learning_rate=-1.0),
        "no-data": good | {"name": "n", "dataset": {"path": str(folder / "nothing.jsonl")}},
        "taken": make_job("taken", max_steps=3),
        "short": good,
    }
    paths = {name: folder / f"{name}.yaml" for name in (*jobs, "not-yaml", "missing")}
    for name, job in jobs.items():
        paths[name].write_text(yaml.safe_dump(job))
    paths["not-yaml"].write_text("name: [unclosed\n")
    return paths


@pytest.fixture(scope="module")
def outcome(
    tiny_model: Path,
    state: State,
    files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Outcome]:
    server = Server(
        tiny_model,
        "--co-finetune",
        *map(str, files.values()),
        "--co-finetune-config.state_dir",
        str(state.folder),
        log=tmp_path_factory.mktemp("co-serving") / "server.log",
    )
    outcome = Outcome(server)
    try:
        server.wait_until_up()
        server.models()  # the client library loads
        outcome.steps_before = _steps_begun(state.output_dir("long"))
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            outcome.during = list(pool.map(server.complete, PROMPTS))
        outcome.steps_after = len(metrics(state.output_dir("long")))
        state.wait_for("long", "short")
        answered_by = ("short", "short@step-2", "long")
        outcome.adapter_answers = {name: _first_answer(server, name) for name in answered_by}
        yield outcome
    finally:
        server.kill()


def _steps_begun(output_dir: Path) -> int:
    """Waits for the first step: on a busy machine the server is up before the data is read."""
    deadline = time.monotonic() + 60
    while not (output_dir / "metrics.jsonl").exists() or not metrics(output_dir):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.02)
    return len(metrics(output_dir))


def _first_answer(server: Server, model: str) -> str:
    """A job that has just succeeded is served after one look at the store, 0.25 s."""
    deadline = time.monotonic() + 60
    while model not in server.models():
        assert time.monotonic() < deadline, server.models()
        time.sleep(0.02)
    return server.complete(PROMPTS[0], model)


def test_plain_server_says_nothing_of_ours(plain: tuple[list[str], Server]) -> None:
    _, server = plain
    assert server.our_lines() == []
    named = [line for line in server.log_text().splitlines() if "flexft" in line]
    about_plugins = [line for line in named if "plugin" in line or "flexft ->" in line]
    assert named == about_plugins


def test_requests_during_training_get_the_tokens_of_a_plain_server(
    plain: tuple[list[str], Server], outcome: Outcome
) -> None:
    assert outcome.during == plain[0]
    assert 0 < outcome.steps_before < outcome.steps_after, "no training beside the requests"


@pytest.mark.parametrize(
    ("name", "steps", "kept"), [("long", LONG, [100, 120]), ("short", SHORT, [2, 4])]
)
def test_finished_job_leaves_its_files(
    outcome: Outcome, state: State, name: str, steps: int, kept: list[int]
) -> None:
    folder = state.output_dir(name)
    assert check_checkpoints(folder) == kept
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))
    written = {path.name for path in folder.iterdir() if path.is_file()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "job.yaml"}
    assert expected <= written
    assert FinetuneJob.from_yaml(folder / "job.yaml").training.max_steps == steps


def test_adapters_are_listed_under_job_name_and_step(outcome: Outcome, tiny_model: Path) -> None:
    assert set(outcome.server.models()) == {
        *(str(tiny_model), "long", "long@step-100", "long@step-120"),
        *("short", "short@step-2", "short@step-4"),
    }


def test_adapter_answers_otherwise_than_the_base_model(
    plain: tuple[list[str], Server], outcome: Outcome
) -> None:
    assert len({plain[0][0], *outcome.adapter_answers.values()}) >= 3, outcome.adapter_answers


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing", "no such file"),
        ("not-yaml", "not YAML"),
        ("unknown-key", "lora: unknown key"),
        ("impossible", "training.learning_rate: got -1.0"),
        ("no-data", "nothing.jsonl"),
        ("taken", "the name 'taken' belongs to job .* which differs in training.max_steps: 2 -> 3"),
    ],
)
def test_bad_job_file_is_one_error_line(
    outcome: Outcome, files: dict[str, Path], file: str, message: str
) -> None:
    job_name = {"no-data": "n"}.get(file, str(files[file]))
    start = f"ERROR Finetune job {job_name} is refused: "
    lines = [line for line in outcome.server.our_lines() if line.startswith(start)]
    assert len(lines) == 1, outcome.server.our_lines()
    assert re.search(message, lines[0], flags=re.IGNORECASE), lines[0]


def test_log_has_one_line_a_step_and_no_complaint(outcome: Outcome) -> None:
    lines = outcome.server.our_lines()
    for name, steps in (("long", LONG), ("short", SHORT)):
        step_lines = [line for line in lines if re.match(rf"INFO \[{name}\] step +\d+/", line)]
        numbers = [int(re.search(r"step +(\d+)/", line)[1]) for line in step_lines]
        assert numbers == list(range(1, steps + 1))
    complaints = [line for line in lines if line.split()[0] in ("WARNING", "ERROR")]
    assert len(complaints) == 6  # the bad files
    assert "Traceback" not in outcome.server.log_text()


def test_restart_with_the_bare_flag_serves_what_was_trained_and_takes_jobs(
    outcome: Outcome,
    state: State,
    make_job: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    print(f"SIGTERM without a job: all gone after {outcome.server.terminate():.1f} s")
    server = Server(
        state.model,
        *("--co-finetune", "--co-finetune-config.state_dir", str(state.folder)),
        log=tmp_path / "server.log",
    )
    try:
        server.wait_until_up()
        answers = {name: server.complete(PROMPTS[0], name) for name in outcome.adapter_answers}
        assert answers == outcome.adapter_answers
        store = state.store()
        store.submit(state.full(make_job("later", max_steps=2)), model=str(state.model))
        state.wait_for("later")
        assert _first_answer(server, "later")
        trained = {line.split("]")[0] for line in server.our_lines() if "] step " in line}
        assert trained == {"INFO [later"}
        assert [store.get(name).attempts for name in ("long", "short")] == [1, 1]
    finally:
        server.kill()
