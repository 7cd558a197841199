"""A table of op timings on one GPU: the compiled kernels against eager broadcasting and against a copy of equal bytes.

    python benchmarks/gpu_table.py [--json FILE] [--check-only]

Times are medians of single calls between CUDA events, with the second-level cache overwritten before each call; methods
take turns within a round. Values are compared with eager PyTorch before anything is timed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adafm_kernels import modulate
from adafm_kernels._library import load_library

WARMUP = 5
ROUNDS = 50
# (out channels, in channels, kernel side): the smallest, a middle and the largest layer of 128 px generators, and 1x1.
SHAPES = ((64, 64, 3), (256, 512, 3), (1024, 1024, 3), (512, 512, 1))
TYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


@dataclass(frozen=True)
class Row:
    """One op on one shape: median, 20th and 80th percentile in microseconds, and what it is compared with."""

    op: str
    shape: str
    types: str
    layout: str
    median_us: float
    p20_us: float
    p80_us: float
    gbytes_per_second: float
    eager_us: float
    copy_us: float


def timed(methods: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Microseconds of each call of each method."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: list[list[float]] = [[] for _ in methods]
    for round_number in range(WARMUP + rounds):
        for method, found in zip(methods, times, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            method()
            end.record()
            torch.cuda.synchronize()
            if round_number >= WARMUP:
                found.append(start.elapsed_time(end) * 1000)
    return times


def row(
    op: str, shape: tuple[int, ...], types: str, layout: str, moved: int, methods: list[Callable], rounds: int
) -> Row:
    ours, eager, copy = timed(methods, rounds)
    median = statistics.median(ours)
    low, *_, high = statistics.quantiles(ours, n=5)
    return Row(
        op, "x".join(map(str, shape)), types, layout, median, low, high,
        moved / median / 1000, statistics.median(eager), statistics.median(copy),
    )  # fmt: skip


def check(name: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: int) -> None:
    """Equal within that many roundings of the type, relative to the largest entry."""
    error = (found.double() - expected.double()).abs().max().item()
    allowed = roundings * torch.finfo(dtype).eps * expected.double().abs().max().item()
    if not error <= allowed:
        raise SystemExit(f"{name}: differs from eager PyTorch by {error}, allowed are {allowed}")


def copy_of(nbytes: int) -> Callable[[], object]:
    """A copy that reads and writes this many bytes in all."""
    source = torch.empty(max(nbytes // 2, 1), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def cases(rounds: int, shapes: tuple[tuple[int, int, int], ...]) -> list[Row]:
    load_library()
    backward = torch.ops.adafm_compiled.modulate_backward
    rows = []
    for out_channels, in_channels, side in shapes:
        shape = (out_channels, in_channels, side, side)
        pairs, n = out_channels * in_channels, out_channels * in_channels * side * side
        generator = torch.Generator("cuda").manual_seed(0)
        gamma, beta = (torch.randn(shape[:2], device="cuda", generator=generator) for _ in range(2))
        wide = [parameter[:, :, None, None] for parameter in (gamma, beta)]
        for layout in (torch.contiguous_format, torch.channels_last):
            name = "OIHW" if layout == torch.contiguous_format else "OHWI"
            for source, target in TYPES:
                types = f"{source} to {target}".replace("torch.", "")
                weight = torch.randn(shape, device="cuda", generator=generator).to(source, memory_format=layout)

                def eager(weight=weight, target=target, layout=layout, wide=wide):
                    return (wide[0] * weight + wide[1]).to(target, memory_format=layout)

                def ours(weight=weight, target=target, layout=layout, parameters=(gamma, beta)):
                    return modulate(weight, *parameters, dtype=target, memory_format=layout, backend="compiled")

                check(f"modulate {shape} {types} {name}", ours(), eager(), target, 2)
                moved = n * (weight.element_size() + ours().element_size()) + 8 * pairs
                if rounds:
                    rows.append(row("modulate", shape, types, name, moved, [ours, eager, copy_of(moved)], rounds))

                grad = torch.randn(shape, device="cuda", generator=generator).to(target, memory_format=layout)

                def eager_backward(weight=weight, grad=grad):
                    wide_grad = grad.float()
                    return (wide_grad * weight).sum((2, 3)), wide_grad.sum((2, 3))

                def ours_backward(weight=weight, grad=grad, gamma=gamma):
                    return backward(grad, weight, gamma, False, True, True)[1:]

                types = f"{target}, {source}".replace("torch.", "")
                for found, expected in zip(ours_backward(), eager_backward(), strict=True):
                    check(f"modulate_backward {shape} {types} {name}", found, expected, torch.float32, side * side + 2)
                moved = n * (weight.element_size() + grad.element_size()) + 8 * pairs
                if rounds:
                    methods = [ours_backward, eager_backward, copy_of(moved)]
                    rows.append(row("modulate_backward", shape, types, name, moved, methods, rounds))
    return rows


def conditions() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "rounds": str(ROUNDS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--check-only", action="store_true", help="compare values on the smaller shapes, time nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_table: torch sees no CUDA GPU here", file=sys.stderr)
        raise SystemExit(3)
    if arguments.check_only:
        cases(0, SHAPES[:2])
        print("values agree with eager PyTorch")
        return
    rows = cases(ROUNDS, SHAPES)
    facts = conditions()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print()
    print("| op | shape | types | layout | median us | p20 | p80 | GB/s | eager / ours | ours / copy of equal bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r.op} | {r.shape} | {r.types} | {r.layout} | {r.median_us:.1f} | {r.p20_us:.1f} | {r.p80_us:.1f} "
            f"| {r.gbytes_per_second:.0f} | {r.eager_us / r.median_us:.2f} | {r.median_us / r.copy_us:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"conditions": facts, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
