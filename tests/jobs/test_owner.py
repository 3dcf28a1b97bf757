"""vllm_flexft/jobs/owner.py"""

import os
import signal
import subprocess
import sys

import pytest

from vllm_flexft.jobs.owner import new_owner, provably_dead, start_time

OWNER_THEN_SLEEP = (
    "import time; from vllm_flexft.jobs.owner import new_owner; "
    "print(new_owner(), flush=True); time.sleep(60)"
)


@pytest.fixture
def child():
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER_THEN_SLEEP], stdout=subprocess.PIPE, text=True
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_this_process_is_alive() -> None:
    assert not provably_dead(new_owner())


def test_two_engines_of_one_process_are_different_owners() -> None:
    assert new_owner() != new_owner()


def test_another_living_process_is_alive(child) -> None:
    _, owner = child
    assert not provably_dead(owner)


def test_a_killed_process_is_dead_before_its_parent_reaps_it(child) -> None:
    process, owner = child
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    assert provably_dead(owner)


def test_a_reaped_process_is_dead(child) -> None:
    process, owner = child
    process.kill()
    process.wait()
    assert provably_dead(owner)


def test_a_reused_pid_is_not_the_old_owner() -> None:
    host, boot, namespace, pid, started, nonce = new_owner().split(":")
    earlier = ":".join((host, boot, namespace, pid, str(int(started) - 1), nonce))
    assert provably_dead(earlier)


def test_an_owner_from_before_a_reboot_is_dead() -> None:
    host, _, *rest = new_owner().split(":")
    assert provably_dead(":".join((host, "another-boot", *rest)))


@pytest.mark.parametrize("what", ["host", "container"])
def test_an_owner_out_of_sight_is_not_declared_dead(what: str) -> None:
    host, boot, namespace, _, started, nonce = new_owner().split(":")
    pid = str(2**22 + 1)  # above the kernel's largest pid: not running here
    if what == "host":
        owner = ("elsewhere", "another-boot", namespace, pid, started, nonce)
    else:
        owner = (host, boot, namespace + "1", pid, started, nonce)
    assert not provably_dead(":".join(owner))


def test_start_time_of_no_process_is_none() -> None:
    assert start_time(2**22 + 1) is None
