"""The SQLite file of the job store: schema, migrations, transactions.

Write-ahead logging lets API servers read while the engine writes. Every write is one
`BEGIN IMMEDIATE` transaction: it takes the write lock first, so that what it reads cannot change
before it writes. WAL needs shared memory: the file must lie on a local disk.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

BUSY_TIMEOUT_S = 30.0
APPLICATION_ID = 0x464C5846  # "FLXF": tells another program's database from ours

# MIGRATIONS[i] brings a database from user_version i to i + 1. Entries are never edited.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            name TEXT NOT NULL,
            model TEXT,
            status TEXT NOT NULL,
            config TEXT,
            config_hash TEXT,
            output_dir TEXT,
            source TEXT,
            error TEXT,
            owner TEXT,
            lease_expires REAL,
            attempts INTEGER NOT NULL DEFAULT 0,
            cancel_requested INTEGER NOT NULL DEFAULT 0,
            step INTEGER NOT NULL DEFAULT 0,
            total_steps INTEGER,
            metrics TEXT NOT NULL DEFAULT '{}',
            created_at REAL NOT NULL,
            queued_at REAL NOT NULL,
            started_at REAL,
            finished_at REAL,
            CHECK ((status = 'running') = (owner IS NOT NULL)),
            CHECK ((status = 'running') = (lease_expires IS NOT NULL))
        )""",
        # A refused job (config NULL) keeps its message and blocks nobody's name.
        "CREATE UNIQUE INDEX jobs_name ON jobs (name) WHERE config IS NOT NULL",
        "CREATE UNIQUE INDEX jobs_output_dir ON jobs (output_dir) WHERE output_dir IS NOT NULL",
        "CREATE INDEX jobs_status ON jobs (status, queued_at)",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
            created_at REAL NOT NULL,
            level TEXT NOT NULL,
            message TEXT NOT NULL
        )""",
        "CREATE INDEX events_job ON events (job_id, id)",
        """CREATE TABLE versions (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
            name TEXT NOT NULL UNIQUE,
            path TEXT NOT NULL,
            step INTEGER NOT NULL,
            final INTEGER NOT NULL,
            retired INTEGER NOT NULL DEFAULT 0,
            created_at REAL NOT NULL
        )""",
    ),
    (
        # How often its engine was gone with the job at `death_step`, after the first time.
        "ALTER TABLE jobs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN death_step INTEGER",
    ),
)


class Database:
    """One connection per process, opened again after a fork, shared by its threads."""

    # Connections inherited through a fork. They are kept and never closed: a child that closed
    # one could take itself for the last user of the file and delete the parent's log.
    _abandoned: ClassVar[list[sqlite3.Connection]] = []

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, rolled back on any exception.

        `durable=False` commits without waiting for the disk: a power cut may lose it (never
        half of it), a killed process loses nothing. For what is written at every step.
        """
        with self._locked() as conn:
            conn.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            conn.execute("BEGIN IMMEDIATE")
            try:
                yield conn
            except BaseException:
                conn.execute("ROLLBACK")
                raise
            conn.execute("COMMIT")

    def read(self, sql: str, *args: Any) -> list[sqlite3.Row]:
        with self._locked() as conn:
            return conn.execute(sql, args).fetchall()

    def close(self) -> None:
        with self._locked() as conn:
            conn.close()
            self._pid = -1

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        if self._pid != os.getpid():
            if self._pid != -1:
                self._abandoned.append(self._conn)
            self._open()
        with self._lock:
            yield self._conn

    def _open(self) -> None:
        self._lock = threading.RLock()
        self._conn = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._conn.row_factory = sqlite3.Row
        self._pid = os.getpid()
        try:
            self._check_ours()
            self._enable_wal()
            self._conn.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except BaseException:
            self._conn.close()
            self._pid = -1
            raise

    def _check_ours(self) -> None:
        try:
            is_new = not self._conn.execute("SELECT 1 FROM sqlite_master").fetchall()
        except sqlite3.DatabaseError as e:
            raise ValueError(f"{self.path} is not a job store: {e}") from e
        app_id = self._conn.execute("PRAGMA application_id").fetchone()[0]
        if not is_new and app_id != APPLICATION_ID:
            raise ValueError(f"{self.path} is another program's database, not a job store")

    def _enable_wal(self) -> None:
        # SQLite does not call its busy handler for this change of mode, so two processes that
        # create the file together must be made to wait here.
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                mode = self._conn.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            if mode != "wal":
                raise ValueError(
                    f"{self.path}: the job store needs SQLite's WAL mode, which this file system "
                    "does not support; set state_dir to a local disk"
                )
            return

    def _migrate(self) -> None:
        with self.write() as conn:
            version = conn.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise ValueError(
                    f"{self.path} has job store version {version}, this vllm-flexft knows up to "
                    f"{len(MIGRATIONS)}: upgrade vllm-flexft or choose another state_dir"
                )
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    conn.execute(statement)
            conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            conn.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
