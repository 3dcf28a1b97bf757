"""Who holds a lease, written so that another process can tell whether it still lives.

A pid alone is not enough: pids are used again, differ between containers that share a volume,
and mean nothing after a reboot. An owner is therefore

    host:boot_id:pid_namespace:pid:start_time:nonce

where `start_time` is the process's start in clock ticks since boot (field 22 of proc(5) stat).
Where /proc is absent only the pid is tested; a wrong answer then is "alive", and the lease
timeout decides.
"""

import os
import socket
import uuid
from pathlib import Path

_UNKNOWN = "-"


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _UNKNOWN


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return _UNKNOWN


def start_time(pid: int) -> str | None:
    """Start of process `pid` in ticks since boot; None when there is no such living process.

    A zombie counts as dead: after kill -9 it stays in the table until its parent reaps it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # it exists and belongs to someone else
        return _UNKNOWN
    # The command name (field 2) may hold spaces and parentheses: count from the last ")".
    fields = stat.rpartition(")")[2].split()
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started


def new_owner() -> str:
    """An owner string for this process, different at each call (one per engine)."""
    pid = os.getpid()
    host = socket.gethostname().replace(":", "_")
    started = start_time(pid) or _UNKNOWN
    parts = (host, _read_boot_id(), _pid_namespace(), str(pid), started, uuid.uuid4().hex[:8])
    return ":".join(parts)


def provably_dead(owner: str) -> bool:
    """True only if the process behind `owner` certainly no longer runs.

    False for an owner on another host or in another container, whose life cannot be seen here.
    """
    host, boot, namespace, pid, started, _nonce = owner.split(":")
    if boot != _read_boot_id():
        # Same machine, booted since. A different host name may be another, living machine.
        return boot != _UNKNOWN and host == socket.gethostname().replace(":", "_")
    if namespace != _pid_namespace():
        return False
    return start_time(int(pid)) != started
