"""The CUDA kernels as the compiler left them: architectures, registers, spills, and 16-byte memory accesses.

Reads the built library where it has CUDA kernels, else compiles the sources with nvcc. No GPU is needed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "adafm_kernels" / "lib" / "libadafm.so"
ARCHITECTURES = ("80", "90", "100", "120")
HALF = ("__half", "__nv_bfloat16")

# Registers for a thread. With 128 threads in a block: 80 leave room for 6 blocks on a multiprocessor, 51 for 10.
REGISTERS = {
    "modulate_rows_kernel": 80,
    "modulate_flat_kernel": 48,
    "modulate_strided_kernel": 48,
    "modulate_backward_rows_kernel": 80,
    "modulate_backward_flat_kernel": 51,
    "modulate_backward_strided_kernel": 56,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel instance on one architecture."""

    architecture: str
    name: str
    types: tuple[str, ...]
    registers: int
    stack: int
    local: int


def cuobjdump():
    """From PATH, beside nvcc, or out of the Triton package."""
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    for path in (None, str(triton) if triton else ""):
        found = shutil.which("cuobjdump", path=path)
        if found:
            return found
    pytest.skip("needs cuobjdump, which comes with the CUDA toolkit and with Triton")


def dump(binary, *options):
    # cuobjdump looks for nvdisasm on PATH and finds it beside itself only this way.
    tool = cuobjdump()
    path = os.pathsep.join((str(Path(tool).parent), os.environ["PATH"]))
    done = subprocess.run(
        [tool, *options, str(binary)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_info():
    if importlib.util.find_spec("adafm_kernels._C") is None or not LIBRARY.exists():
        return None
    from adafm_kernels import _C

    return _C.build_info()


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """Files that hold the kernels' machine code."""
    info = build_info()
    if info is not None and info["cuda"]:
        return [LIBRARY]
    if shutil.which("nvcc") is None:
        pytest.skip("needs a library with CUDA kernels, or nvcc")
    folder = tmp_path_factory.mktemp("objects")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("modulate*.cu")):
        objects.append(folder / f"{source.stem}.o")
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            "--threads=2",
            f"-I{ROOT / 'csrc' / 'include'}",
            "-c",
            source,
            "-o",
            objects[-1],
        ]
        for arch in ARCHITECTURES:
            if f"compute_{arch}\n" in known:
                command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return objects


def demangle(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernel_types(demangled):
    """("modulate_rows_kernel", ("float", "__half"))"""
    found = re.search(r"adafm::cuda::(\w+)<(.*?)>\(", demangled)
    return found[1], tuple(part.strip() for part in found[2].split(","))


@pytest.fixture(scope="module")
def kernels(binaries):
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt")
    rows = []
    for binary in binaries:
        arch = None
        for line in dump(binary, "-res-usage").splitlines():
            if found := re.search(r"arch = sm_(\w+)|\.sm_(\w+)\.cubin", line):
                arch = found[1] or found[2]
            if found := re.search(r"Function (\S+):", line):
                name = found[1]
            if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
                rows.append((arch, name, *map(int, found.groups())))
    plain = demangle(sorted({row[1] for row in rows}))
    return [Kernel(arch, *kernel_types(plain[name]), *numbers) for arch, name, *numbers in rows]


def accesses(binaries, arch) -> Iterator[tuple[str, tuple[str, ...], list[str], list[str]]]:
    """For each kernel of an architecture: name, types, and the instructions that load from and store to memory."""
    listings = {}
    for binary in binaries:
        name = None
        for line in dump(binary, "-sass", "-arch", f"sm_{arch}").splitlines():
            if found := re.search(r"Function : (\S+)", line):
                name = found[1]
                listings[name] = ([], [])
            elif found := re.search(r"\b(LDG|STG)(\.[A-Z0-9.]+)", line):
                listings[name][found[1] == "STG"].append(found[0])
    plain = demangle(sorted(listings))
    for name, (loads, stores) in listings.items():
        yield *kernel_types(plain[name]), loads, stores


def wide(instructions):
    return [i for i in instructions if re.search(r"\.(128|256)\b", i)]


def words(element):
    """16-byte words in eight elements."""
    return 1 if element in HALF else 2


def test_library_lists_its_architectures():
    info = build_info()
    if info is None or not info["cuda"]:
        pytest.skip("the library in this tree has no CUDA kernels")
    elf = set(re.findall(r"\.sm_(\w+)\.cubin", dump(LIBRARY, "-lelf")))
    assert elf == set(info["cuda_archs"])
    assert set(re.findall(r"\.sm_(\w+)\.ptx", dump(LIBRARY, "-lptx"))) == {info["cuda_archs"][-1]}
    if not os.environ.get("ADAFM_CUDA_ARCHS") and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        major = int(info["cuda_version"].split(".")[0])
        assert major < 13 or elf == set(ARCHITECTURES)


def test_every_kernel_is_there(kernels):
    instances = {(k.architecture, k.name, k.types) for k in kernels}
    for arch in {k.architecture for k in kernels}:
        count = {name: len([1 for a, n, _ in instances if a == arch and n == name]) for name in REGISTERS}
        assert count == {
            "modulate_rows_kernel": 9,
            "modulate_flat_kernel": 18,
            "modulate_strided_kernel": 16,
            "modulate_backward_rows_kernel": 9,
            "modulate_backward_flat_kernel": 18,
            "modulate_backward_strided_kernel": 16,
        }


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k.stack or k.local]
    assert not spilling, "\n".join(map(str, spilling))


def test_registers_are_bounded(kernels):
    beyond = [k for k in kernels if k.registers > REGISTERS[k.name]]
    assert not beyond, "\n".join(map(str, beyond))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vector_kernels_use_16_byte_accesses(binaries, kernels, arch):
    if arch not in {k.architecture for k in kernels}:
        pytest.skip(f"built without sm_{arch}")
    seen = set()
    for name, types, loads, stores in accesses(binaries, arch):
        seen.add(name)
        source, target = types[0], types[1]
        narrow_loads = len(loads) - len(wide(loads))
        if name == "modulate_rows_kernel":
            # Three taps in the batched loop and one in its remainder; gamma and beta by word, or value by value.
            assert len(wide(loads)) >= 4 * words(source) + 4, (name, types, loads)
            assert narrow_loads <= 16, (name, types, loads)
            assert len(wide(stores)) == len(stores) >= 4 * words(target), (name, types, stores)
        elif name == "modulate_flat_kernel":
            assert len(wide(loads)) == words(source), (name, types, loads)
            assert len(wide(stores)) == words(target), (name, types, stores)
        elif name == "modulate_backward_rows_kernel":
            assert len(wide(loads)) >= words(source) + words(target) + 2, (name, types, loads)
            assert narrow_loads <= 8, (name, types, loads)
            assert len(wide(stores)) == len(stores) >= words(target) + 4, (name, types, stores)
        elif name == "modulate_backward_flat_kernel":
            assert len(wide(loads)) >= words(source) + words(target), (name, types, loads)
            assert len(wide(stores)) >= words(target), (name, types, stores)
    assert set(REGISTERS) == seen
