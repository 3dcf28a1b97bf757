"""Options that all tests share."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=os.environ.get("VLLM_FLEXFT_DATA"),
        help="folder with gsm8k_train.jsonl, alpaca_en_demo.json and the Azure traces "
        "(default: $VLLM_FLEXFT_DATA); tests that need it are skipped without",
    )


# Folders whose files take minutes: begun first, so that no process is left with one at the end.
LONG = ("server", "train", "e2e")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(tests).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=rank)  # stable


@atexit.register  # first, so that it runs last: what a test run has to say is said by then
def _drop_what_libraries_print_at_exit() -> None:
    """libtriton lists hundreds of "leaked" nanobind objects on stderr when the interpreter ends,
    which would push pytest's summary off the screen."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture(autouse=True)
def _environment_is_read_anew() -> None:
    """vLLM keeps its environment variables once an engine has started in the process; a test that
    sets one must not depend on which tests ran before it."""
    if (envs := sys.modules.get("vllm.envs")) is not None:
        envs.disable_envs_cache()


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of public data sets; skips the test where there is none."""
    value = request.config.getoption("--data-dir")
    if not value:
        pytest.skip("needs public data sets: give --data-dir or VLLM_FLEXFT_DATA")
    if not Path(value).is_dir():
        pytest.fail(f"--data-dir {value}: no such folder")
    return Path(value)
