"""Options that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=os.environ.get("VLLM_FLEXFT_DATA"),
        help="folder with gsm8k_train.jsonl, alpaca_en_demo.json and the Azure traces "
        "(default: $VLLM_FLEXFT_DATA); tests that need it are skipped without",
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of public data sets; skips the test where there is none."""
    value = request.config.getoption("--data-dir")
    if not value:
        pytest.skip("needs public data sets: give --data-dir or VLLM_FLEXFT_DATA")
    if not Path(value).is_dir():
        pytest.fail(f"--data-dir {value}: no such folder")
    return Path(value)
