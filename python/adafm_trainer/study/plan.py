"""What a study consists of: image sets, runs, and parts that are made of runs. All of it is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Digits:
    """MNIST: of each of ``digits`` the images ``first`` to ``first + count - 1``, 28 px, grey."""

    name: str
    digits: tuple[int, ...]
    count: int
    first: int = 0


@dataclass(frozen=True)
class Avatars:
    """DiceBear: ``count`` different drawings of each style from seed ``first`` on, none of them one of ``apart``."""

    name: str
    styles: tuple[str, ...]
    count: int
    first: int = 0
    apart: Avatars | None = None


@dataclass(frozen=True)
class Drawn:
    """Samples of other people's generators: ``count`` of each of ``generators``, from latents ``first`` on."""

    name: str
    generators: tuple[str, ...]
    count: int
    first: int = 0


Images = Digits | Avatars | Drawn


@dataclass(frozen=True)
class Outside:
    """A generator that another distribution brings, converted by `adafm convert --arch dcgan`."""

    name: str


@dataclass(frozen=True)
class Run:
    """One training run. ``name`` is its folder; ``sources`` are runs from scratch or outside generators."""

    name: str
    method: str
    images: Images
    settings: Mapping[str, Any]
    seed: int = 0
    heldout: Images | None = None
    sources: tuple[Run | Outside, ...] = ()
    model: Mapping[str, Any] | None = field(default=None)
    """Description of the networks, for a run without a source."""


@dataclass(frozen=True)
class Part:
    """Runs that answer one question."""

    name: str
    title: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Scale:
    """How large a study is. Steps count optimizer steps."""

    seeds: tuple[int, ...]
    digits: int
    """Images of each digit to train on; the classifier takes the same ones."""
    digits_apart: int
    """Images of each digit after those, for judging."""
    drawings: int
    """Drawings of each source style."""
    apart: int
    """Drawings or samples withheld for judging."""
    targets: tuple[int, ...]
    """Numbers of target images of the comparison of methods."""
    transfer_images: int
    outside_images: int
    width_digits: int
    width_faces: int
    steps_digits: int
    """Of a source of digits."""
    steps_wgan: int
    steps_gpgan: int
    steps_small: int
    """Of the sources of the check that stage 1 changes nothing."""
    steps_mining: int
    steps_two: int
    """Of mining two sources of digits."""
    steps_transfer: int
    steps_outside: int
    steps_methods: int
    evaluations: int
    """Of a run whose course is drawn."""
    samples: int
    """Generated images of an evaluation."""
    classified: int
    """Generated images that the classifier judges."""
    classifier_steps: int
    extractor: str
    batch: int


QUICK = Scale(
    seeds=(0, 1, 2),
    digits=6,
    digits_apart=3,
    drawings=4,
    apart=12,
    targets=(5, 8),
    transfer_images=8,
    outside_images=8,
    width_digits=4,
    width_faces=16,
    steps_digits=3,
    steps_wgan=2,
    steps_gpgan=2,
    steps_small=2,
    steps_mining=4,
    steps_two=4,
    steps_transfer=2,
    steps_outside=2,
    steps_methods=2,
    evaluations=2,
    samples=12,
    classified=20,
    classifier_steps=10,
    extractor="random-v1",
    batch=4,
)
FULL = Scale(
    seeds=(0, 1, 2),
    digits=400,
    digits_apart=100,
    drawings=1000,
    apart=500,
    targets=(25, 100, 1000),
    transfer_images=1000,
    outside_images=1000,
    width_digits=16,
    width_faces=32,
    steps_digits=4000,
    steps_wgan=3000,
    steps_gpgan=4000,
    steps_small=100,
    steps_mining=2500,
    steps_two=1000,
    steps_transfer=600,
    steps_outside=600,
    steps_methods=800,
    evaluations=5,
    samples=500,
    classified=1000,
    classifier_steps=1500,
    extractor="efflite0",
    batch=16,
)
