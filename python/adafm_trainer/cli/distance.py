"""`adafm distance A B`: how far two image sets are apart, to choose a source for a target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.images import ImageSet, load_image_set
from ..errors import DataError, UsageError
from ..locate import image_path
from ..metrics.domains import set_distances
from ..metrics.extractors import get_extractor
from .flags import parse

LEAST = 2


@dataclass(frozen=True)
class DistanceArgs:
    """Compare two image sets: Frechet distance, KID with its interval, and how much of each the other covers."""

    source: Annotated[str, tyro.conf.Positional]
    """Images of the source domain: a folder, a zip or the name of a bundled set."""
    target: Annotated[str, tyro.conf.Positional]
    """Images of the target domain."""
    extractor: str = "auto"
    """Feature network: auto, efflite0, random-v1, or inception:FILE."""
    size: int = 64
    """Side that the images of both sets are brought to first, as the networks would see them."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 to compare in grey."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What happens to images that are not square."""
    json: Path | None = None
    """File for the distances with their intervals and what they were measured with."""


def main(argv: list[str]) -> int:
    args = parse(DistanceArgs, "adafm distance", argv)
    if args.size < 1:
        raise UsageError(f"--size is {args.size}; it must be at least 1")
    extractor = get_extractor(args.extractor)
    source, target = (_load(path, args) for path in (args.source, args.target))
    shared = len({i["sha256"] for i in source.manifest["images"]} & {i["sha256"] for i in target.manifest["images"]})
    if shared:
        print(f"{shared} files are in both sets: the distance is smaller than that of the domains")
    values = set_distances(extractor(source.pixels), extractor(target.pixels), extractor)
    print(f"source {args.source}: {len(source)} images; target {args.target}: {len(target)} images; {extractor.name}")
    for name, value in values.items():
        interval = f"  [{value.low:.4f}, {value.high:.4f}]" if value.low is not None else ""
        note = f"  ({value.note})" if value.note else ""
        print(f"  {name:36} {value.value:.4f}{interval}{note}")
    if args.json is not None:
        record = {
            "source": _record(args.source, source),
            "target": _record(args.target, target),
            "extractor": {"name": extractor.name, "protocol": extractor.protocol, "sha256": extractor.hash},
            "metrics": {name: value.to_json() for name, value in values.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _load(path: str, args: DistanceArgs) -> ImageSet:
    images = load_image_set(image_path(path), size=args.size, channels=args.channels, fit=args.fit)
    if len(images) < LEAST:
        raise DataError(f"{path} holds {len(images)} image; a distance needs at least {LEAST} in each set: add images")
    return images


def _record(path: str, images: ImageSet) -> dict:
    return {"path": path, "images": len(images), "sha256": images.manifest["sha256"]}
