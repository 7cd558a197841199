"""The machine code of the Triton kernels, compiled without a GPU: registers, spills, 128-bit accesses.

The arguments are specialised as the launcher's are for a real layer: 16-byte aligned pointers, I divisible by 16. The
kernels of the family are launched here on a pretended GPU: their launchers choose the specialisation themselves.
"""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
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


class PretendedGpu:
    """A driver by whose word Triton compiles for an architecture; nothing can run on it."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def launched(monkeypatch, arch, launch):
    """The cubins of the kernels that a launcher compiles for an architecture, specialised for its own arguments."""
    import triton

    compiled = []
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options).asm["cubin"])

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", PretendedGpu(arch))
        patch.setattr(triton.JITFunction, "run", compile_only)
        launch()
    return compiled


def layer(dtype, last=True):
    """A layer of 256 x 256 x 3 x 3."""
    form = torch.channels_last if last else torch.contiguous_format
    return torch.zeros(256, 256, 3, 3, dtype=dtype).contiguous(memory_format=form)


def pairs(*lead, dtype=torch.float32):
    return torch.zeros(*lead, 256, 256, dtype=dtype)


def arena_modulate(weight, out):
    from adafm_kernels.backends import triton

    zeros = torch.zeros(4096)
    triton.modulate_many_out(zeros.to(weight), zeros, zeros, ONE_LAYER, TILES, zeros.to(out))


def arena_backward(grad, weight, with_weight):
    from adafm_kernels.backends import triton

    zeros = torch.zeros(4096)
    d_weight = zeros.to(weight) if with_weight else None
    triton.modulate_many_backward_out(
        zeros.to(grad), zeros.to(weight), zeros, ONE_LAYER, TILES, d_weight, zeros.clone(), zeros.clone()
    )


def arena_step(grad, weight, out, with_average):
    from adafm_kernels.backends import triton

    zeros, state = torch.zeros(4096), [torch.zeros(2, 4096) for _ in range(4)]
    average = state[3] if with_average else None
    triton.step_many(zeros.to(grad), zeros.to(weight), ONE_LAYER, TILES, zeros, *state[:3], average, zeros.to(out))


def many(weight, out, last=True):
    from adafm_kernels.backends import triton

    form = torch.channels_last if last else torch.contiguous_format
    triton.modulate_many([layer(weight, last)] * 5, [pairs()] * 5, [pairs()] * 5, out, [form] * 5)


def many_backward(grad, weight, mask):
    from adafm_kernels.backends import triton

    forms = [torch.channels_last] * 5
    triton.modulate_many_backward([layer(grad)] * 5, [layer(weight)] * 5, [pairs()] * 5, mask, forms)


def per_sample(weight, out, last=True):
    from adafm_kernels.backends import triton

    triton.modulate_per_sample(layer(weight, last), pairs(4), pairs(4), 4, out, last)


def per_sample_backward(grad, weight, mask):
    from adafm_kernels.backends import triton

    grads = torch.stack([layer(grad).permute(0, 2, 3, 1)] * 4).permute(0, 1, 4, 2, 3)
    triton.modulate_per_sample_backward(grads, layer(weight), pairs(4), mask, torch.channels_last)


def normalized(weight, out, over):
    from adafm_kernels.backends import triton

    triton.modulate_normalized(layer(weight), pairs(), pairs(), over, 1e-5, out, torch.channels_last)


def normalized_backward(grad, weight, over, mask):
    from adafm_kernels.backends import triton

    form = torch.channels_last
    triton.modulate_normalized_backward(layer(grad), layer(weight), pairs(), over, 1e-5, mask, form)


def lowrank(weight, out):
    from adafm_kernels.backends import triton

    left, right = torch.zeros(256, 16), torch.zeros(16, 256)
    triton.modulate_lowrank(layer(weight), pairs(), left, right, pairs(), out, torch.channels_last)


def flat_backward(grad, weight):
    from adafm_kernels.backends import triton

    mask = [True, True, True]
    triton.modulate_backward(layer(grad, False), layer(weight, False), pairs(), mask, torch.contiguous_format)


F32, BF16 = torch.float32, torch.bfloat16
ALL, SUMS, WEIGHT = [True, True, True], [False, True, True], [True, False, False]
ONE_LAYER = torch.tensor([[0, 0, 8, 16, 9, 0]])
TILES = torch.tensor([[0, 0, 16, 2 | 9 << 16]], dtype=torch.int32)
FAMILY = {
    "arena modulate float32 to bfloat16": (arena_modulate, F32, BF16),
    "arena modulate bfloat16": (arena_modulate, BF16, BF16),
    "arena backward bfloat16 of float32": (arena_backward, BF16, F32, False),
    "arena backward bfloat16": (arena_backward, BF16, BF16, False),
    "arena backward bfloat16 of float32 with dW": (arena_backward, BF16, F32, True),
    "arena step bfloat16 of float32": (arena_step, BF16, F32, BF16, False),
    "arena step with average": (arena_step, BF16, F32, BF16, True),
    "arena step float32": (arena_step, F32, F32, F32, False),
    "many float32 to bfloat16": (many, F32, BF16),
    "many contiguous float32": (many, F32, F32, False),
    "many backward bfloat16 of float32": (many_backward, BF16, F32, SUMS),
    "many backward bfloat16": (many_backward, BF16, BF16, SUMS),
    "per sample float32 to bfloat16": (per_sample, F32, BF16),
    "per sample contiguous float32 to bfloat16": (per_sample, F32, BF16, False),
    "per sample backward, sums": (per_sample_backward, BF16, F32, SUMS),
    "per sample backward, dW": (per_sample_backward, BF16, F32, WEIGHT),
    "normalized over filters": (normalized, F32, BF16, "filter"),
    "normalized over channels": (normalized, F32, BF16, "channel"),
    "normalized backward over filters": (normalized_backward, BF16, F32, "filter", ALL),
    "normalized backward over channels": (normalized_backward, BF16, F32, "channel", ALL),
    "lowrank": (lowrank, F32, BF16),
    "backward contiguous with dW": (flat_backward, F32, F32),
}
# The kernels of the family hold more at a time: four programs of four warps on a multiprocessor.
MOST_FAMILY_REGISTERS = 128


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", FAMILY.values(), ids=FAMILY)
def test_family(case, arch, tmp_path, monkeypatch):
    """What a launcher compiles for a real layer: no spill, no stack, registers in bounds, full-width accesses."""
    launch, *arguments = case
    kernels = launched(monkeypatch, arch, lambda: launch(*arguments))
    assert len(kernels) == 1
    resources, code = inspect(kernels[0], tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert 0 < resources["REG"] <= MOST_FAMILY_REGISTERS
    assert re.search(r"\bFFMA2?\b", code)
    for kind in ("LDG", "STG"):
        assert re.search(rf"\b{kind}\.E\.[\w.]*128", code), f"no 128-bit {kind}"


def test_tiles_are_those_of_the_launcher():
    from adafm_kernels.backends import triton

    for tile, pairs in ((TILE, triton.PAIRS), (BACKWARD_TILE, triton.BACKWARD_PAIRS)):
        assert (tile["BLOCK_O"], tile["BLOCK_I"]) == triton.tiles(256, 256, pairs)
        assert tile["UNROLL"] == triton.unroll(tile["TAPS"])
    assert [triton.unroll(taps) for taps in (1, 16, 17, 25, 49)] == [1, 16, 1, 5, 7]
    assert [triton.tiles(*shape, 1024) for shape in ((1, 1), (3, 5), (5000, 3), (2, 5000))] == [
        (1, 1), (4, 8), (256, 4), (1, 1024),
    ]  # fmt: skip


def float64_launches():
    """Every kernel of the family, with float64 tensors."""
    from adafm_kernels.backends import triton

    wide = torch.float64
    weight, contiguous, gamma = layer(wide), layer(wide, False), pairs(dtype=wide)
    zeros, state = torch.zeros(4096, dtype=wide), [torch.zeros(2, 4096, dtype=wide) for _ in range(4)]
    samples, grads = pairs(4, dtype=wide), torch.stack([contiguous] * 4)
    left, right = torch.zeros(256, 2, dtype=wide), torch.zeros(2, 256, dtype=wide)
    last, flat = torch.channels_last, torch.contiguous_format
    triton.modulate_many_out(zeros, zeros, zeros, ONE_LAYER, TILES, zeros)
    triton.modulate_many_backward_out(zeros, zeros, zeros, ONE_LAYER, TILES, zeros, zeros, zeros)
    triton.step_many(zeros, zeros, ONE_LAYER, TILES, zeros, *state, zeros)
    triton.modulate_many([weight] * 2, [gamma] * 2, [gamma] * 2, wide, [last] * 2)
    triton.modulate_many_backward([weight] * 2, [weight] * 2, [gamma] * 2, ALL, [last] * 2)
    triton.modulate_per_sample(weight, samples, samples, 4, wide, True)
    triton.modulate_per_sample(contiguous, samples, samples, 4, wide, False)
    triton.modulate_per_sample_backward(grads, contiguous, samples, ALL, flat)
    triton.modulate_normalized(weight, gamma, gamma, "channel", 1e-5, wide, last)
    triton.modulate_normalized_backward(weight, weight, gamma, "filter", 1e-5, ALL, last)
    triton.modulate_lowrank(weight, gamma, left, right, gamma, wide, last)
    triton.modulate_lowrank(contiguous, gamma, left, right, gamma, wide, flat)
    triton.modulate_backward(contiguous, contiguous, gamma, ALL, flat)


def test_float64_family_compiles(tmp_path, monkeypatch):
    """All kernels of the family as float64, exempt from the bounds above; per sample has two backward kernels."""
    kernels = launched(monkeypatch, 90, float64_launches)
    assert len(kernels) == 14
    assert all("DFMA" in inspect(cubin, tmp_path)[1] for cubin in kernels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float64_compiles(arch, tmp_path):
    """The plain float64 instances, exempt from the bounds above."""
    types = flat("*fp64", "*fp64")
    cubin = machine_code("modulate_flat_kernel", arch, types, constants(TAPS=9, ACC="float64", BLOCK=2048))
    assert "DFMA" in inspect(cubin, tmp_path)[1]
