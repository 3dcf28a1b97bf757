"""What a GPU has to confirm before its figures count: tests/gpu, and the kernels' tests on it.

Each group runs in a process of its own, since what it checks depends on variables that vLLM and
Triton read once. On a GPU the groups run at the same time: their models are small.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[2]
ON_CPU = "VLLM_FLEXFT_GPU_TESTS_ON_CPU"  # tests/gpu/conftest.py
LIMIT_S = 300.0


@dataclass(frozen=True)
class Group:
    """Tests, the variables that they need on a GPU, and the tests of a dry run if fewer."""

    tests: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    dry: tuple[str, ...] = ()


_TRITON = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_*_triton.py")
)
_GRADIENTS, _SERVING = "tests/gpu/test_gpu_gradients.py::", "tests/gpu/test_gpu_serving.py::"
GROUPS = {
    # Without a GPU the interpreter runs all of them in CI.
    "kernels": Group(tuple(_TRITON), dry=("tests/kernels/test_silu_mul_triton.py",)),
    "gradients, bf16": Group((f"{_GRADIENTS}test_bf16_gradients_equal_pefts",)),
    # vLLM's Triton attention would multiply fp32 as TF32.
    "gradients, fp32": Group(
        (f"{_GRADIENTS}test_fp32_gradients_equal_pefts",), {"TRITON_F32_DEFAULT": "ieee"}
    ),
    "tokens": Group(
        (f"{_SERVING}test_requests_get_the_same_tokens_beside_a_job",),
        {"VLLM_BATCH_INVARIANT": "1"},
    ),
    "graphs": Group((f"{_SERVING}test_every_decode_only_step_replays_a_full_graph",)),
}


def run(work: Path, *, dry: bool) -> dict[str, Any]:
    """Counts over all tests, and each group's tests: "passed", or what was wrong."""

    def run_group(name: str) -> dict[str, Any]:
        return _run(GROUPS[name], work / f"checks-{name.replace(', ', '-')}", dry=dry)

    with ThreadPoolExecutor(1 if dry else len(GROUPS)) as pool:
        found = dict(zip(GROUPS, pool.map(run_group, GROUPS), strict=True))
    outcomes = [outcome for group in found.values() for outcome in group["tests"].values()]
    passed, skipped = (sum(o.startswith(w) for o in outcomes) for w in ("passed", "skipped"))
    failed = len(outcomes) - passed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "groups": found}


def _run(group: Group, out: Path, *, dry: bool) -> dict[str, Any]:
    report = out.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={report}", *(group.dry if dry and group.dry else group.tests)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    if torch.cuda.is_available():
        environment |= group.environment
    else:
        environment |= {ON_CPU: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=LIMIT_S,
                check=False,
            )  # fmt: skip
            how = f"pytest ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            how = f"not done after {LIMIT_S:.0f} s"
    tests, figures = read(report)
    if not tests:
        tests["all"] = f"failed: {how}; see {log.name}"
    return {"tests": tests, **({"figures": figures} if figures else {})}


def read(report: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Outcome by test, and what the tests recorded, of JUnit's XML; nothing where there is none."""
    tests: dict[str, str] = {}
    figures: dict[str, float] = {}
    if not report.is_file():
        return tests, figures
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [part for part in case if part.tag in ("failure", "error", "skipped")]
        kind = "passed"
        if wrong:
            kind = "skipped" if wrong[0].tag == "skipped" else "failed"
            kind += ": " + wrong[0].attrib.get("message", "")[:500]
        tests[case.attrib["name"]] = kind
        for part in case.iter("property"):
            figures[part.attrib["name"]] = float(part.attrib["value"])
    return tests, figures
