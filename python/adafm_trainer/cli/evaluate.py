"""`adafm eval RUN --data DIR`: judge a run's generator again, with other images or another feature network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..data.images import load_image_set
from ..errors import DataError, UsageError
from ..locate import image_path
from ..metrics.authors import BATCH, NAME, AuthorsProtocol, draw_reals
from ..metrics.evaluate import metric_name
from ..metrics.extractors import get_extractor
from ..metrics.iw import LEAST, independent_wasserstein
from ..models.catalogue import build_discriminator
from ..trainer.evaluation import Evaluator
from ..trainer.load import LoadedRun, load_run
from ..trainer.sampling import generate
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
    fid_authors: Path | None = None
    """torchvision's Inception weights: adds fid_authors and is_authors, the protocol of the AdaFM authors' code."""
    iw: int = 0
    """Steps of training a fresh critic of the run's discriminator: adds iw_distance and IW; 0 leaves them out."""
    json: Path | None = None
    """File for the metrics with their intervals."""
    device: str = "auto"
    """Device to draw on."""


def main(argv: list[str]) -> int:
    args = parse(EvalArgs, "adafm eval", argv)
    if args.samples < 1 or args.iw < 0:
        raise UsageError(f"--samples is {args.samples} and --iw {args.iw}; they must be at least 1 and 0")
    loaded = load_run(args.run, args.device)
    config = loaded.config

    def load(path: str):
        return load_image_set(
            image_path(path), size=loaded.model.size, channels=loaded.model.channels, fit=config.fit, alpha=config.alpha
        )

    extractor = get_extractor(args.extractor)
    # Read before anything is drawn: a missing file must not cost the time of an evaluation.
    authors = AuthorsProtocol(args.fid_authors, _device(loaded)) if args.fid_authors is not None else None
    training, reals = load(config.data), load(args.data)
    trained_on = {entry["sha256"] for entry in training.manifest["images"]}
    seen = sum(entry["sha256"] in trained_on for entry in reals.manifest["images"])
    split = "heldout" if seen == 0 else "train"
    if seen:
        print(f"{seen} of {len(reals)} images of {args.data} were trained on: the metrics are named `train`")
    if extractor.class_weights is None:
        print(
            f"is left out: the Inception score needs class probabilities, and {extractor.name} gives none; "
            "give --extractor inception:FILE with weights that hold the classifier"
        )
    if authors is not None and args.samples < BATCH:
        raise UsageError(f"--fid-authors takes batches of {BATCH}, got --samples {args.samples}")
    if args.iw and min(args.samples, len(reals)) < LEAST:
        raise DataError(
            f"--iw trains on half of each set and measures on the other: it needs {LEAST} images, got {len(reals)} in "
            f"{args.data} and --samples {args.samples}"
        )
    evaluator = Evaluator(extractor, reals.pixels, split, training.pixels, args.samples, config.seed)
    metrics = evaluator.evaluate(loaded.generator, loaded.autocast, config.data_scale)
    if authors is not None:
        metrics |= _authors(authors, loaded, reals.pixels, args.samples, split)
    if args.iw:
        metrics |= _independent_critic(loaded, reals.pixels, args.samples, args.iw, split)
    print(f"step {loaded.step}, {args.samples} samples against {len(reals)} images ({split}), {extractor.name}")
    for name, entry in metrics.items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if entry.get("low") is not None else ""
        print(f"  {name:44} {entry['value']:.4f}{interval}")
    if args.json is not None:
        args.json.write_text(json.dumps({"step": loaded.step, "metrics": metrics}, indent=1), encoding="utf-8")
    return 0


def _authors(
    authors: AuthorsProtocol, loaded: LoadedRun, reals: torch.Tensor, samples: int, split: str
) -> dict[str, dict]:
    config = loaded.config
    images = generate(loaded.generator, config.seed, "eval", range(samples), autocast=loaded.autocast)
    drawn = draw_reals(reals, samples, config.seed, flip=config.aug == "flip")
    values = authors.evaluate(images / config.data_scale, drawn)
    return {metric_name(name, NAME, value.n_fake, split): value.to_json() for name, value in values.items()}


def _independent_critic(
    loaded: LoadedRun, reals: torch.Tensor, samples: int, steps: int, split: str
) -> dict[str, dict]:
    """``iw_distance`` and ``IW`` by a fresh discriminator of the run, on samples that no other metric has seen."""
    config = loaded.config
    images = generate(loaded.generator, config.seed, "iw", range(samples), autocast=loaded.autocast)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        critic = build_discriminator(loaded.model)
    values = independent_wasserstein(
        critic,
        reals.float() / 127.5 - 1.0,
        images / config.data_scale,
        steps=steps,
        seed=config.seed,
        device=_device(loaded),
    )
    return {metric_name(name, f"critic{steps}", v.n_fake, split): v.to_json() for name, v in values.items()}


def _device(loaded: LoadedRun) -> torch.device:
    return next(loaded.generator.parameters()).device
