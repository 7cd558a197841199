"""``python -m adafm_kernels``: report, JSON, verification and its exit code, with and without the library."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED

from adafm_kernels import _library, backends, doctor, verify
from adafm_kernels.backends import compiled


def test_report():
    found = doctor.report()
    assert found["versions"]["torch"] == torch.__version__
    assert found["library"]["loaded"] is True
    assert set(found["build"]) >= {"version", "cuda", "cuda_archs", "compiler", "cpu_level", "torch_headers"}
    assert found["build"]["version"] == found["versions"]["adafm_kernels"]
    served = {(row["op"], row["device"]): row["backend"] for row in found["ops"]}
    assert served["modulate", "cpu"] == served["modulate_backward", "cpu"] == "compiled"
    available = {(row["backend"], row["device"]): row["available"] for row in found["backends"]}
    assert available["reference", "cpu"] and available["compiled", "cpu"]
    assert available["triton", "cpu"] == INTERPRETED


def test_text(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "modulate on cpu: compiled (the compiled library serves CPU tensors)" in text
    assert "CPU level" in text and torch.__version__ in text


def test_json_and_verify(capsys):
    assert doctor.main(["--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"] is True
    assert {row["backend"] for row in found["verify"]} >= {"reference", "compiled"}
    for backend, optimizer in (("reference", set()), ("compiled", {"adam_many"})):
        assert {row["op"] for row in found["verify"] if row["backend"] == backend} == {*backends.OPS, *optimizer}
    assert {row["what"] for row in found["verify"] if row["op"].startswith("modulate_lowrank")} == {
        "value",
        *(f"{order} {name}" for order in ("d", "dd") for name in ("weight", "gamma", "beta", "u", "s", "v")),
        "dd grad",
    }


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET 1")
def test_verify_under_the_interpreter():
    checks = verify.verify("triton", "cpu")
    assert checks and all(check.passed for check in checks)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_verify_sees_a_wrong_kernel(monkeypatch, capsys, output):
    """One part in ten thousand off in any output of the backward, and the exit code is 1."""
    true = compiled.modulate_backward

    def wrong(*args):
        results = list(true(*args))
        results[output] = results[output] * 1.0001
        return tuple(results)

    monkeypatch.setattr(compiled, "modulate_backward", wrong)
    assert doctor.main(["--verify"]) == 1
    assert "FAIL" in capsys.readouterr().out


# Functions of a backend and numbers of their results; of the gradients of many layers, the first of each group.
RETURNING = {
    "modulate": (0,),
    "modulate_backward": (0, 1, 2),
    "modulate_many": (0, 1, 2),
    "modulate_many_backward": (0, 3, 6),
    "modulate_per_sample": (0,),
    "modulate_per_sample_backward": (0, 1, 2),
    "modulate_normalized": (0,),
    "modulate_normalized_backward": (0, 1, 2),
    "modulate_lowrank": (0,),
}


@pytest.mark.parametrize(("name", "output"), [(name, n) for name, outputs in RETURNING.items() for n in outputs])
def test_verify_sees_every_wrong_result(monkeypatch, name, output):
    """One part in ten thousand off in any result of any op fails a check of that op."""
    true = getattr(compiled, name)

    def wrong(*args):
        found = true(*args)
        if isinstance(found, torch.Tensor):
            return found * 1.0001
        return [part * 1.0001 if n == output else part for n, part in enumerate(found)]

    monkeypatch.setattr(compiled, name, wrong)
    assert name in {check.op for check in verify.verify("compiled", "cpu") if not check.passed}


WRITING = {
    "modulate_many_out": ("out",),
    "modulate_many_backward_out": ("grad_weight", "grad_gamma", "grad_beta"),
    "step_many": ("parameters", "exp_avg", "exp_avg_sq", "average", "out"),
}


@pytest.mark.parametrize(("name", "arena"), [(name, arena) for name, arenas in WRITING.items() for arena in arenas])
def test_verify_sees_every_wrong_arena(monkeypatch, name, arena):
    true = getattr(compiled, name)

    def wrong(*args):
        true(*args)
        inspect.signature(true).bind(*args).arguments[arena].mul_(1.0001)

    monkeypatch.setattr(compiled, name, wrong)
    assert name in {check.op for check in verify.verify("compiled", "cpu") if not check.passed}


@pytest.mark.parametrize("name", ["parameters", "exp_avgs", "exp_avg_sqs"])
def test_verify_sees_a_wrong_optimizer(monkeypatch, name):
    true = compiled.adam_many

    def wrong(*args):
        true(*args)
        with torch.no_grad():
            inspect.signature(true).bind(*args).arguments[name][-1].mul_(1.0001)

    monkeypatch.setattr(compiled, "adam_many", wrong)
    assert "adam_many" in {check.op for check in verify.verify("compiled", "cpu") if not check.passed}


def test_verify_sees_nan(monkeypatch):
    true = compiled.modulate_lowrank
    monkeypatch.setattr(compiled, "modulate_lowrank", lambda *args: true(*args) * float("nan"))
    assert "modulate_lowrank" in {check.op for check in verify.verify("compiled", "cpu") if not check.passed}


def test_missing_library(monkeypatch, tmp_path, capsys):
    """The report still comes and says what to type; verification fails, since nothing serves the ops."""
    monkeypatch.setattr(_library, "LIBRARY_PATH", tmp_path / "libadafm.so")
    for cached in (_library.load_library, backends.choose):
        cached.cache_clear()
    try:
        assert doctor.main([]) == 0
        text = capsys.readouterr().out
        assert "modulate on cpu: nothing (the compiled kernels are missing" in text and "pip install" in text
        assert "reference on cpu: yes" in text
        assert doctor.main(["--verify"]) == 1
        assert "served by nothing" in capsys.readouterr().out
    finally:
        for cached in (_library.load_library, backends.choose):
            cached.cache_clear()


def test_missing_host_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "adafm_kernels._C", None)
    info, reason = _library.build_info()
    assert info is None and "adafm_kernels._C is missing" in reason and "pip install" in reason
    assert "missing" in doctor.report()["build"]


def test_bad_usage(capsys):
    assert doctor.main(["--quick"]) == 2
    assert "--quick" in capsys.readouterr().err


def test_from_another_folder(tmp_path):
    """As a program, in a folder that is not the project's."""
    done = subprocess.run(
        [sys.executable, "-m", "adafm_kernels", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ops"][0]["backend"] == "compiled"
