"""Turn the JSON of `adafm bench` into the Markdown that README shows, and into its chart.

    python benchmarks/render.py FILE.json [--chart FILE.svg] [--details]

The headline and the conditions; every case with --details. Beside the op benchmark of a CPU lies that of a GPU in
gpu_op.json, where one was had.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from adafm_trainer.bench import op_table
from adafm_trainer.bench.op_chart import chart
from adafm_trainer.bench.step import table as step_table

GPU_RESULT = "gpu_op.json"


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser(prog="benchmarks/render.py", description=__doc__.splitlines()[0])
    flags.add_argument("result", type=Path)
    flags.add_argument("--chart", type=Path, help="write the chart of an op benchmark to this SVG file")
    flags.add_argument("--details", action="store_true", help="every case of an op benchmark too")
    given = flags.parse_args(arguments)
    result = _read(given.result)
    if result["name"] == "step":
        print(step_table(result))
        return 0
    print(op_text(result, given.result.parent / GPU_RESULT, given.details))
    if given.chart is not None:
        given.chart.write_text(chart(result), encoding="utf-8")
    return 0


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
