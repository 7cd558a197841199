"""Which implementation serves an op: ``reference`` (plain PyTorch), ``compiled`` (libadafm.so) or ``triton``.

Automatic choice: a CPU tensor is served by ``compiled``; a CUDA tensor by ``compiled`` where its architecture is built
in, else by ``triton``; any other device by ``reference``. A backend can be forced, strongest first: by the ``backend=``
argument of an op, by the ``use_backend`` context, by the environment variable ``ADAFM_BACKEND``. Nothing falls back:
a forced backend that is not there raises, and so does the automatic choice where the library is missing.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from .._library import BUILD_COMMAND, cuda_architectures, load_library, serves_capability

BACKENDS = ("reference", "compiled", "triton")
OPS = (
    "modulate",
    "modulate_backward",
    "modulate_many",
    "modulate_many_backward",
    "modulate_many_out",
    "modulate_many_backward_out",
    "modulate_per_sample",
    "modulate_per_sample_backward",
    "modulate_normalized",
    "modulate_normalized_backward",
    "modulate_lowrank",
    "modulate_lowrank_backward",
    "step_many",
)
ENVIRONMENT_VARIABLE = "ADAFM_BACKEND"

# The one setting of the package, for the whole process: the backend that use_backend forces, else the environment's.
_forced: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


@dataclass(frozen=True)
class BackendChoice:
    """The backend that serves an op on a device, and why."""

    name: str
    reason: str


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or ``ADAFM_BACKEND`` forces, None where the choice is automatic."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op called inside the ``with`` block, in the whole process; None: automatic choice.

    The backward of an op runs on the backend of its forward, also when it is called after the block.
    """
    global _forced
    if name is not None:
        _check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def which_backend(
    op: str = "modulate", device: str | torch.device = "cpu", backend: str | None = None
) -> BackendChoice:
    """The backend that would serve ``op`` on ``device`` now, and why.

    Raises ValueError for an unknown op or backend, and the RuntimeError that the op itself would raise where the
    backend is not there.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(OPS)}")
    device = torch.device(device)
    if backend is not None:
        return BackendChoice(choose(device.type, device.index, backend).name, "asked for by backend=")
    if _forced is not None:
        reason = f"forced by use_backend or the environment variable {ENVIRONMENT_VARIABLE}"
        return BackendChoice(choose(device.type, device.index, _forced).name, reason)
    return choose(device.type, device.index, None)


@functools.lru_cache(maxsize=256)
def choose(device_type: str, device_index: int | None, requested: str | None) -> BackendChoice:
    """The choice for a kind of device and a forced backend (None: automatic); refusals raise and are not remembered."""
    if requested is not None:
        _check_name(requested)
        _require(requested, device_type, device_index)
        return BackendChoice(requested, "forced")
    if device_type == "cpu":
        load_library()
        return BackendChoice("compiled", "the compiled library serves CPU tensors")
    if device_type == "cuda":
        load_library()
        capability = _capability(device_index)
        if _compiled_for(capability):
            return BackendChoice("compiled", f"{_sm(capability)} is built into the library")
        _require("triton", device_type, device_index)
        return BackendChoice("triton", f"{_sm(capability)} is not built into the library ({_built()})")
    return BackendChoice("reference", f"there are no kernels for {device_type} tensors")


def implementation(device: torch.device, requested: str | None) -> ModuleType:
    """The module whose functions serve an op on this device; imported on first use."""
    return _module(choose(device.type, device.index, requested).name)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(
            f"backend is {name!r}; expected one of {', '.join(BACKENDS)} (backend=, use_backend or "
            f"{ENVIRONMENT_VARIABLE})"
        )


def _require(name: str, device_type: str, device_index: int | None) -> None:
    """Raise RuntimeError, saying how to get it, unless the backend can run on this kind of device."""
    if name == "compiled":
        _require_compiled(device_type, device_index)
    elif name == "triton":
        _require_triton(device_type)


def _require_compiled(device_type: str, device_index: int | None) -> None:
    if device_type not in ("cpu", "cuda"):
        raise RuntimeError(
            f'the compiled backend has no kernels for {device_type} tensors; ask for backend="reference"'
        )
    load_library()
    if device_type == "cuda":
        capability = _capability(device_index)
        if not _compiled_for(capability):
            number = f"{capability[0]}{capability[1]}"
            raise RuntimeError(
                f"the compiled backend was built for {_built()}, this device is {_sm(capability)}. Rebuild it in the "
                f'project folder with `ADAFM_CUDA=1 ADAFM_CUDA_ARCHS="{number}" {BUILD_COMMAND}`, or ask for '
                'backend="triton"'
            )


def _require_triton(device_type: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError('the triton backend needs the package triton; type: pip install "triton>=3.6,<3.10"')
    if device_type == "cpu" and not interpreting():
        raise RuntimeError(
            "the triton backend runs CPU tensors only under Triton's interpreter: set TRITON_INTERPRET=1 in the "
            'environment before Python starts, or ask for backend="compiled"'
        )
    if device_type not in ("cpu", "cuda"):
        raise RuntimeError(f'the triton backend has no kernels for {device_type} tensors; ask for backend="reference"')


def interpreting() -> bool:
    """Whether Triton kernels run under the interpreter, as the environment says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _compiled_for(capability: tuple[int, int]) -> bool:
    return serves_capability(capability, cuda_architectures()) and torch.ops.adafm_compiled.cuda_stream_symbol()


def _capability(device_index: int | None) -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise RuntimeError(f"there is no CUDA device here: torch {torch.__version__} sees none; use the CPU")
    return torch.cuda.get_device_capability(device_index)


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _built() -> str:
    return ", ".join(f"sm_{name}" for name in cuda_architectures()) or "no CUDA architecture"
