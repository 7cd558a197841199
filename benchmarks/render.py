"""Turn the JSON of `adafm bench` into the Markdown that README shows, and into its chart.

    python benchmarks/render.py FILE.json [--chart FILE.svg] [--details]

The headline and the conditions; every case of an op benchmark with --details. Beside the benchmark of a CPU lies that
of a GPU in gpu_op.json or gpu_step.json, where one was had.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from adafm_trainer.bench import curves, op_chart, op_table, step_chart, step_table

GPU_RESULT, GPU_STEP = "gpu_op.json", "gpu_step.json"


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser(prog="benchmarks/render.py", description=__doc__.splitlines()[0])
    flags.add_argument("result", type=Path)
    flags.add_argument("--chart", type=Path, help="write the benchmark's chart to this SVG file")
    flags.add_argument("--details", action="store_true", help="every case of an op benchmark too")
    given = flags.parse_args(arguments)
    result = _read(given.result)
    if result["name"] == "curves":
        if given.chart is not None:
            flags.error("--chart: training curves are shown as a table")
        print(curves.table(result))
        return 0
    if result["name"] == "step":
        print(step_text(result, given.result.parent / GPU_STEP))
        draw = step_chart.chart
    else:
        print(op_text(result, given.result.parent / GPU_RESULT, given.details))
        draw = op_chart.chart
    if given.chart is not None:
        given.chart.write_text(draw(result), encoding="utf-8")
    return 0


def step_text(result: dict, gpu: Path) -> str:
    """The tables of a step benchmark; for that of a CPU also those of the GPU's result, or that there is none."""
    if result["device"] == "cuda":
        return step_table.table(result)
    on_gpu = step_table.table(_read(gpu)) if gpu.is_file() else f"| NVIDIA GPU |\n|---|\n| {op_table.NOT_YET} |"
    return f"{step_table.table(result)}\n\n{on_gpu}"


def op_text(result: dict, gpu: Path, details: bool = False) -> str:
    """The tables of an op benchmark; for that of a CPU also those of the GPU's result, or that there is none."""
    form = op_table.table if details else op_table.summary
    if result["device"] == "cuda":
        return form(result)
    on_gpu = form(_read(gpu)) if gpu.is_file() else f"| NVIDIA GPU |\n|---|\n| {op_table.NOT_YET} |"
    return f"{form(result)}\n\n{on_gpu}"


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
