"""Device and compute type of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UsageError


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where a usable one is present, else cpu.

    Raises:
        UsageError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def resolve_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of ``--precision`` on ``device``; None for plain float32.

    ``auto`` takes bfloat16 where the device computes in it: CUDA from compute capability 8.0, CPUs with AMX-BF16 or
    AVX512-BF16.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def resolve_layout(layout: str, autocast: torch.dtype | None, planned: bool = False) -> torch.memory_format:
    """The memory format of ``--layout``; ``auto`` is channels-last wherever a 16-bit type computes or, ``planned``, the
    modulated weights come from a plan, which holds them so.

    Raises:
        UsageError: ``contiguous`` with a plan.
    """
    if layout == "auto":
        layout = "contiguous" if autocast is None and not planned else "channels-last"
    if layout == "contiguous" and planned:
        raise UsageError(
            "--layout contiguous does not go with --modulation plan, which makes channels-last weights; leave --layout "
            "out or take --modulation autograd"
        )
    return {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}[layout]


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = Path("/proc/cpuinfo")
    if device.type != "cpu" or not info.is_file():
        return False
    flags = next((line for line in info.read_text(errors="replace").splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
