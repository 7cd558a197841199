"""Builds the native parts with CMake and Ninja; everything else is in pyproject.toml.

The extension needs torch's headers but is not linked to one torch: they are looked up in the environment that is
being installed into, also from inside an isolated build, so that pip never fetches a second torch to build with.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_REQUIREMENT = "torch>=2.11,<2.14"

# Runs in the environment's own Python, without the paths that an isolated build puts in front.
FIND_TORCH = """
import importlib.util
spec = importlib.util.find_spec("torch")
print(list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else "", end="")
"""


def torch_folder() -> Path:
    """The folder of the installed torch package; torch is not imported."""
    chosen = os.environ.get("ADAFM_TORCH_DIR")
    if chosen:
        candidates = [Path(chosen)]
    else:
        found = subprocess.run(
            [sys.executable, "-E", "-c", FIND_TORCH], capture_output=True, text=True, check=True, cwd=ROOT / "csrc"
        ).stdout
        paths = sysconfig.get_paths()
        candidates = [Path(found)] if found else []
        candidates += [Path(paths[key]) / "torch" for key in ("platlib", "purelib")]
    for folder in candidates:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder
    raise SystemExit(
        f"adafm_kernels builds against an installed torch, and {sys.prefix} has none with the needed headers; "
        f"type: {sys.executable} -m pip install '{TORCH_REQUIREMENT}'"
    )


def tool(name: str) -> str:
    """Path of cmake or ninja: from the environment's scripts, else from PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build adafm_kernels; type: {sys.executable} -m pip install {name}")
    return found


class CMakeExtension(Extension):
    """A file that CMake builds; the name says where it goes."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake once for both files."""

    def get_ext_filename(self, fullname: str) -> str:
        """libadafm.so is a plain shared library: no Python tag in its name."""
        if fullname.split(".")[-1] == "libadafm":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.is_file():
            raise SystemExit(f"{header} is missing; install the Python headers (on Debian: apt install python3-dev)")
        torch = torch_folder()
        package = Path(self.get_ext_fullpath("adafm_kernels._C")).resolve().parent
        (package / "lib").mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DADAFM_OUTPUT_DIR={package}",
            f"-DADAFM_TORCH_DIR={torch}",
            "-DADAFM_TESTS=OFF",
        ]
        # An isolated build has other tool paths each time; a configuration made with the last ones is stale.
        shutil.rmtree(build, ignore_errors=True)
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"building adafm_kernels failed in: {' '.join(command)}")

    def copy_extensions_to_source(self) -> None:
        """An editable install puts both files into the tree; the folder of the library is not under version control."""
        (ROOT / "adafm_kernels" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


if __name__ == "__main__":
    setup(
        # Here and not in pyproject.toml, where the newest and the oldest usable setuptools want different forms.
        license="MIT",
        ext_modules=[CMakeExtension("adafm_kernels._C"), CMakeExtension("adafm_kernels.lib.libadafm")],
        cmdclass={"build_ext": CMakeBuild},
    )
