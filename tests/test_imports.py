"""Imports go one way, and importing a package is cheap: no CUDA, no Triton, no library, no compiler, no network."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adafm_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"adafm_kernels": ROOT / "adafm_kernels", "adafm_trainer": ROOT / "python" / "adafm_trainer"}

# Each may import itself and what stands after it. adafm_kernels.doctor and verify are a command beside the layers.
LAYERS = (
    ("adafm_kernels.__main__",),
    ("adafm_kernels.doctor",),
    ("adafm_kernels.verify",),
    ("adafm_kernels.verify_adam", "adafm_kernels.verify_arena"),
    ("adafm_kernels.verify_check",),
    ("adafm_kernels.adam", "adafm_kernels.adapt", "adafm_kernels.plan_adam"),
    ("adafm_kernels.plan",),
    ("adafm_kernels.plan_arenas", "adafm_kernels.nn"),
    ("adafm_kernels.family",),
    ("adafm_kernels.functional",),
    (
        "adafm_kernels._ops_many",
        "adafm_kernels._ops_normalized",
        "adafm_kernels._ops_lowrank",
        "adafm_kernels._ops_arena",
        "adafm_kernels._ops_per_sample",
    ),
    ("adafm_kernels._ops",),
    ("adafm_kernels.backends",),
    ("adafm_kernels._arguments", "adafm_kernels._library"),
)
TRAINER_LAYERS = ("cli", "study", "trainer", "methods", "models")
TRAINER_LEAVES = ("data", "metrics", "keyed", "errors")


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path, path.name == "__init__.py"


def imported(name, path, is_package):
    """Absolute names of every module that a file imports anywhere in it; ``from a import b`` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = name.split(".") if is_package else name.split(".")[:-1]
                up = up[: len(up) - node.level + 1]
                base = ".".join((*up, base) if base else up)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_in(name, layer):
    return name == layer or name.startswith(layer + ".")


IMPORTS = {name: set(imported(name, path, package)) for name, path, package in modules()}


def test_the_walk_sees_relative_imports():
    assert "adafm_kernels._ops" in IMPORTS["adafm_kernels.functional"]
    assert "adafm_kernels.backends" in IMPORTS["adafm_kernels._ops"]
    assert "adafm_kernels._arguments" in IMPORTS["adafm_kernels.backends.compiled"]


def test_kernels_never_import_the_trainer():
    wrong = {
        n: i for n, found in IMPORTS.items() if is_in(n, "adafm_kernels") for i in found if is_in(i, "adafm_trainer")
    }
    assert not wrong


def test_kernels_import_one_way():
    order = [name for names in LAYERS for name in names]
    rank = {name: place for place, names in enumerate(LAYERS) for name in names}
    for name, found in IMPORTS.items():
        own = next((layer for layer in order if is_in(name, layer)), None)
        if own is None:
            assert name == "adafm_kernels" or is_in(name, "adafm_trainer"), f"{name} has no place in LAYERS"
            continue
        for other in found:
            target = next((layer for layer in order if is_in(other, layer)), None)
            assert target is None or target == own or rank[target] > rank[own], f"{name} imports {other}"


def test_trainer_imports_one_way():
    for name, found in IMPORTS.items():
        parts = name.split(".")
        if parts[0] != "adafm_trainer" or len(parts) < 2:
            continue
        for other in found:
            target = other.split(".")
            if target[0] != "adafm_trainer" or len(target) < 2 or target[1] == parts[1]:
                continue
            if parts[1] in TRAINER_LEAVES:
                assert target[1] in TRAINER_LEAVES, f"{name} is a leaf and imports {other}"
            elif parts[1] in TRAINER_LAYERS and target[1] in TRAINER_LAYERS:
                place = TRAINER_LAYERS.index
                assert place(target[1]) > place(parts[1]), f"{name} imports {other}"


@pytest.mark.parametrize("forbidden", ["torchvision", "yaml", "scipy", "sklearn"])
def test_nothing_imports_what_is_not_required(forbidden):
    assert not [name for name, found in IMPORTS.items() if any(is_in(i, forbidden) for i in found)]


def test_only_the_command_line_imports_tyro():
    users = [name for name, found in IMPORTS.items() if any(is_in(i, "tyro") for i in found)]
    assert all(is_in(name, "adafm_trainer.cli") for name in users), users


def test_triton_is_imported_by_its_backend_alone():
    users = {name for name, found in IMPORTS.items() if any(is_in(i, "triton") for i in found)}
    assert users and all(name.startswith("adafm_kernels.backends.triton") for name in users), users


LEAN = """
import sys
events = []
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn")
sys.addaudithook(lambda name, args: events.append(name) if name in watched else None)
import torch
del events[:]
loaded = set(torch.ops.loaded_libraries)
import {package}
assert events == [], events
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules, "triton"
assert set(torch.ops.loaded_libraries) == loaded, "a library was loaded"
assert "adafm_kernels._C" not in sys.modules, "_C"
assert "tyro" not in sys.modules and "matplotlib" not in sys.modules
print("lean")
"""


@pytest.mark.parametrize(
    "package",
    ["adafm_kernels", "adafm_kernels.doctor", "adafm_trainer", "adafm_trainer.models", "adafm_trainer.methods"],
)
def test_import_is_lean(package):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", LEAN.format(package=package)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "lean", done.stderr


def test_version_agrees_with_the_distribution():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated and adafm_kernels.__version__ == stated[1]
