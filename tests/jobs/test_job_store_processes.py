"""vllm_flexft/jobs/store.py among real processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vllm_flexft.jobs import JobStatus, JobStore, new_owner

# Opens the store at the same moment as its siblings, then leases until nothing is left.
LEASE_ALL = """
import json, sys, time
from vllm_flexft.jobs import JobStore, new_owner
owner, got = new_owner(), []
print("ready", flush=True)
sys.stdin.readline()
store = JobStore(sys.argv[1])
while jobs := store.lease(owner):
    got += [j.id for j in jobs]
    time.sleep(0.002)  # let the others have a turn on a machine of few cores
print(json.dumps(got), flush=True)
sys.stdin.read()  # stay alive: a dead owner's jobs would rightly be taken by the others
"""

LEASE_AND_HANG = """
import sys, time
from vllm_flexft.jobs import JobStore, new_owner
[job] = JobStore(sys.argv[1]).lease(new_owner())
print(job.id, flush=True)
time.sleep(60)
"""

SUBMIT = """
import json, sys
from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs import JobStore
job = FinetuneJob.from_mapping(json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
print(JobStore(sys.argv[1]).submit(job, model="base").id)
"""

COUNT_UNTIL_KILLED = """
import sys
from vllm_flexft.jobs import JobStore
store = JobStore(sys.argv[1])
for step in range(10**9):
    store.progress(sys.argv[2], step, 10**9, {"step_again": step})
"""

# A process without other threads: what they hold at a fork, no child can free.
SUBMIT_THEN_FORK_AND_SUBMIT = """
import json, os, sys
from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs import JobStore
a, b = (FinetuneJob.from_mapping(json.loads(text)) for text in sys.argv[2:])
store = JobStore(sys.argv[1])
store.submit(a, model="base")
if (pid := os.fork()) == 0:
    os._exit(store.submit(b, model="base").status != "queued")
sys.exit(os.waitpid(pid, 0)[1])
"""


def spawn(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_together(processes: list[subprocess.Popen]) -> None:
    for p in processes:
        assert p.stdout.readline() == "ready\n"
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.sqlite"


def test_every_job_goes_to_exactly_one_of_several_engines(path, make_job) -> None:
    store = JobStore(path)
    ids = {store.submit(make_job(f"job{i}"), model="base").id for i in range(40)}
    engines = [spawn(LEASE_ALL, path) for _ in range(4)]
    start_together(engines)
    got = [json.loads(e.stdout.readline()) for e in engines]
    for e in engines:
        e.communicate()
    assert sorted(itertools.chain(*got)) == sorted(ids)
    assert sum(1 for g in got if g) > 1, "one engine took all: they did not compete"


def test_a_killed_engines_job_is_taken_at_once(path, make_job) -> None:
    store = JobStore(path)
    job = store.submit(make_job(), model="base")
    engine = spawn(LEASE_AND_HANG, path)
    assert engine.stdout.readline().strip() == job.id
    assert store.lease(new_owner()) == []
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    [taken] = store.lease(new_owner())  # no waiting for the 30 s of its lease
    assert (taken.id, taken.attempts) == (job.id, 2)
    assert any("its engine died" in e.message for e in store.events(job.id))


def test_submitting_again_resumes_a_killed_engines_job(path, make_job) -> None:
    store = JobStore(path)
    job = store.submit(make_job(), model="base")
    engine = spawn(LEASE_AND_HANG, path)
    engine.stdout.readline()
    engine.kill()
    engine.wait()
    again = store.submit(make_job(), model="base")
    assert (again.id, again.status) == (job.id, JobStatus.QUEUED)


def test_simultaneous_submissions_make_one_job(path, make_job) -> None:
    job = json.dumps(make_job().model_dump(mode="json"))
    servers = [spawn(SUBMIT, path, job) for _ in range(4)]
    start_together(servers)  # they create the file together, too
    outputs = [s.communicate()[0].strip() for s in servers]
    assert [s.returncode for s in servers] == [0] * 4
    assert len(set(outputs)) == 1
    assert len(JobStore(path).list()) == 1


def test_the_store_is_sound_after_kill_9_in_the_middle_of_writes(path, make_job) -> None:
    store = JobStore(path)
    job = store.submit(make_job(), model="base")
    for _ in range(3):
        writer = spawn(COUNT_UNTIL_KILLED, path, job.id)
        deadline = time.time() + 120
        before = store.get(job.id).metrics
        while store.get(job.id).metrics == before and time.time() < deadline:
            time.sleep(0.01)
        writer.kill()
        writer.wait()
        record = store.get(job.id)
        assert record.metrics["step_again"] == record.step
        store.progress(job.id, 0, 1, {})
    assert store._db.read("PRAGMA integrity_check")[0][0] == "ok"


def test_a_forked_child_gets_its_own_connection(path, make_job) -> None:
    store = JobStore(path)
    jobs = [json.dumps(make_job(name).model_dump(mode="json")) for name in ("a", "b")]
    parent = spawn(SUBMIT_THEN_FORK_AND_SUBMIT, path, *jobs)
    parent.communicate(timeout=60)
    assert parent.returncode == 0
    assert [j.name for j in store.list()] == ["a", "b"]
