"""Triton's interpreter, made fit for bf16 and for tests that run in seconds.

`TRITON_INTERPRET=1` has to be set when triton is first imported, and then holds for the whole
process: tests/kernels/test_triton_interpreter.py starts one of its own for these tests.
"""

import os

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def mend() -> None:
    """Make the interpreter compute with bf16 as a GPU does, and leave out what it repeats.

    It keeps bf16 as integers, which its `dot` multiplies as such, and casts fp32 to it by cutting
    digits off. Every call of a kernel's helper patches triton.language again, which the launch has
    done already; integer sums are done twice to find overflow, which tiny shapes do not have.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    TensorHandle = interpreter.TensorHandle
    builder = interpreter.interpreter_builder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(source, target_type):
        types = (source.dtype.scalar, target_type.scalar)
        if types == (tl.bfloat16, tl.float32):
            return _widened(source)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded_to_bf16(source.data), tl.bfloat16)
        return cast(source, target_type)

    def create_dot(a, b, d, *options):
        return dot(_widened(a), _widened(b), d, *options)

    def _widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    object.__setattr__(builder.options, "sanitize_overflow", False)
    call = interpreter.InterpretedFunction.__call__

    def call_helper(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton."):  # sees other modules than a kernel does
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_helper


def _rounded_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, of two equally near the even one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
