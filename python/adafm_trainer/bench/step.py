"""The demo's generator and discriminator steps: bf16 channels-last against float32 contiguous, in one process.

Method: both configurations are built from the same weights; rounds alternate between them in shuffled order, and each
round's times are paired. Reported are medians, the median of the paired ratios and its 95 % bootstrap interval. The
control (``bf16`` against a second ``bf16``) says what a ratio of two equal things looks like in this run.
"""

from __future__ import annotations

import platform
import random
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from ..locate import source_path
from ..models.source import load_pair
from ..trainer.assemble import Assembly, assemble
from ..trainer.demo import BATCH, SOURCE, demo_config
from ..trainer.precision import has_bf16
from ..trainer.rundir import cpu_name
from ..trainer.sampling import draw_latents
from .machine import commit

PHASES = ("G step", "D step", "D step with R1")
CONFIGURATIONS = {"float32 contiguous": "fp32", "bf16 channels-last": "bf16", "bf16 channels-last (control)": "bf16"}


def build(precision: str, batch: int) -> Assembly:
    """The demo's AdaFM pair, assembled as `adafm demo` assembles it."""
    from ..methods.adafm import AdaFM

    config = replace(demo_config("unused", steps=1, eval_samples=1, precision=precision), batch=batch)
    method, source = AdaFM(), load_pair(source_path(SOURCE))
    networks = method.structure(method.target_model(source.cfg, config), config)
    method.initialise(networks, source, config, lambda _: None, None)
    return assemble(method, networks, config)


class Steps:
    """One configuration, ready to run any phase on the same fixed inputs."""

    def __init__(self, precision: str, batch: int) -> None:
        self.assembly = build(precision, batch)
        generator = self.assembly.networks.generator
        side, channels = self.assembly.networks.model.size, self.assembly.networks.model.channels
        self.z = draw_latents(generator, 0, "bench", 0, range(batch)).to(self.assembly.device)
        noise = torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.real = noise.to(self.assembly.device, memory_format=self.assembly.layout)
        self.images: Tensor = self.assembly.step.generator(self.z).images

    def run(self, phase: str) -> None:
        step = self.assembly.step
        if phase == "G step":
            step.generator(self.z)
            step.average.update()
            return
        # The penalty is taken when the count of discriminator steps is a multiple of its interval.
        step.d_steps = 0 if phase == "D step with R1" else 1
        step.discriminator(self.real, self.images)


def measure_steps(rounds: int = 15, batch: int = BATCH, warmup: int = 2) -> dict:
    """Times of every phase in every configuration, and their paired ratios, as a JSON-ready dictionary."""
    steps = {name: Steps(precision, batch) for name, precision in CONFIGURATIONS.items()}
    interval = next(iter(steps.values())).assembly.step.config.reg_interval
    times: dict[tuple[str, str], list[float]] = {(c, p): [] for c in steps for p in PHASES}
    order = random.Random(0)
    for round_number in range(warmup + rounds):
        for phase in PHASES:
            names = list(steps)
            order.shuffle(names)
            for name in names:
                start = time.perf_counter()
                steps[name].run(phase)
                if steps[name].assembly.device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number >= warmup:
                    times[name, phase].append(time.perf_counter() - start)
    share = 1.0 / interval
    for name in steps:
        plain, penalised = times[name, "D step"], times[name, "D step with R1"]
        average = [(1 - share) * a + share * b for a, b in zip(plain, penalised, strict=True)]
        times[name, f"G + D (R1 every {interval})"] = [
            g + d for g, d in zip(times[name, "G step"], average, strict=True)
        ]
    baseline, fast, control = CONFIGURATIONS
    rows = []
    for phase in [*PHASES, f"G + D (R1 every {interval})"]:
        row = {"phase": phase}
        for name in steps:
            row[name] = _quantiles(times[name, phase])
        row["speedup"] = _ratio(times[baseline, phase], times[fast, phase])
        row["control"] = _ratio(times[control, phase], times[fast, phase])
        rows.append(row)
    return {
        "name": "step",
        "command": " ".join(["adafm", *sys.argv[1:]]),
        "batch": batch,
        "rounds": rounds,
        "device": cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "bf16_hardware": has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "rows": rows,
    }


def table(result: dict) -> str:
    """Markdown table of ``measure_steps``: medians in milliseconds, the ratio with its interval, the control."""
    baseline, fast, _ = CONFIGURATIONS
    lines = [f"| | {baseline}, ms | {fast}, ms | times faster (95 %) | control |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        speed, control = row["speedup"], row["control"]
        lines.append(
            f"| {row['phase']} | {row[baseline]['median_ms']:.1f} | {row[fast]['median_ms']:.1f} | "
            f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) | {control['median']:.2f} |"
        )
    lines.append("")
    lines.append(
        f"{result['device']}, {result['threads']} threads, batch {result['batch']}, "
        f"torch {result['versions']['torch']}, commit {result['commit']}, {result['rounds']} paired rounds; "
        f"`{result['command']}`"
    )
    return "\n".join(lines)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    pick = lambda q: 1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"median_ms": 1e3 * statistics.median(ordered), "p20_ms": pick(0.2), "p80_ms": pick(0.8)}


def _ratio(numerator: list[float], denominator: list[float], draws: int = 2000) -> dict[str, float]:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return {
        "median": statistics.median(ratios),
        "low": medians[int(0.025 * draws)],
        "high": medians[int(0.975 * draws)],
    }
