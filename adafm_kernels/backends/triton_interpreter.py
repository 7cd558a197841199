"""What Triton's interpreter gets wrong, put right where Triton runs under it; on a GPU nothing here takes part.

The interpreter keeps bfloat16 numbers as the bits of integers and knows how to turn them into float32 and back; between
float64 and bfloat16 (Triton 3.6 to 3.9) it converts those integers themselves.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


def mend() -> None:
    """Let the interpreter convert between float64 and bfloat16 by way of float32; calling it again changes nothing."""
    convert = InterpreterBuilder.cast_impl
    if getattr(convert, "by_way_of_float32", False):
        return

    def cast(builder: InterpreterBuilder, source: Any, target: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.float64, tl.bfloat16}:
            source = convert(builder, source, tl.float32)
        return convert(builder, source, target)

    cast.by_way_of_float32 = True
    InterpreterBuilder.cast_impl = cast
