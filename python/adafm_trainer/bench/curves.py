"""Training curves on this machine: the demo in bfloat16 with a modulation plan, and in float32 with plain autograd.

    adafm bench curves --json FILE [--outdir FOLDER]

Every run is an ordinary one in a folder of its own: complete ones are kept, interrupted ones continued. KID is taken
against images withheld from training. One seed's KID moves from run to run, so the two ways are compared over seeds:
the mean difference with its 95 % interval (Student's t over the seeds' paired differences).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from ..errors import AdafmError, UsageError
from ..methods.config import TrainConfig
from ..methods.config_file import read_config
from ..trainer.demo import demo_config
from ..trainer.machine import facts
from ..trainer.rundir import RunDirectory
from ..trainer.start import resume_run, start_run

FAST, PLAIN = "bf16, plan", "fp32, autograd"
WAYS = {
    FAST: {"precision": "bf16", "modulation": "plan"},
    PLAIN: {"precision": "fp32", "modulation": "autograd"},
}
# Two-sided 95 % quantile of Student's t by degrees of freedom; beyond the last the normal one is near enough.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run_curves(
    outdir: Path, steps: int = 1000, every: int = 250, seeds: tuple[int, ...] = (0, 1, 2), samples: int = 1000
) -> dict:
    """Run what is missing under ``outdir``, and every run's curve and the comparison as a JSON-ready dictionary."""
    runs = []
    for seed in seeds:
        for way, changes in WAYS.items():
            folder = outdir / f"{changes['precision']}-{changes['modulation']}-{seed}"
            config = demo_config(folder, steps, samples, seed=seed)
            _complete(dataclasses.replace(config, eval_every=every, **changes))
            runs.append({"way": way, "seed": seed, **curve(folder)})
    return {"name": "curves", "device": "cpu", **facts("cpu"), "steps": steps, "runs": runs, **compare(runs)}


def curve(folder: Path) -> dict:
    """KID by step of a run, with the interval of each value and the metric's name."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metric = next(name for name in rows[-1]["metrics"] if name.startswith("kid["))
    entries = [row["metrics"][metric] for row in rows]
    return {
        "metric": metric,
        "at": [row["step"] for row in rows],
        **{key: [entry[key] for entry in entries] for key in ("value", "low", "high")},
    }


def compare(runs: list[dict]) -> dict:
    """Means over the seeds at the last step, and the mean paired difference of the two ways with its interval."""
    last = {way: {run["seed"]: run["value"][-1] for run in runs if run["way"] == way} for way in WAYS}
    if len(last[FAST]) < 2 or last[FAST].keys() != last[PLAIN].keys():
        raise ValueError(f"seeds {list(last[FAST])} and {list(last[PLAIN])}: both ways need the same 2 or more")
    pairs = [(last[FAST][seed], last[PLAIN][seed]) for seed in last[FAST]]
    differences = [fast - plain for fast, plain in pairs]
    mean, count = statistics.fmean(differences), len(differences)
    half = _STUDENT.get(count - 1, 1.96) * statistics.stdev(differences) / count**0.5
    return {
        "means": {way: statistics.fmean(values.values()) for way, values in last.items()},
        "difference": {"mean": mean, "low": mean - half, "high": mean + half},
        "same": mean - half <= 0 <= mean + half,
    }


def table(result: dict) -> str:
    """Markdown: KID at each evaluation of every run, the comparison, and the conditions."""
    at = result["runs"][0]["at"]
    head = ["way", "seed", *(f"step {step}" for step in at), "95 % interval at the end"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in sorted(result["runs"], key=lambda run: (list(WAYS).index(run["way"]), run["seed"])):
        values = [f"{value:.3f}" for value in run["value"]]
        lines.append(
            f"| {run['way']} | {run['seed']} | {' | '.join(values)} | {run['low'][-1]:.3f} to {run['high'][-1]:.3f} |"
        )
    found, means = result["difference"], result["means"]
    verdict = "which includes 0" if result["same"] else "**which excludes 0**"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines += [
        "",
        f"{result['runs'][0]['metric']}: mean {means[FAST]:.3f} ({FAST}) and {means[PLAIN]:.3f} ({PLAIN}); difference "
        f"{found['mean']:+.3f}, 95 % interval over the seeds {found['low']:+.3f} to {found['high']:+.3f}, {verdict}. "
        f"{result['cpu']}; {versions}; commit {result['commit']}.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0: every run is there and compared; else the exit code of the run that failed."""
    flags = argparse.ArgumentParser(prog="adafm bench curves", description=__doc__.splitlines()[0])
    flags.add_argument("--json", type=Path, help="file for every number with the machine, versions and commit")
    flags.add_argument("--outdir", type=Path, default=Path("runs/curves"), help="folder of the runs")
    flags.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run")
    flags.add_argument("--every", type=int, default=250, help="steps between evaluations")
    flags.add_argument("--seeds", default="0,1,2", help="seeds, each run both ways")
    flags.add_argument("--samples", type=int, default=1000, help="generated images of an evaluation")
    given = flags.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in given.seeds.split(",")))
    except ValueError:
        flags.error(f"--seeds {given.seeds}: expected whole numbers with commas between them")
    if len(seeds) < 2:
        flags.error(f"--seeds {given.seeds}: an interval over seeds needs at least 2")
    try:
        result = run_curves(given.outdir, given.steps, given.every, seeds, given.samples)
    except AdafmError as error:
        print(f"adafm bench curves: {error}", file=sys.stderr)
        return error.exit_code
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def _complete(config: TrainConfig) -> None:
    """Start the run, or continue it, unless it is complete."""
    run = RunDirectory(config.outdir)
    if not (run.checkpoints / "last.json").is_file():
        start_run("adafm", config)
        return
    _, before, _ = read_config(run.config)
    wanted = {name: getattr(config, name) for name in ("steps", "seed", "precision", "modulation", "eval_samples")}
    for name, value in wanted.items():
        if getattr(before, name) != value:
            raise UsageError(
                f"{run.root} is a run with {name} {getattr(before, name)}, not {value}; give another folder"
            )
    rows = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    if not rows or json.loads(rows[-1])["step"] != config.steps:
        resume_run(run.root)


if __name__ == "__main__":
    raise SystemExit(main())
