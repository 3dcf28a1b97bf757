"""vllm_flexft/jobs/store.py within one process; several processes: test_job_store_processes.py"""

import math
import sqlite3
import time

import pytest

from vllm_flexft.config import JobError
from vllm_flexft.jobs import JobStatus, JobStore, LeaseLostError, NameInUseError, new_owner

ME = new_owner()


def test_a_submitted_job_comes_back_equal(store, make_job) -> None:
    job = make_job()
    record = store.submit(job, model="base")
    assert record.job() == job
    assert (record.status, record.model, record.step) == (JobStatus.QUEUED, "base", 0)
    assert store.get("gsm8k") == store.get(record.id) == record


def test_a_job_outlives_the_process_that_submitted_it(store, make_job, tmp_path) -> None:
    record = store.submit(make_job(), model="base")
    store.close()
    assert JobStore(tmp_path / "state" / "jobs.sqlite").get(record.id) == record


class TestSubmitAgain:
    def test_a_queued_job_is_returned(self, store, make_job) -> None:
        first = store.submit(make_job(), model="base")
        assert store.submit(make_job(), model="base") == first

    def test_a_running_job_keeps_running(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        [leased] = store.lease(ME)
        assert store.submit(make_job(), model="base") == leased

    def test_a_succeeded_job_stays_succeeded(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        store.finish(job.id, JobStatus.SUCCEEDED)
        assert store.submit(make_job(), model="base").status == JobStatus.SUCCEEDED

    @pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.CANCELLED])
    def test_an_ended_job_is_queued_again_without_its_error(self, store, make_job, end) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        store.request_cancel(job.id)
        store.finish(job.id, end, "loss is nan")
        again = store.submit(make_job(), model="base")
        assert (again.id, again.status, again.error) == (job.id, JobStatus.QUEUED, None)
        assert not again.cancel_requested
        assert again.finished_at is None

    def test_a_succeeded_job_whose_adapter_is_gone_is_trained_again(
        self, store, make_job, tmp_path, caplog
    ) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        store.progress(job.id, 9, 9, {"loss": 1.0}, owner=ME)
        final = store.add_version(job.id, "gsm8k", str(tmp_path), 9, True)
        (tmp_path / "adapter_config.json").touch()
        store.finish(job.id, JobStatus.SUCCEEDED)
        assert store.submit(make_job(), model="base").status == JobStatus.SUCCEEDED

        (tmp_path / "adapter_config.json").unlink()
        again = store.submit(make_job(), model="base")
        assert (again.id, again.status, again.step) == (job.id, JobStatus.QUEUED, 0)
        assert again.finished_at is None
        assert f"no adapter in {tmp_path} any more" in caplog.text
        assert [v.retired for v in store.versions()] == [True]
        assert store.add_version(job.id, "gsm8k", str(tmp_path), 9, True).id > final.id

    def test_values_that_train_nothing_are_taken_from_the_last_submission(
        self, store, make_job
    ) -> None:
        first = store.submit(make_job(), model="base")
        changed = make_job(slo={"tpot_ms": 90}, training={"save_steps": 7, "save_total_limit": 5})
        again = store.submit(changed, model="base")
        assert again.id == first.id
        assert again.job() == changed

    def test_only_what_matters_is_named_as_different(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        with pytest.raises(NameInUseError) as error:
            store.submit(make_job(slo={"tpot_ms": 90}, peft={"r": 16}), model="base")
        assert "peft.r" in str(error.value)
        assert "slo" not in str(error.value)

    def test_a_different_job_is_refused_with_what_differs(self, store, make_job) -> None:
        store.submit(make_job(training={"learning_rate": 1e-4}), model="base")
        with pytest.raises(NameInUseError) as e:
            store.submit(make_job(training={"learning_rate": 3e-4}, peft={"r": 16}), model="base")
        assert isinstance(e.value, JobError)
        assert "'gsm8k'" in str(e.value)
        assert "training.learning_rate: 0.0001 -> 0.0003" in str(e.value)
        assert "peft.r: 8 -> 16" in str(e.value)
        assert "another name" in str(e.value)

    def test_another_base_model_is_refused(self, store, make_job) -> None:
        store.submit(make_job(), model="llama")
        with pytest.raises(NameInUseError, match="base model: 'llama' -> 'qwen'"):
            store.submit(make_job(), model="qwen")


def test_two_jobs_cannot_share_an_output_folder(store, make_job, tmp_path) -> None:
    store.submit(make_job("a", output_dir=str(tmp_path / "x")), model="base")
    with pytest.raises(NameInUseError, match="belongs to job 'a'"):
        store.submit(make_job("b", output_dir=str(tmp_path / "y" / ".." / "x")), model="base")


class TestRefuse:
    def test_the_message_is_kept(self, store) -> None:
        store.refuse("gsm8k", "job.yaml", "training.lr: unknown key")
        record = store.get("gsm8k")
        assert (record.status, record.error) == (JobStatus.FAILED, "training.lr: unknown key")
        assert record.refused
        with pytest.raises(ValueError, match="unknown key"):
            record.job()

    def test_the_corrected_job_may_take_the_name(self, store, make_job) -> None:
        store.refuse("gsm8k", "job.yaml", "bad")
        accepted = store.submit(make_job(), model="base")
        assert accepted.status == JobStatus.QUEUED
        assert store.get("gsm8k") == accepted

    def test_refusing_again_replaces_the_record(self, store) -> None:
        store.refuse("gsm8k", "job.yaml", "bad")
        store.refuse("gsm8k", "job.yaml", "worse")
        assert [r.error for r in store.list()] == ["worse"]

    def test_a_refused_job_is_never_leased(self, store) -> None:
        store.refuse("gsm8k", "job.yaml", "bad")
        assert store.lease(ME) == []


class TestLease:
    def test_the_oldest_jobs_come_first(self, store, make_job) -> None:
        for name in "abc":
            store.submit(make_job(name), model="base")
        assert [j.name for j in store.lease(ME, limit=2)] == ["a", "b"]

    def test_a_job_is_leased_once(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        assert len(store.lease(ME)) == 1
        assert store.lease(ME) == store.lease(new_owner()) == []

    def test_jobs_of_another_base_model_are_left_alone(self, store, make_job) -> None:
        store.submit(make_job("a"), model="llama")
        store.submit(make_job("b"), model="qwen")
        assert [j.name for j in store.lease(ME, limit=9, model="qwen")] == ["b"]

    def test_an_expired_lease_goes_to_the_next_engine(self, tmp_path, make_job) -> None:
        store = JobStore(tmp_path / "jobs.sqlite", lease_s=0.05)
        store.submit(make_job(), model="base")
        store.lease(ME)
        time.sleep(0.1)
        [taken] = store.lease(other := new_owner())
        assert (taken.owner, taken.attempts) == (other, 2)

    def test_heartbeats_keep_a_lease(self, tmp_path, make_job) -> None:
        path = tmp_path / "jobs.sqlite"
        store = JobStore(path)
        job_id = store.submit(make_job(), model="base").id
        store.lease(ME)
        with sqlite3.connect(path) as database:
            database.execute("UPDATE jobs SET lease_expires = 0")
        assert store.heartbeat(ME) == [job_id]
        assert store.lease(new_owner()) == []

    def test_an_engine_learns_that_its_job_was_taken(self, tmp_path, make_job) -> None:
        store = JobStore(tmp_path / "jobs.sqlite", lease_s=0.0)
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        store.lease(new_owner())
        assert store.heartbeat(ME) == []
        with pytest.raises(LeaseLostError, match="'gsm8k' is running and no longer held"):
            store.progress(job.id, 5, 10, {}, owner=ME)
        with pytest.raises(LeaseLostError):
            store.finish(job.id, JobStatus.SUCCEEDED, owner=ME)
        with pytest.raises(LeaseLostError):
            store.release(job.id, ME)

    def test_a_released_job_keeps_its_place_in_the_queue(self, store, make_job) -> None:
        store.submit(make_job("a"), model="base")
        store.submit(make_job("b"), model="base")
        [a] = store.lease(ME)
        store.release(a.id, ME)
        assert [j.name for j in store.lease(ME, limit=2)] == ["a", "b"]


class TestAbandoned:
    """Engines that end without a word; here because their leases expire."""

    @pytest.fixture
    def store(self, tmp_path):
        return JobStore(tmp_path / "jobs.sqlite", lease_s=0.0)

    def lease_and_die(self, store, *steps: int):
        """Whether there was a job to take."""
        owner = new_owner()
        leased = store.lease(owner)
        for job in leased:
            for step in steps:
                store.progress(job.id, step, 100, {}, owner=owner)
        return bool(leased)

    def test_a_job_whose_engine_dies_each_time_at_the_same_step_is_given_up(
        self, store, make_job, caplog
    ) -> None:
        store.submit(make_job(), model="base")
        attempts = 0
        while self.lease_and_die(store, 5, 6, 7):
            attempts += 1
            assert attempts < 10
        record = store.get("gsm8k")
        assert (attempts, record.status) == (5, JobStatus.FAILED)
        assert "died 4 times in a row and never got beyond step 7" in record.error
        assert "memory_gib" in record.error
        assert record.error in caplog.text

    def test_so_is_one_that_never_gets_to_its_first_step(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        assert [self.lease_and_die(store) for _ in range(5)] == [True] * 4 + [False]

    def test_submitted_again_it_has_all_its_attempts(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        while self.lease_and_die(store):
            pass
        assert store.submit(make_job(), model="base").status == JobStatus.QUEUED
        assert [self.lease_and_die(store) for _ in range(5)] == [True] * 4 + [False]

    def test_attempts_that_end_at_different_steps_are_not_limited(self, store, make_job) -> None:
        """Killed at random: a resume may even end before the step at which the last one did."""
        store.submit(make_job(), model="base")
        for number in range(20):
            early = number % 4 != 3  # before the first step of the attempt
            assert self.lease_and_die(store, *(() if early else (30 - number,)))

    def test_orderly_shutdowns_are_not_counted(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        for _ in range(10):
            [job] = store.lease(owner := new_owner())
            store.release(job.id, owner)
        assert store.get("gsm8k").status == JobStatus.QUEUED


class TestCancel:
    def test_a_queued_job_is_cancelled_at_once(self, store, make_job) -> None:
        job = store.submit(make_job(), model="base")
        assert store.request_cancel(job.id).status == JobStatus.CANCELLED
        assert store.lease(ME) == []

    def test_a_running_job_is_told(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        assert not store.cancel_requested(job.id)
        store.request_cancel(job.id)
        assert store.cancel_requested(job.id)
        assert store.get(job.id).status == JobStatus.RUNNING

    def test_a_cancelled_job_is_not_resumed_after_its_engine_is_gone(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        store.request_cancel(job.id)
        assert store.release(job.id, ME).status == JobStatus.CANCELLED

    def test_a_finished_job_is_left_as_it_is(self, store, make_job) -> None:
        store.submit(make_job(), model="base")
        [job] = store.lease(ME)
        done = store.finish(job.id, JobStatus.SUCCEEDED)
        assert store.request_cancel(job.id) == done


def test_a_finished_job_cannot_finish_again(store, make_job) -> None:
    store.submit(make_job(), model="base")
    [job] = store.lease(ME)
    store.finish(job.id, JobStatus.SUCCEEDED)
    with pytest.raises(ValueError, match="a succeeded job cannot become failed"):
        store.finish(job.id, JobStatus.FAILED)


def test_progress_keeps_the_latest_metrics_and_flags_nan(store, make_job) -> None:
    job = store.submit(make_job(), model="base")
    store.progress(job.id, 1, 10, {"loss": 2.5})
    store.progress(job.id, 2, 10, {"loss": math.nan, "grad_norm": 1.5})
    record = store.get(job.id)
    assert (record.step, record.total_steps) == (2, 10)
    assert record.metrics == {"loss": None, "grad_norm": 1.5, "non_finite": {"loss": "nan"}}


def test_events_are_read_from_where_one_left_off(store, make_job) -> None:
    job = store.submit(make_job(), model="base")
    store.add_event(job.id, "info", "one")
    last = store.events(job.id)[-1]
    store.add_event(job.id, "warning", "two")
    [event] = store.events(job.id, after=last.id)
    assert (event.level, event.message) == ("warning", "two")


class TestVersions:
    def test_they_are_read_from_where_one_left_off(self, store, make_job) -> None:
        job = store.submit(make_job(), model="base")
        first = store.add_version(job.id, "gsm8k@step-5", "/a/checkpoint-5", 5, False)
        final = store.add_version(job.id, "gsm8k", "/a", 9, True)
        assert store.versions() == [first, final]
        assert store.versions(after_id=first.id) == [final]
        assert (final.name, final.path, final.step, final.final) == ("gsm8k", "/a", 9, True)

    def test_announcing_again_is_harmless(self, store, make_job) -> None:
        job = store.submit(make_job(), model="base")
        first = store.add_version(job.id, "gsm8k", "/a", 9, True)
        assert store.add_version(job.id, "gsm8k", "/a", 9, True) == first

    def test_a_served_name_never_changes_its_folder(self, store, make_job) -> None:
        a, b = (store.submit(make_job(n), model="base") for n in "ab")
        store.add_version(a.id, "x", "/a", 9, True)
        with pytest.raises(NameInUseError, match="'x' already means the adapter in /a"):
            store.add_version(b.id, "x", "/b", 9, True)

    def test_a_retired_one_is_announced_anew_under_another_number(self, store, make_job) -> None:
        """Its job was trained again into the same folder."""
        job = store.submit(make_job(), model="base")
        old = store.add_version(job.id, "x@step-1", "/a/checkpoint-1", 1, False)
        store.retire_versions(["/a/checkpoint-1"])
        new = store.add_version(job.id, "x@step-1", "/a/checkpoint-1", 1, False)
        assert store.versions() == [new]
        assert not new.retired
        assert new.id > old.id

    def test_a_pruned_one_is_retired(self, store, make_job) -> None:
        job = store.submit(make_job(), model="base")
        store.add_version(job.id, "x@step-1", "/a/checkpoint-1", 1, False)
        store.add_version(job.id, "x@step-2", "/a/checkpoint-2", 2, False)
        store.retire_versions(["/a/checkpoint-1"])
        assert [v.retired for v in store.versions()] == [True, False]


@pytest.mark.parametrize("call", ["get", "request_cancel", "cancel_requested"])
def test_an_unknown_job_is_a_key_error(store, call) -> None:
    with pytest.raises(KeyError, match="ftjob-none"):
        getattr(store, call)("ftjob-none")
