"""Packaging: what the sdist and the wheel hold, the wheel in another environment, the C++ tests, and the messages that
a person sees where something is missing. Builds leave the CUDA kernels out where they are not the point: it is faster.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_COMMAND = re.compile(r"pip install 'torch>=2\.11,<2\.14'")

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the build is made for Linux"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "pip")),
        reason="needs setuptools, pybind11 and pip in this environment",
    ),
]


def run(*command, cwd=ROOT, expect=0, **environment):
    """Runs a command with changed environment variables (None removes one); returns what it printed."""
    variables = {**os.environ, "ADAFM_CUDA": "0", **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    if "PYTHONPATH" not in environment:
        variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=900
    )
    printed = done.stdout + done.stderr
    assert done.returncode == expect, printed
    return printed


def tool(name):
    """cmake, ninja or ctest: from this environment's scripts, else from PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def configure(build, *options, expect=0, **environment):
    return run(
        tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DADAFM_TORCH=OFF", *options, expect=expect, **environment,
    )  # fmt: skip


def make_environment(folder, *, with_this_one):
    """A virtual environment without pip; it sees the packages of the running one where asked to."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    if with_this_one:
        packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')")
        # A path file inside an added folder is not read, so this environment's editable install stays out of sight.
        Path(packages, "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tool("cmake"), tool("ninja")
    folder = tmp_path_factory.mktemp("sdist")
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/golden/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    run(sys.executable, "-c", code, folder, cwd=tree)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the unpacked sdist, so that whatever the build reads has to be in it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of another environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("other")
    python = make_environment(folder / "env", with_this_one=True)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def asset_files():
    assets = ROOT / "python" / "adafm_trainer" / "assets"
    return {f"adafm_trainer/assets/{path.relative_to(assets)}" for path in assets.rglob("*") if path.is_file()}


def test_sdist_holds_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 10
    for name in (
        *sources,
        "CMakeLists.txt",
        "cmake/cuda.cmake",
        "cmake/torch.cmake",
        "setup.py",
        "LICENSE",
        "Makefile",
    ):
        assert name in names, name
    assert {f"python/{name}" for name in asset_files() if "__pycache__" not in name} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_holds_both_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "adafm_kernels/lib/libadafm.so" in names
    assert [name for name in names if re.fullmatch(r"adafm_kernels/_C\.cpython-.*\.so", name)]
    assert {"adafm_kernels/__init__.py", "adafm_trainer/cli/__init__.py", "adafm_kernels/py.typed"} <= names
    assert {name for name in asset_files() if "__pycache__" not in name} <= names
    templates = ROOT / "python" / "adafm_trainer"
    for kind in ("html", "css", "js"):
        for path in templates.rglob(f"*.{kind}"):
            assert f"adafm_trainer/{path.relative_to(templates)}" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    assert "License: MIT" in metadata
    required = {line.split(": ", 1)[1] for line in metadata.splitlines() if re.match("Requires-Dist(?!.*extra)", line)}
    assert {re.match(r"[\w.-]+", line)[0] for line in required} == {
        "torch", "numpy", "pillow", "safetensors", "tyro", "triton",
    }  # fmt: skip


def test_wheel_works_in_another_environment(installed, tmp_path):
    where = run(
        installed, "-c", "import adafm_kernels as a, adafm_trainer as t; print(a.__file__, t.__file__)", cwd=tmp_path
    )
    assert all(str(installed.parent.parent) in path for path in where.split())
    printed = run(installed.parent / "adafm", "doctor", "--verify", cwd=tmp_path)
    assert str(installed.parent.parent) in printed


def test_library_without_cuda(installed, tmp_path):
    code = (
        "import adafm_kernels._C as c, torch, pathlib, adafm_kernels as a;"
        "torch.ops.load_library(pathlib.Path(a.__file__).parent / 'lib' / 'libadafm.so');"
        "print(c.build_info()['cuda'], c.build_info()['cuda_archs'],"
        " torch.ops.adafm_compiled.cuda_available_in_library(), torch.ops.adafm_compiled.cuda_stream_symbol())"
    )
    assert run(installed, "-c", code, cwd=tmp_path).split() == ["False", "[]", "False", "False"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_needs_no_libpython(installed, tmp_path):
    code = "import adafm_kernels, pathlib; print(pathlib.Path(adafm_kernels.__file__).parent, end='')"
    package = Path(run(installed, "-c", code, cwd=tmp_path))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", package / "lib" / "libadafm.so"))
    assert not [name for name in needed if "python" in name or "cuda" in name]
    # Without libtorch.so itself the CUDA stream function stays unresolved on a torch with CUDA.
    assert "libtorch.so" in needed
    assert not re.search(r"RPATH|RUNPATH", run("readelf", "-d", package / "lib" / "libadafm.so"))


def test_missing_library_is_named(installed, tmp_path):
    code = "import adafm_kernels, pathlib, shutil; print(pathlib.Path(adafm_kernels.__file__).parent, end='')"
    package = Path(run(installed, "-c", code, cwd=tmp_path))
    shutil.copytree(package, tmp_path / "adafm_kernels", ignore=shutil.ignore_patterns("*.so"))
    use = "import torch, adafm_kernels as a; w, g = torch.ones(2, 3), torch.full((2, 3), 2.0);"
    printed = run(installed, "-c", use + "print(a.modulate(w, g, g, backend='reference').sum().item())", cwd=tmp_path)
    assert printed.split() == ["24.0"]
    printed = run(installed, "-c", use + "a.modulate(w, g, g)", cwd=tmp_path, expect=1)
    assert "libadafm.so" in printed.splitlines()[-1] and "pip install" in printed.splitlines()[-1]


def test_torch_is_found_from_an_isolated_build(tmp_path):
    """pip's isolated build hides the environment's packages behind PYTHONPATH; torch's headers are still found."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        origin = Path(importlib.util.find_spec(name).origin).parent
        (overlay / name).symlink_to(origin)
    hide = "import sys; sys.path[:] = [p for p in sys.path if not p.endswith(('site-packages', 'dist-packages'))]\n"
    (overlay / "sitecustomize.py").write_text(hide)
    code = (
        "import importlib.util as u, runpy; assert u.find_spec('torch') is None;"
        "print(runpy.run_path('setup.py', run_name='setup')['torch_folder'](), end='')"
    )
    found = run(sys.executable, "-c", code, PYTHONPATH=str(overlay), ADAFM_TORCH_DIR=None)
    assert Path(found).resolve() == Path(importlib.util.find_spec("torch").origin).resolve().parent


def test_missing_torch_is_one_sentence(tmp_path):
    python = make_environment(tmp_path / "bare", with_this_one=False)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (overlay / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    printed = run(
        python, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp",
        expect=1, PYTHONPATH=str(overlay), ADAFM_TORCH_DIR=None,
    )  # fmt: skip
    last = printed.strip().splitlines()[-1]
    assert TORCH_COMMAND.search(last), printed
    assert "Traceback" not in printed


def test_setup_names_what_an_environment_lacks(tmp_path):
    make_environment(tmp_path / "bare", with_this_one=False)
    printed = run(sys.executable, "tools/make_environment.py", tmp_path / "bare", expect=2)
    for name in ("setuptools", "cmake", "ninja", "pybind11", "torch"):
        assert name in printed
    assert "Traceback" not in printed and "pip install" in printed


def test_second_setup_does_nothing(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    if not (ROOT / "adafm_kernels" / "lib" / "libadafm.so").exists():
        pytest.skip("the library is not in this tree")
    stamp = tmp_path / ".adafm-setup.stamp"
    stamp.touch()
    run("make", "-q", "setup", f"VENV={tmp_path}")
    os.utime(stamp, (0, 0))
    run("make", "-q", "setup", f"VENV={tmp_path}", expect=1)


def test_kernels_in_cpp(tmp_path):
    """The torch-free library and its C++ tests: every instruction level against one reference, bit for bit."""
    configure(tmp_path)
    run(tool("cmake"), "--build", tmp_path)
    printed = run(tool("ctest"), "--test-dir", tmp_path, "--output-on-failure")
    assert re.search(r"100% tests passed.* out of \d", printed), printed


def test_kernels_under_sanitizers(tmp_path):
    """The kernels of this machine's level and the emulated CUDA kernels: no bad access, no undefined behaviour."""
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() { return 0; }\n")
    probe = ["c++", "-fsanitize=address,undefined", str(source), "-o", str(program)]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("needs a compiler with its sanitizer libraries")
    configure(tmp_path / "build", "-DADAFM_SANITIZE=ON")
    run(tool("cmake"), "--build", tmp_path / "build", "--target", "kernels_test")
    printed = run(tool("ctest"), "--test-dir", tmp_path / "build", "-R", "^kernels_test$", "--output-on-failure")
    assert re.search(r"100% tests passed.* out of 1", printed), printed
    sanitized = (tmp_path / "build" / "tests" / "cpp" / "kernels_test").read_bytes()
    assert b"__asan_report_load" in sanitized and b"__ubsan_handle" in sanitized


def test_cuda_asked_for_without_nvcc(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    for name in ("c++", "cc", "ld", "ar", "as", "ranlib"):
        if shutil.which(name):
            (empty / name).symlink_to(shutil.which(name))
    without = {"PATH": str(empty), "CUDACXX": None}
    printed = configure(tmp_path / "asked", "-DADAFM_TESTS=OFF", expect=1, ADAFM_CUDA="1", **without)
    assert "nvcc is not on PATH" in printed
    printed = configure(tmp_path / "unset", "-DADAFM_TESTS=OFF", ADAFM_CUDA=None, **without)
    assert "left out (no nvcc on PATH)" in printed
    printed = configure(tmp_path / "wrong", "-DADAFM_TESTS=OFF", expect=1, ADAFM_CUDA="yes", **without)
    assert 'ADAFM_CUDA is "yes"' in printed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_architectures_are_chosen(tmp_path):
    printed = configure(tmp_path / "list", "-DADAFM_TESTS=OFF", ADAFM_CUDA="1", ADAFM_CUDA_ARCHS="9.0+PTX 8.0;1.0")
    assert "does not know sm_10" in printed and "architectures 80,90, PTX 90" in printed
    printed = configure(tmp_path / "wrong", "-DADAFM_TESTS=OFF", expect=1, ADAFM_CUDA="1", ADAFM_CUDA_ARCHS="hopper")
    assert "hopper" in printed
