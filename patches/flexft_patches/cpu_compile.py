"""Patch of `CpuPlatform.check_and_update_config`: a CPU model that may have adapters is compiled.

vLLM compiles no model on CPU once LoRA is enabled, since the stock LoRA layers cannot be traced:
each decode step then takes a quarter longer, whether or not any row has an adapter. Those of
`punica_cpu.py` can: to the compiler they are an opaque op.
"""

import functools
from collections.abc import Callable
from typing import Any

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
    sha256="d2960ad5d183676793d6988a9a4ed50175d18dbf8baf70fc01f686d50887a0df",
)


def install(applies: Callable[[Any], bool]) -> None:
    """Keep the compilation mode of those configs (vLLM's `VllmConfig`) that `applies` picks; others
    may be of engines without our LoRA layers. Idempotent."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config
    if is_patched(original):
        return

    @functools.wraps(original.__func__)
    def check_and_update_config(cls: type[CpuPlatform], vllm_config: Any) -> None:
        if not applies(vllm_config):
            original(vllm_config)
            return
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    CpuPlatform.check_and_update_config = classmethod(mark(check_and_update_config))
