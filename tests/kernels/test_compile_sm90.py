"""Every Triton kernel compiles for sm_90, as recorded in benchmarks/results/sm90_kernels.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "sm90_kernels.json"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The table as the command writes it: in a process of its own, which interprets nothing."""
    pytest.importorskip("triton")
    output = tmp_path_factory.mktemp("sm90") / "sm90_kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.compile", "--output", output],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def launches(record):
    return [launch for case in record["cases"].values() for launch in case]


def test_no_kernel_spills_its_registers(compiled):
    assert [launch for launch in launches(compiled) if launch["stack"] > 0] == []


def test_shared_memory_fits_an_sm(compiled):
    assert max(launch["shared"] for launch in launches(compiled)) <= 227 * 1024


def test_the_committed_record_is_of_these_kernels(compiled):
    """Equal where the compiler is the recorded one; else it names the same launches."""
    record = json.loads(RECORD.read_text())
    if compiled["triton"] == record["triton"]:
        assert compiled == record, "write it anew: python -m benchmarks.gpu.compile --output ..."
    else:
        names = [{case: [r["kernel"] for r in rs] for case, rs in x["cases"].items()}
                 for x in (compiled, record)]  # fmt: skip
        assert names[0] == names[1]
