"""Compiles every Triton kernel for sm_90, without a GPU, and records what ptxas made of it.

    python -m benchmarks.gpu.compile [--output benchmarks/results/sm90_kernels.json] [--only NAME]

Each op of `cases` is called with tensors that have a shape and no data; the launches that it makes
are compiled with the types, constants and options they would have on an H200. Written for each:
registers a thread, bytes of shared memory, and bytes of stack, where what does not fit the
registers is spilled to.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.gpu.cases import LLAMA_8B, all_cases

TARGET = GPUTarget("cuda", 90, 32)
RECORD = Path(__file__).parents[1] / "results" / "sm90_kernels.json"


@contextmanager
def compiled_launches() -> Iterator[list[dict[str, Any]]]:
    """Launches inside are compiled and recorded in the list, not run."""
    backend = make_backend(TARGET)
    records: list[dict[str, Any]] = []

    def run(self: JITFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
        """As JITFunction.run up to the launch, for TARGET in place of the device at hand."""
        kwargs["debug"] = False
        for option in ("instrumentation_mode", "fpsan_homomorphic_casts"):
            if hasattr(knobs.compilation, option):
                kwargs[option] = getattr(knobs.compilation, option)
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=TARGET, options=options.__dict__)
        records.append(
            {
                "kernel": self.__name__,
                "grid": list(grid),
                "warps": options.num_warps,
                "stages": options.num_stages,
                **_resources(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "tensor_cores": _tensor_cores(kernel.asm["ptx"]),
            }
        )

    with mock.patch.object(JITFunction, "run", run):
        yield records


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack a thread, as the driver would report them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack + local}


def _tensor_cores(ptx: str) -> str:
    return next((name for name in ("wgmma", "mma.sync") if name in ptx), "none")


def compile_all(only: str = "") -> dict[str, list[dict[str, Any]]]:
    """Launches of every case whose name begins with `only`."""
    table = {}
    for case in all_cases(LLAMA_8B, torch.bfloat16, "meta"):
        if case.name.startswith(only):
            with compiled_launches() as records:
                case.op()
            table[case.name] = records
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write JSON here, e.g. " + RECORD.name)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args()
    table = compile_all(args.only)
    for name, records in table.items():
        for r in records:
            print(
                f"{name:28} {r['kernel']:20} {r['registers']:4} registers {r['shared']:7} B shared"
                f" {r['stack']:4} B stack  {r['warps']:2} warps  {r['tensor_cores']}"
            )
    if args.output is not None:
        record = {"triton": triton.__version__, "target": "sm_90", "cases": table}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
