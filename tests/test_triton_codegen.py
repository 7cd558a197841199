"""The machine code of the Triton kernels, compiled without a GPU: registers, spills, 128-bit accesses.

The arguments are specialised as the launcher's are for a real layer: 16-byte aligned pointers, I divisible by 16.
"""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from conftest import INTERPRETED

spec = importlib.util.find_spec("triton")
if spec is None:
    pytest.skip("needs the package triton", allow_module_level=True)
if INTERPRETED:
    pytest.skip("needs a process with TRITON_INTERPRET unset", allow_module_level=True)
TOOLS = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
if not all((TOOLS / tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
    pytest.skip("needs cuobjdump and nvdisasm, which come with triton", allow_module_level=True)

ARCHITECTURES = (80, 90, 100, 120)
# Arguments beside the pointers that the launcher finds divisible by 16.
DIVISIBLE = ("inner", "count", "gamma_stride_o", "beta_stride_o")
# Registers of a thread with which eight programs of four warps fit on a multiprocessor.
MOST_REGISTERS = 64


@functools.cache
def machine_code(kernel_name, arch, types, constants):
    """A kernel compiled for an architecture, as a cubin."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adafm_kernels.backends import triton_kernels

    kernel = getattr(triton_kernels, kernel_name)
    values = {name: getattr(tl, value) if name == "ACC" else value for name, value in constants}
    types = dict(types)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in DIVISIBLE]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=values,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def inspect(cubin, folder):
    """Its resources by name, and its instructions."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)
    resources = {name: int(value) for name, value in found}
    code = subprocess.run([TOOLS / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    return resources, code


def constants(**values):
    return tuple(values.items())


def flat(weight, out):
    """Types of the arguments of the flat kernel; the parameters have the type of the computation."""
    wide = "*fp64" if weight == "*fp64" else "*fp32"
    return constants(weight_ptr=weight, gamma_ptr=wide, beta_ptr=wide, out_ptr=out, count="i32")


def tiled(weight, out):
    """Types of the arguments of the tiled kernel; the strides over I are 1, as the launcher's specialisation sees."""
    pointers = constants(weight_ptr=weight, gamma_ptr="*fp32", beta_ptr="*fp32", out_ptr=out)
    return pointers + constants(outer="i32", inner="i32", gamma_stride_o="i32", beta_stride_o="i32")


def backward(grad):
    """Types of the arguments of the backward of a float32 weight."""
    names = ("weight_ptr", "gamma_ptr", "grad_weight_ptr", "grad_gamma_ptr", "grad_beta_ptr")
    integers = constants(outer="i32", inner="i32", gamma_stride_o="i32")
    return (("grad_ptr", grad), *((name, "*fp32") for name in names), *integers)


def needs(weight, last):
    """What the backward is asked for, and its layouts."""
    asked = constants(NEED_WEIGHT=weight, NEED_GAMMA=True, NEED_BETA=True)
    return asked + constants(gamma_stride_i=1, GRAD_LAST=last, WEIGHT_LAST=last, **BACKWARD_TILE)


# What the launcher chooses for a layer of 256 x 256 x 3 x 3.
TILE = {"ACC": "float32", "UNROLL": 9, "TAPS": 9, "BLOCK_O": 4, "BLOCK_I": 256}
BACKWARD_TILE = {**TILE, "BLOCK_O": 2}
# Kernel, argument types, constants, and the widest loads and stores that must be there.
CASES = {
    "flat float32 to bfloat16": (
        "modulate_flat_kernel",
        flat("*fp32", "*bf16"),
        constants(TAPS=9, ACC="float32", BLOCK=2048),
        (True, True),
    ),
    "flat float32": (
        "modulate_flat_kernel",
        flat("*fp32", "*fp32"),
        constants(TAPS=16, ACC="float32", BLOCK=2048),
        (True, True),
    ),
    "channels-last float32 to bfloat16": (
        "modulate_kernel",
        tiled("*fp32", "*bf16"),
        constants(gamma_stride_i=1, beta_stride_i=1, WEIGHT_LAST=True, OUT_LAST=True, **TILE),
        (True, True),
    ),
    "channels-last bfloat16": (
        "modulate_kernel",
        tiled("*bf16", "*bf16"),
        constants(gamma_stride_i=1, beta_stride_i=1, WEIGHT_LAST=True, OUT_LAST=True, **TILE),
        (True, True),
    ),
    "contiguous float32 to channels-last bfloat16": (
        "modulate_kernel",
        tiled("*fp32", "*bf16"),
        constants(gamma_stride_i=1, beta_stride_i=1, WEIGHT_LAST=False, OUT_LAST=True, **TILE),
        (True, True),
    ),
    "backward channels-last bfloat16 of float32": (
        "modulate_backward_kernel",
        backward("*bf16"),
        needs(False, True),
        (True, True),
    ),
    "backward contiguous float32 with dW": (
        "modulate_backward_kernel",
        backward("*fp32"),
        needs(True, False),
        (False, True),
    ),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_machine_code(case, arch, tmp_path):
    """No spill, no stack, registers in bounds, fused multiply-adds, and full-width accesses where they can be."""
    kernel, types, values, wide = case
    resources, code = inspect(machine_code(kernel, arch, types, values), tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert 0 < resources["REG"] <= MOST_REGISTERS
    assert re.search(r"\bFFMA2?\b", code)
    loads, stores = (len(re.findall(rf"\b{kind}\.E\.[\w.]*128", code)) for kind in ("LDG", "STG"))
    assert bool(loads) >= wide[0], "no 128-bit load"
    assert bool(stores) >= wide[1], "no 128-bit store"


def test_tiles_are_those_of_the_launcher():
    from adafm_kernels.backends import triton

    for tile, pairs in ((TILE, triton.PAIRS), (BACKWARD_TILE, triton.BACKWARD_PAIRS)):
        assert (tile["BLOCK_O"], tile["BLOCK_I"]) == triton.tiles(256, 256, pairs)
        assert tile["UNROLL"] == triton.unroll(tile["TAPS"])
    assert [triton.unroll(taps) for taps in (1, 16, 17, 25, 49)] == [1, 16, 1, 5, 7]
    assert [triton.tiles(*shape, 1024) for shape in ((1, 1), (3, 5), (5000, 3), (2, 5000))] == [
        (1, 1), (4, 8), (256, 4), (1, 1024),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float64_compiles(arch, tmp_path):
    """The plain float64 instances, exempt from the bounds above."""
    types = flat("*fp64", "*fp64")
    cubin = machine_code("modulate_flat_kernel", arch, types, constants(TAPS=9, ACC="float64", BLOCK=2048))
    assert "DFMA" in inspect(cubin, tmp_path)[1]
