"""Which backend serves an op: the automatic choice, forcing, refusals, a missing library, and what really ran."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED
from modulation import inputs

from adafm_kernels import BackendChoice, _library, backends, modulate, use_backend, which_backend


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """A package whose library was never built."""
    monkeypatch.setattr(_library, "LIBRARY_PATH", tmp_path / "lib" / "libadafm.so")
    for cached in (_library.load_library, backends.choose):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (_library.load_library, backends.choose):
        cached.cache_clear()


def python(code, **environment):
    """Run code in a fresh Python with further environment variables; stdout, or the error's last line."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_automatic_choice():
    assert which_backend() == BackendChoice("compiled", "the compiled library serves CPU tensors")
    assert which_backend("modulate_backward", "meta").name == "reference"
    assert which_backend(backend="reference") == BackendChoice("reference", "asked for by backend=")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_no_cuda_device():
    with pytest.raises(RuntimeError, match="no CUDA device"):
        which_backend(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_automatic_choice_on_cuda():
    choice = which_backend(device="cuda")
    major, minor = torch.cuda.get_device_capability()
    assert choice.name == ("compiled" if "is built into the library" in choice.reason else "triton")
    assert f"sm_{major}{minor}" in choice.reason


def test_forcing_nests_and_ends():
    with use_backend("reference"):
        assert which_backend().name == "reference" and "use_backend" in which_backend().reason
        with use_backend("compiled"):
            assert which_backend().name == "compiled"
            assert which_backend(backend="reference").name == "reference"
        with use_backend(None):
            assert which_backend().name == "compiled"
        assert which_backend().name == "reference"
    assert backends.forced_backend() is None
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.forced_backend() is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: which_backend("convolve"), "op is 'convolve'; expected one of modulate, modulate_backward"),
        (lambda: which_backend(backend="cuda"), "backend is 'cuda'; expected one of reference, compiled, triton"),
        (lambda: use_backend("fast").__enter__(), "backend is 'fast'"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refusals_say_what_to_do():
    weight = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match='no kernels for meta tensors; ask for backend="reference"'):
        which_backend(device="meta", backend="compiled")
    if INTERPRETED:
        assert which_backend(backend="triton").name == "triton"
    else:
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
            modulate(weight, None, None, backend="triton")


def test_missing_library(no_library):
    """The first op says what is missing and what to type, forced or not; the reference backend still works."""
    weight, gamma, beta = inputs((2, 3, 3, 3))
    for backend in (None, "compiled"):
        with pytest.raises(RuntimeError, match=r"no libadafm.so in .*Build them .*pip install .*backend=\"reference\""):
            modulate(weight, gamma, beta, backend=backend)
    with pytest.raises(RuntimeError, match=r"no libadafm\.so"):
        which_backend()
    assert torch.equal(modulate(weight, gamma, beta, backend="reference"), gamma * weight + beta)


def test_library_that_does_not_load(no_library):
    _library.LIBRARY_PATH.parent.mkdir()
    _library.LIBRARY_PATH.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"do not load with torch .*Rebuild"):
        modulate(torch.ones(2, 3), None, None)


def test_environment_variable():
    code = """
import torch, adafm_kernels
print(adafm_kernels.which_backend().name, adafm_kernels.modulate(torch.ones(1, 1), None, None).item())
"""
    assert python(code, ADAFM_BACKEND="reference") == "reference 1.0"
    assert python(code, ADAFM_BACKEND="") == "compiled 1.0"
    assert "backend is 'quick'" in python(code, ADAFM_BACKEND="quick")


def test_the_compiled_op_really_runs():
    """The profiler sees the compiled kernels in a forward and a backward on the CPU, and no others."""
    weight, gamma, beta = inputs((4, 6, 3, 3))
    gamma.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        modulate(weight, gamma, beta).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"adafm_compiled::modulate", "adafm_compiled::modulate_backward"} <= names
    # dgamma does not need gamma, so no gamma of ones is made up either.
    assert not {name for name in names if name.startswith(("aten::mul", "aten::full"))}


def test_the_compiled_backward_without_gamma():
    weight, grad = inputs((4, 6, 3, 3))[0], torch.ones(4, 6, 3, 3)
    op = torch.ops.adafm_compiled.modulate_backward.default
    empty, d_gamma, d_beta = op(grad, weight, None, False, True, True)
    assert empty.shape == (0,)
    torch.testing.assert_close(d_gamma, weight.sum((2, 3)))
    assert torch.equal(d_beta, torch.full((4, 6), 9.0))
    with pytest.raises(RuntimeError, match="gamma is missing, and grad_weight = gamma"):
        op(grad, weight, None, True, False, False)


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((9, 0), ("80", "90"), True),
        ((8, 6), ("80",), True),
        ((8, 0), ("86",), False),
        ((9, 0), ("90a",), True),
        ((10, 3), ("100a",), False),
        ((12, 1), ("100", "120"), True),
        ((7, 5), ("80",), False),
        ((9, 0), (), False),
    ],
)
def test_architectures(capability, architectures, served):
    assert _library.serves_capability(capability, architectures) is served


def test_cuda_architectures_agree_with_the_library():
    _library.load_library()
    assert bool(_library.cuda_architectures()) == torch.ops.adafm_compiled.cuda_available_in_library()
