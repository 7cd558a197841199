"""`adafm eval RUN --data DIR`: judge a run's generator again, with other images or another feature network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..data.images import load_image_set
from ..locate import image_path
from ..metrics.extractors import get_extractor
from ..trainer.evaluation import Evaluator
from ..trainer.load import load_run
from .flags import parse


@dataclass(frozen=True)
class EvalArgs:
    """Compare samples of a run's averaged generator with held-out images; prints a table, writes JSON if asked."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data: str
    """Images to compare with, not used in training: a folder or a zip."""
    samples: int = 500
    """Generated images."""
    extractor: str = "auto"
    """Feature network: auto, efflite0, random-v1, or inception:FILE."""
    json: Path | None = None
    """File for the metrics with their intervals."""
    device: str = "auto"
    """Device to draw on."""


def main(argv: list[str]) -> int:
    args = parse(EvalArgs, "adafm eval", argv)
    loaded = load_run(args.run, args.device)
    config = loaded.config

    def load(path: str):
        return load_image_set(
            image_path(path), size=loaded.model.size, channels=loaded.model.channels, fit=config.fit, alpha=config.alpha
        )

    extractor = get_extractor(args.extractor)
    training, reals = load(config.data), load(args.data)
    trained_on = {entry["sha256"] for entry in training.manifest["images"]}
    seen = sum(entry["sha256"] in trained_on for entry in reals.manifest["images"])
    split = "heldout" if seen == 0 else "train"
    if seen:
        print(f"{seen} of {len(reals)} images of {args.data} were trained on: the metrics are named `train`")
    evaluator = Evaluator(extractor, reals.pixels, split, training.pixels, args.samples, config.seed)
    metrics = evaluator.evaluate(loaded.generator, loaded.autocast, config.data_scale)
    print(f"step {loaded.step}, {args.samples} samples against {len(reals)} images ({split}), {extractor.name}")
    for name, entry in metrics.items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if entry.get("low") is not None else ""
        print(f"  {name:36} {entry['value']:.4f}{interval}")
    if args.json is not None:
        args.json.write_text(json.dumps({"step": loaded.step, "metrics": metrics}, indent=1), encoding="utf-8")
    return 0
