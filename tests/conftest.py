"""What the tests run on: one table of backends and devices, one of types; poisoned memory for the tests of ops.

A test that takes ``target`` runs once for each row of TARGETS, one that takes ``types`` once for each pair of weight
and result types. Rows that need what is not here are skipped with the reason. Triton is interpreted in a process
started with TRITON_INTERPRET=1 and compiled in all others, so its rows on ``cpu`` and on ``cuda`` never share one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from adafm_kernels.backends import interpreting

INTERPRETED = interpreting()


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    @property
    def truncates(self) -> bool:
        """Whether float32 is cut to bfloat16 instead of rounded: Triton's interpreter does."""
        return self.backend == "triton" and self.device == "cpu"


TARGETS = tuple(
    Target(backend, device) for device in ("cpu", "cuda") for backend in ("reference", "compiled", "triton")
)

# Types of the weight and of the result.
TYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float64),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", [_parameter(target) for target in TARGETS])
    if "types" in metafunc.fixturenames:
        metafunc.parametrize("types", TYPES, ids=["-".join(_short(t) for t in pair) for pair in TYPES])


def _parameter(target: Target):
    marks = []
    if target.device == "cuda":
        marks.append(pytest.mark.gpu)
        marks.append(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))
    if target.backend == "triton":
        marks.append(pytest.mark.triton)
        here, needed = (INTERPRETED, "1") if target.device == "cpu" else (not INTERPRETED, "unset")
        marks.append(pytest.mark.skipif(not here, reason=f"needs a process with TRITON_INTERPRET {needed}"))
    return pytest.param(target, id=f"{target.backend}-{target.device}", marks=marks)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates and does not fill holds NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The calling process computes as each of several processes does: in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
