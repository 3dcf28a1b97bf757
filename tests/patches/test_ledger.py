"""The ledger of patches and the installed vLLM agree."""

from pathlib import Path

import pytest

from flexft_patches import ledger

README = Path(__file__).parents[2] / "patches" / "README.md"


@pytest.mark.parametrize(
    ("symbol", "sha256"), [source for patch in ledger.patches() for source in patch.sources]
)
def test_patched_source_is_the_one_the_patch_was_written_against(symbol, sha256):
    assert ledger.source_sha256(symbol) == sha256


@pytest.mark.parametrize("patch", ledger.patches(), ids=lambda patch: patch.target)
def test_ledger_lists_the_patch_with_its_hash(patch):
    row = next(line for line in README.read_text().splitlines() if f"`{patch.target}`" in line)
    assert patch.sha256 in row


def test_ledger_lists_nothing_else():
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `vllm.")]
    assert len(rows) == len(ledger.patches())


def test_every_module_of_the_package_is_in_the_ledger():
    modules = {path.stem for path in Path(ledger.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "ledger"} == set(ledger._MODULES)


def test_hash_of_a_patched_symbol_is_that_of_its_original():
    from flexft_patches import engine_config

    engine_config.install(lambda create, engine_args, headless: create())
    assert ledger.changed_sources() == []
