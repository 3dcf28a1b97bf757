"""vllm_flexft/jobs/database.py"""

import sqlite3

import pytest

from vllm_flexft.jobs import database
from vllm_flexft.jobs.database import MIGRATIONS, Database


def test_it_runs_in_write_ahead_mode(tmp_path) -> None:
    db = Database(tmp_path / "deep" / "down" / "jobs.sqlite")
    assert db.read("PRAGMA journal_mode")[0][0] == "wal"


def test_an_exception_rolls_the_whole_transaction_back(tmp_path) -> None:
    db = Database(tmp_path / "jobs.sqlite")
    insert = (
        "INSERT INTO jobs (id, name, status, created_at, queued_at)"
        " VALUES ('i', 'n', 'failed', 0, 0)"
    )

    def fail_after_writing() -> None:
        with db.write() as conn:
            conn.execute(insert)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_writing()
    assert db.read("SELECT * FROM jobs") == []


def test_a_file_of_the_first_version_is_brought_up_to_date(tmp_path, monkeypatch) -> None:
    path = tmp_path / "jobs.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", MIGRATIONS[:1])
        with Database(path).write() as conn:
            conn.execute(
                "INSERT INTO jobs (id, name, status, created_at, queued_at)"
                " VALUES ('i', 'n', 'failed', 0, 0)"
            )
    [row] = Database(path).read("SELECT * FROM jobs")
    assert (row["id"], row["deaths"]) == ("i", 0)


def test_a_newer_version_is_refused(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    Database(path).close()
    with sqlite3.connect(path) as conn:
        conn.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(ValueError, match="upgrade vllm-flexft"):
        Database(path)


def test_another_programs_database_is_refused_and_left_untouched(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another program's database"):
        Database(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_text("not a database, but long enough to have a header" * 10)
    with pytest.raises(ValueError, match="is not a job store"):
        Database(path)
