"""Runs the tests of the Triton kernels in Triton's interpreter, which wants its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
FILES = sorted(path.stem for path in Path(__file__).parent.glob("test_*_triton.py"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Test file -> its test cases in JUnit's XML; one process runs them all."""
    pytest.importorskip("triton")
    report = tmp_path_factory.mktemp("interpreter") / "junit.xml"
    files = [Path(__file__).with_name(f"{file}.py") for file in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junit-xml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    cases = {file: [] for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        cases[case.attrib["classname"].rsplit(".", 1)[-1]].append(case)
    return cases


@pytest.mark.parametrize("file", FILES)
def test_kernels_pass_their_tests_in_the_interpreter(file, results):
    wrong = [f"{case.attrib['name']}: {part.text}" for case in results[file] for part in case]
    assert not wrong, "\n".join(wrong)[-8000:]
    assert results[file]


def test_the_gpu_benchmark_runs_through_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    output = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--output", output]
    subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, check=True)
    timed = json.loads(output.read_text())["cases"]
    compiled = json.loads((ROOT / "benchmarks/results/sm90_kernels.json").read_text())["cases"]
    assert len(timed) == len(compiled)
    assert all(case["seconds"] > 0 and case["plain_seconds"] > 0 for case in timed)
