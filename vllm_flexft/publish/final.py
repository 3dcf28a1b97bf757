"""The final adapter at the top of a job's output folder, and the record of a finished run.

Three files are renamed into place one by one: weights, final.json, adapter_config.json. PEFT and
vLLM open the config first and find no adapter without it, so its rename is the moment at which
the adapter is published; whatever a crash leaves before it is replaced by the next attempt.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_flexft.config import FinetuneJob, PeftConfig
from vllm_flexft.obs.metrics import METRICS_FILE
from vllm_flexft.publish import fsops
from vllm_flexft.publish.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_chunks
from vllm_flexft.publish.checkpoint import TrainState
from vllm_flexft.publish.manifest import CheckpointError, Manifest, read_manifest, verify_files
from vllm_flexft.publish.workfiles import sweep, work_path

FINAL_FILE = "final.json"
JOB_FILE = "job.yaml"

# What a job writes; hidden names are this package's work files, or nobody's business.
_OF_A_JOB = re.compile(
    r"\..*|checkpoint-\d+|runs|"
    + "|".join(map(re.escape, (CONFIG_FILE, WEIGHTS_FILE, FINAL_FILE, JOB_FILE, METRICS_FILE)))
)


@dataclass(frozen=True)
class FinalAdapter:
    """A finished run's adapter: `path` is the folder to serve."""

    path: Path
    step: int
    config_hash: str


def publish_final(
    output_dir: Path, state: TrainState, peft: PeftConfig, base_model: str, config_hash: str
) -> Path:
    """Write the final adapter into `output_dir` and return that folder.

    If the same job has published there already, its adapter is kept: it may be being served.
    Raises CheckpointError if another adapter is in the way, or the disk fails.
    """
    try:
        fsops.makedirs(output_dir)
        sweep(output_dir)
        if (existing := read_final(output_dir)) is not None:
            if existing.config_hash != config_hash:
                raise CheckpointError(
                    f"{output_dir} holds the adapter of a job of another configuration; choose "
                    "another output_dir, or move that adapter away"
                )
            return output_dir
        weights, config = adapter_chunks(state.adapter, peft, base_model)
        work = {n: work_path(output_dir, n) for n in (WEIGHTS_FILE, CONFIG_FILE, FINAL_FILE)}
        sums = {
            WEIGHTS_FILE: fsops.write_file(work[WEIGHTS_FILE], weights),
            CONFIG_FILE: fsops.write_file(work[CONFIG_FILE], [config]),
        }
        manifest = Manifest(state.step, config_hash, sums)
        fsops.write_file(work[FINAL_FILE], [manifest.encode()])
        fsops.rename(work[WEIGHTS_FILE], output_dir / WEIGHTS_FILE)
        fsops.rename(work[FINAL_FILE], output_dir / FINAL_FILE)
        # A power cut may keep renames in any order: these two must be on disk before the third.
        fsops.fsync_dir(output_dir)
        fsops.rename(work[CONFIG_FILE], output_dir / CONFIG_FILE)
        fsops.fsync_dir(output_dir)
    except OSError as e:
        raise CheckpointError(f"{output_dir}: the final adapter cannot be written: {e}") from e
    return output_dir


def read_final(output_dir: Path) -> FinalAdapter | None:
    """The published adapter, verified; None if the run has not finished.

    Raises CheckpointError if it is damaged, or an adapter that we did not write.
    """
    if not (output_dir / CONFIG_FILE).exists():
        return None
    if not (output_dir / FINAL_FILE).exists():
        raise CheckpointError(
            f"{output_dir} holds an adapter that no job wrote; choose another output_dir, or move "
            "that adapter away"
        )
    manifest = read_manifest(output_dir / FINAL_FILE)
    verify_files(output_dir, manifest)
    return FinalAdapter(output_dir, manifest.step, manifest.config_hash)


def check_output_dir(output_dir: Path) -> None:
    """Raises ValueError where a job could not write there; makes nothing."""
    there = output_dir
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"output_dir: {there} is no folder; choose another output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: {there} cannot be written by this user; choose another output_dir"
        )


def foreign_files(output_dir: Path) -> list[str]:
    """Names in the folder that are none of a job's."""
    if not output_dir.is_dir():
        return []
    return sorted(path.name for path in output_dir.iterdir() if not _OF_A_JOB.fullmatch(path.name))


def write_job_file(output_dir: Path, job: FinetuneJob) -> Path:
    """Write `output_dir/job.yaml`, the job with every default filled in.

    Raises CheckpointError if the folder cannot be written.
    """
    target = output_dir / JOB_FILE
    try:
        fsops.makedirs(output_dir)
        work = work_path(output_dir, JOB_FILE)
        fsops.rmtree(work)  # no sweep: a checkpoint may be under way in another thread
        fsops.write_file(work, [job.to_yaml().encode()])
        fsops.rename(work, target)
        fsops.fsync_dir(output_dir)
    except OSError as e:
        raise CheckpointError(f"{target} cannot be written: {e}") from e
    return target
