"""The demonstration: the bundled source adapted to the bundled 100 images, beside what it must be compared with."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib.resources import files
from pathlib import Path

import torch

from ..data.images import load_image_set
from ..errors import UsageError
from ..locate import TARGET, image_path, source_path
from ..methods.config import TrainConfig
from ..methods.presets import preset
from ..metrics.extractors import get_extractor
from ..models.catalogue import build_generator
from ..models.source import load_pair
from ..report.report import write_report
from .checkpoint import write_atomic
from .evaluation import Evaluator
from .machine import cpu_name
from .precision import resolve_autocast, resolve_device, resolve_layout
from .progress import Console, duration
from .start import start_run

SOURCE = "bundled"
STEPS, BATCH = preset("adafm")["steps"], preset("adafm")["batch"]
COMMITTED = "demo_comparison.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of the comparison: its label in the table, its method and how it differs from the demo's settings."""

    label: str
    method: str
    changes: dict
    note: str


VARIANTS = (
    Variant("AdaFM", "adafm", {}, "frozen filters modulated, source head trained"),
    Variant("gamma, beta at identity", "adafm", {"adafm_start": 10**9}, "the same run with modulation held off"),
    Variant("full fine-tuning", "transfergan", {"freeze_g": 0}, "all weights of the generator trained"),
    Variant("from scratch", "scratch", {"freeze_g": 0}, "random start, the source's sizes, its own settings"),
)


def demo_config(
    outdir: str | Path, steps: int, eval_samples: int, seed: int = 0, precision: str = "auto"
) -> TrainConfig:
    """Settings of the demo's AdaFM run."""
    values = {
        **preset("adafm"),
        "data": f"{TARGET}-train",
        "eval_data": f"{TARGET}-heldout",
        "source": (SOURCE,),
        "outdir": str(outdir),
        "steps": steps,
        "eval_samples": eval_samples,
        "seed": seed,
        "precision": precision,
    }
    return TrainConfig(**values)


def run_demo(outdir: Path, *, steps: int, eval_samples: int, seed: int = 0, compare: bool = False) -> Path:
    """Train, judge beside the unadapted source, and write the report; with ``compare`` run the baselines here too.

    Without ``compare`` the baselines' rows are the committed results of the same settings, marked as such.
    """
    if outdir.exists() and any(outdir.iterdir()):
        raise UsageError(f"--outdir {outdir} is not empty; remove it or name another folder")
    started = time.monotonic()
    console = Console()
    root = outdir / "adafm" if compare else outdir
    config = demo_config(root, steps, eval_samples, seed)
    source_row = judge_source(config, console)
    rows = [source_row]
    for variant in VARIANTS if compare else VARIANTS[:1]:
        folder = root if variant.method == "adafm" and not variant.changes else outdir / variant.label.replace(" ", "-")
        console.line(f"\n{variant.label}: {variant.note}")
        rows.append(_row(variant, run_variant(variant, config, folder), steps, seed))
    if not compare:
        rows += committed_rows()
    write_atomic(root / "comparison.json", json.dumps(rows, indent=1))
    if compare:
        write_atomic(outdir / COMMITTED, json.dumps([{**row, "committed": True} for row in rows[1:]], indent=1))
    report = write_report(root)
    console.line("\n" + table(rows))
    console.line(f"\nsamples  {max((root / 'samples').glob('step*.png'))}")
    console.line(f"report   {report}")
    console.line(f"time     {duration(time.monotonic() - started)}")
    return report


def run_variant(variant: Variant, config: TrainConfig, folder: Path) -> Path:
    """One run of the comparison at the demo's length, batch, data and evaluation."""
    changes = dict(variant.changes)
    if variant.method == "scratch":
        changes = {**preset("scratch"), "steps": config.steps, **changes}
    return start_run(variant.method, dataclasses.replace(config, outdir=str(folder), **changes))


def judge_source(config: TrainConfig, console: Console) -> dict:
    """The comparison's row of the unadapted source: the samples a user would have without any training."""
    pair = load_pair(source_path(SOURCE))
    device = resolve_device(config.device)
    generator = build_generator(pair.cfg)
    generator.load_state_dict(pair.average_state or pair.generator_state)
    autocast = resolve_autocast(config.precision, device)
    generator.to(device=device, memory_format=resolve_layout(config.layout, autocast)).eval()
    images = [
        load_image_set(image_path(name), size=pair.cfg.size, channels=pair.cfg.channels).pixels
        for name in (config.eval_data, config.data)
    ]
    extractor = get_extractor(config.extractor)
    evaluator = Evaluator(extractor, images[0], "heldout", images[1], config.eval_samples, config.seed)
    metrics = evaluator.evaluate(generator, autocast, pair.meta.get("data_scale", 1.0))
    console.line(f"unadapted source: {evaluator.summary(metrics)}")
    return {
        "label": "unadapted source",
        "steps": 0,
        "seed": config.seed,
        "metrics": metrics,
        "note": "what the shipped network draws before any training",
        "committed": False,
        "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def committed_rows() -> list[dict]:
    """Baselines measured before with the demo's default settings and shipped with the package."""
    path = files("adafm_trainer").joinpath("assets", COMMITTED)
    return [row for row in json.loads(path.read_text(encoding="utf-8")) if row["label"] != VARIANTS[0].label]


def table(rows: list[dict]) -> str:
    """The comparison as text: one line a run, KID with its interval, then the other metrics."""
    names = list(rows[0]["metrics"])
    short = {name: name.partition("[")[0] for name in names}
    lines = [
        f"{'run':26} {'steps':>6}  "
        + "  ".join(f"{short[n]:>22}" if i == 0 else f"{short[n]:>13}" for i, n in enumerate(names))
    ]
    for row in rows:
        cells = []
        for i, name in enumerate(names):
            entry = row["metrics"].get(name)
            if entry is None:
                cells.append(f"{'-':>22}" if i == 0 else f"{'-':>13}")
            elif i == 0:
                cells.append(f"{entry['value']:7.3f} [{entry['low']:.3f}, {entry['high']:.3f}]".rjust(22))
            else:
                cells.append(f"{entry['value']:13.3f}")
        mark = " *" if row["committed"] else ""
        lines.append(f"{row['label'] + mark:26} {row['steps']:6}  " + "  ".join(cells))
    lines.append(f"metrics: {', '.join(names)}")
    if any(row["committed"] for row in rows):
        lines.append("* committed result of the same settings; `adafm demo --compare` measures it on this machine")
    return "\n".join(lines)


def _row(variant: Variant, folder: Path, steps: int, seed: int) -> dict:
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    device = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
    return {
        "label": variant.label,
        "steps": steps,
        "seed": seed,
        "metrics": last["metrics"],
        "note": variant.note,
        "committed": False,
        "device": device,
    }
