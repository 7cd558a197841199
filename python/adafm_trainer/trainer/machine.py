"""Where a run or a measurement took place: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from adafm_kernels import __version__
from adafm_kernels._library import build_info


def facts(device: str) -> dict:
    """Machine, versions and commit, as JSON-ready values."""
    build, missing = build_info()
    found = {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_level": build["cpu_level"] if build else missing,
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {**versions(), "compiler": build["compiler"] if build else None},
        "commit": commit(),
        "dirty": dirty(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = _driver()
        found["versions"]["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for a package that is not there."""
    return {
        "adafm_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _version("triton"),
    }


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Commit of the source tree this module lies in; "unknown" for an installed wheel."""
    return (_git("rev-parse", "--short", "HEAD") if _tracked() else None) or "unknown"


def dirty() -> bool | None:
    """Whether tracked files differ from the commit; None where there is no commit."""
    status = _git("status", "--porcelain", "--untracked-files=no") if _tracked() else None
    return None if status is None else bool(status)


def _tracked() -> bool:
    """Whether the repository around this file is this project's, not one that it is installed into."""
    return _git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is not None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
