"""What is installed, what was built, and which backend serves each op on each device of this machine, and why.

``python -m adafm_kernels`` prints it; ``--json`` as JSON; ``--verify`` also compares every op on every backend that
runs here with float64: values, first and second derivatives. Works where the compiled library is missing, and says so.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from . import __version__
from ._library import LIBRARY_PATH, LibraryMissingError, build_info, load_library
from .backends import BACKENDS, OPS, choose, forced_backend, which_backend
from .verify import verify
from .verify_check import Check, as_rows


def report() -> dict[str, Any]:
    """Versions, the build, the devices and the choices, as plain data.

    Keys: ``versions``, ``devices``, ``build``, ``library``, ``forced_backend``, ``ops`` (one row for each op and
    device: op, device, backend or None, reason) and ``backends`` (one row for each backend and device: backend, device,
    available, reason).
    """
    info, missing = build_info()
    devices = _devices()
    names = [row["device"] for row in devices]
    return {
        "versions": {
            "adafm_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _triton_version(),
        },
        "devices": devices,
        "build": info if info is not None else {"missing": missing},
        "library": _library(),
        "forced_backend": forced_backend(),
        "ops": [_op_row(op, device) for op in OPS for device in names],
        "backends": [_backend_row(backend, device) for backend in BACKENDS for device in names],
    }


def main(argv: list[str] | None = None) -> int:
    """Print the report. 0; with ``--verify`` 1 where a check fails or an op is served by nothing; 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="adafm doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--verify", action="store_true", help="compare every backend that runs here with float64")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    found = report()
    checks: list[Check] = []
    if arguments.verify:
        for row in found["backends"]:
            if row["available"]:
                checks += verify(row["backend"], row["device"])
        found["verify"] = as_rows(checks)
        found["verified"] = all(check.passed for check in checks) and all(row["backend"] for row in found["ops"])
    print(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0 if found.get("verified", True) else 1


def _devices() -> list[dict[str, Any]]:
    level = torch.backends.cpu.get_cpu_capability()
    rows: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{platform.machine()}, {os.cpu_count()} CPUs, torch uses {level}",
            "threads": torch.get_num_threads(),
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
            rows.append({"device": f"cuda:{index}", "name": name, "capability": f"{major}.{minor}"})
    return rows


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> dict[str, Any]:
    try:
        load_library()
    except LibraryMissingError as error:
        return {"path": str(LIBRARY_PATH), "loaded": False, "message": str(error)}
    ops = torch.ops.adafm_compiled
    return {
        "path": str(LIBRARY_PATH),
        "loaded": True,
        "cuda_kernels": ops.cuda_available_in_library(),
        "cuda_stream": ops.cuda_stream_symbol(),
    }


def _op_row(op: str, device: str) -> dict[str, Any]:
    try:
        choice = which_backend(op, device)
    except (RuntimeError, ValueError) as error:
        return {"op": op, "device": device, "backend": None, "reason": str(error)}
    return {"op": op, "device": device, "backend": choice.name, "reason": choice.reason}


def _backend_row(backend: str, device: str) -> dict[str, Any]:
    kind, _, index = device.partition(":")
    try:
        choose(kind, int(index) if index else None, backend)
    except RuntimeError as error:
        return {"backend": backend, "device": device, "available": False, "reason": str(error)}
    return {"backend": backend, "device": device, "available": True, "reason": ""}


def _text(found: dict[str, Any]) -> str:
    lines = ["  ".join(f"{name} {version or 'none'}" for name, version in found["versions"].items())]
    lines += [f"{row['device']}: {row['name']}" for row in found["devices"]]
    build, library = found["build"], found["library"]
    if "missing" in build:
        lines.append(f"build: {build['missing']}")
    else:
        archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"])
        cuda = f"CUDA {build['cuda_version']} for {archs}" if build["cuda"] else "without CUDA kernels"
        lines.append(f"build: {build['compiler']}, {cuda}, torch headers {build['torch_headers']}")
        lines.append(f"CPU level: {build['cpu_level']}")
    lines.append(f"library: {library['path']}" if library["loaded"] else f"library: {library['message']}")
    if library["loaded"] and library["cuda_kernels"] and not library["cuda_stream"]:
        lines.append("  its CUDA kernels rest: this torch has no CUDA")
    if found["forced_backend"] is not None:
        lines.append(f"forced backend: {found['forced_backend']}")
    lines.append("which backend serves:")
    lines += [f"  {r['op']} on {r['device']}: {r['backend'] or 'nothing'} ({r['reason']})" for r in found["ops"]]
    lines.append("backends:")
    for row in found["backends"]:
        lines.append(f"  {row['backend']} on {row['device']}: {'yes' if row['available'] else 'no, ' + row['reason']}")
    return "\n".join(lines + (_verify_text(found) if "verify" in found else []))


def _verify_text(found: dict[str, Any]) -> list[str]:
    lines = ["compared with float64 (errors in units of the last place):"]
    for backend, device in dict.fromkeys((row["backend"], row["device"]) for row in found["verify"]):
        rows = [row for row in found["verify"] if (row["backend"], row["device"]) == (backend, device)]
        failed = [row for row in rows if not row["passed"]]
        worst = max(row["error"] for row in rows)
        verdict = f"{len(rows)} checks pass" if not failed else f"{len(failed)} of {len(rows)} checks FAIL"
        lines.append(f"  {backend} on {device}: {verdict}, largest error {worst:.2f}")
        lines += [f"    {row['op']}, {row['case']}, {row['what']}: {row['error']:.2f}" for row in failed]
    unserved = [row for row in found["ops"] if row["backend"] is None]
    lines += [f"  {row['op']} on {row['device']}: served by nothing" for row in unserved]
    return lines
