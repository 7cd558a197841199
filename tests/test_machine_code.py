"""The CUDA kernels as the compiler left them: architectures, registers, spills, and 16-byte memory accesses.

Reads the built library where it has CUDA kernels, else compiles the sources with nvcc. No GPU is needed.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "adafm_kernels" / "lib" / "libadafm.so"
ARCHITECTURES = ("80", "90", "100", "120")
HALF = ("__half", "__nv_bfloat16")


@dataclass(frozen=True)
class Expected:
    """What is asked of a kernel. Registers: with 128 threads in a block, 51 leave room for 10 blocks on a
    multiprocessor, 80 for 6, 128 for 4, 168 for 3."""

    instances: int
    registers: int
    # Accesses of fewer than 16 bytes in the instances for float32, float16 and bfloat16; None: the kernel takes single
    # elements. `why` names them.
    narrow_loads: int | None = None
    narrow_stores: int = 0
    why: str = ""
    # Least numbers of 16-byte accesses, from the 16-byte words in eight elements of the first and the second type.
    loads: Callable[[int, int], int] = lambda first, second: 0
    stores: Callable[[int, int], int] = lambda first, second: 0


def batch(grad, weight):
    """16-byte words that a reduction has under way: two taps of float32 pairs, else three."""
    return (2 if grad + weight == 4 else 3) * (grad + weight)


# Types are (weight, result) in forward kernels and (gradient, weight) in backward kernels and the step.
# The read of nine taps is unrolled; gamma and beta take two words each, a tile one.
ROWS = "gamma and beta with other strides than a dense row's"
SCALAR = "tiles of layers whose I is no multiple of 8"
TAIL = "gamma and beta of two pairs; the last elements of a weight"
TABLE = "layers in other memory orders"
KERNELS = {
    "modulate_rows_kernel": Expected(9, 80, 16, 0, ROWS, lambda s, d: 9 * s + 4, lambda s, d: 9 * d),
    "modulate_flat_kernel": Expected(18, 48, 24, 16, TAIL, lambda s, d: s, lambda s, d: d),
    "modulate_pairs_kernel": Expected(11, 48),
    "modulate_backward_rows_kernel": Expected(9, 80, 8, 0, ROWS, batch, lambda g, w: w + 4),
    "modulate_backward_flat_kernel": Expected(18, 51, 64, 16, TAIL, lambda g, w: g + w, lambda g, w: w),
    "modulate_backward_pairs_kernel": Expected(11, 56),
    "modulate_arena_kernel": Expected(7, 80, 9, 7, SCALAR, lambda s, d: 9 * s + 5, lambda s, d: 9 * d),
    "modulate_backward_arena_kernel": Expected(7, 80, 29, 9, SCALAR, lambda g, w: batch(g, w) + 1, lambda g, w: w + 4),
    # float32 alone takes words. Parameter, gradient and moments: two words each; scalars: the tail, steps, step size.
    "adam_many_kernel": Expected(2, 64, 12, 6, "a tensor's tail and unaligned tensors", lambda p, _: 8, lambda p, _: 6),
    "count_steps_kernel": Expected(2, 16),
    "modulate_many_kernel": Expected(7, 80, 46, 20, TABLE, lambda s, d: 10 * s + 4, lambda s, d: 10 * d),
    "modulate_many_backward_kernel": Expected(7, 80, 83, 23, TABLE, batch, lambda g, w: 2 * w + 4),
    "modulate_lowrank_rows_kernel": Expected(
        5, 80, 19, 0, f"{ROWS}; the factors of a row", lambda s, d: 9 * s + 6, lambda s, d: 9 * d
    ),
    "modulate_lowrank_pairs_kernel": Expected(2, 48),
    "modulate_per_sample_rows_kernel": Expected(5, 128, 16, 0, ROWS, lambda s, d: 9 * s + 4, lambda s, d: 9 * d),
    "modulate_per_sample_flat_kernel": Expected(5, 80, 12, 0, TAIL, lambda s, d: s, lambda s, d: d),
    "modulate_per_sample_pairs_kernel": Expected(2, 48),
    "modulate_per_sample_backward_rows_kernel": Expected(
        5, 168, 32, 0, ROWS, lambda g, w: 9 * (g + w) + 2, lambda g, w: 9 * w + 4
    ),
    "modulate_per_sample_backward_pairs_kernel": Expected(2, 56),
    "modulate_normalized_filter_kernel": Expected(7, 128, 32, 0, ROWS, lambda s, d: 9 * s + 4, lambda s, d: 9 * d),
    "modulate_normalized_channel_kernel": Expected(7, 80, 16, 0, ROWS, lambda s, d: 3 * s + 4, lambda s, d: d),
    # 192 for two float32 operands of nine taps, which stay in registers; the others need no more than 168.
    "modulate_normalized_backward_filter_kernel": Expected(
        7, 192, 16, 0, ROWS, lambda g, w: 9 * (g + w) + 2, lambda g, w: 9 * w + 4
    ),
    "modulate_normalized_backward_channel_kernel": Expected(
        7, 128, 16, 0, ROWS, lambda g, w: 2 * g + 4 * w + 2, lambda g, w: w + 4
    ),
    # Parameters, both moments and the average, of gamma and of beta, are read and written: 16 words each way.
    "step_many_kernel": Expected(
        7, 112, 70, 28, f"{SCALAR}; hyper", lambda g, w: batch(g, w) + 9 * w + 17, lambda g, w: 9 * g + 16
    ),
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
        return (LIBRARY,)
    if shutil.which("nvcc") is None:
        pytest.skip("needs a library with CUDA kernels, or nvcc")
    folder = tmp_path_factory.mktemp("objects")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            "--fmad=false",
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
    return tuple(objects)


def demangle(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernel_types(demangled):
    """("modulate_rows_kernel", ("float", "__half"))"""
    found = re.search(r"adafm::cuda::(\w+)<(.*?)>\(", demangled)
    return found[1], tuple(part.strip().removeprefix("adafm::cuda::") for part in found[2].split(","))


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


@functools.cache
def accesses(binaries, arch) -> list[tuple[str, tuple[str, ...], list[str], list[str]]]:
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
    return [(*kernel_types(plain[name]), loads, stores) for name, (loads, stores) in listings.items()]


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
        count = Counter(name for a, name, _ in instances if a == arch)
        assert count == {name: expected.instances for name, expected in KERNELS.items()}


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k.stack or k.local]
    assert not spilling, "\n".join(map(str, spilling))


def test_registers_are_bounded(kernels):
    beyond = [k for k in kernels if k.registers > KERNELS[k.name].registers]
    assert not beyond, "\n".join(map(str, beyond))


def test_only_large_kernels_need_more_than_80_registers():
    """Everything that modulates or reduces once for a weight."""
    large = {name for name, expected in KERNELS.items() if expected.registers > 80}
    assert all(re.match("modulate_(per_sample|normalized)_|step_many", name) for name in large), large


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vector_kernels_use_16_byte_accesses(binaries, kernels, arch):
    if arch not in {k.architecture for k in kernels}:
        pytest.skip(f"built without sm_{arch}")
    seen = set()
    for name, types, loads, stores in accesses(binaries, arch):
        seen.add(name)
        expected = KERNELS[name]
        if expected.narrow_loads is None or types[0].startswith(("Any", "double")):
            continue
        first, second = words(types[0]), words(types[:2][-1])
        assert len(wide(loads)) >= expected.loads(first, second), (name, types, loads)
        assert len(wide(stores)) >= expected.stores(first, second), (name, types, stores)
        assert len(loads) - len(wide(loads)) <= expected.narrow_loads, (name, types, loads)
        assert len(stores) - len(wide(stores)) <= expected.narrow_stores, (name, types, stores)
    assert set(KERNELS) == seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_16_byte_store_is_split(binaries, kernels, arch):
    """Where W' has 16-bit elements, the stores below 16 bytes are those of single elements, never a word of two."""
    if arch not in {k.architecture for k in kernels}:
        pytest.skip(f"built without sm_{arch}")
    forward = [name for name in KERNELS if name.startswith("modulate_") and "backward" not in name]
    for name, types, _, stores in accesses(binaries, arch):
        if name in forward and types[1] in HALF:
            narrow = [i for i in stores if i not in wide(stores)]
            assert all(".U16" in i for i in narrow), (name, types, narrow)
