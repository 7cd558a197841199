"""The parts of a study: which runs answer which question."""

from __future__ import annotations

from ..data.dicebear import SOURCE_STYLES
from ..data.packaged import GENERATORS
from . import recipes
from .plan import Avatars, Digits, Drawn, Outside, Part, Run, Scale

# The digits each source of digits is trained on: all, and two families that have little in common.
SOURCE_DIGITS = {"all": tuple(range(10)), "round": (0, 3, 6, 8), "straight": (1, 4, 7, 9)}
ON_MANIFOLD = ((7,), (0, 1))
# One digit that only the source "straight" knows, and two of which each source knows one.
RELEVANT, BOTH_RELEVANT = (7,), (0, 7)
TARGET_STYLE = "open-peeps"
# Seeds of drawings that are withheld begin here; latents of samples that are withheld too.
APART = 100_000
TRANSFERS = ("none", "generator", "discriminator", "both")
METHODS = ("scratch", "transfergan", "adafm", "gan-memory", "minegan")


def parts(scale: Scale) -> tuple[Part, ...]:
    """Every part, in the order they run in; the first are the sources, which the others start from."""
    return (
        Part("source", "Sources", tuple(_sources(scale).values())),
        Part("frozen", "Stage 1 changes nothing of G", _frozen(scale)),
        Part("on-manifold", "Mining a target that the source covers", _on_manifold(scale)),
        Part("two-sources", "Mining two sources", _two_sources(scale)),
        Part("off-manifold", "Mining a target that the source lacks", _off_manifold(scale)),
        Part("transfer", "Which network is transferred", _transfer(scale)),
        Part("methods", "Methods by number of target images", _methods(scale)),
        Part("outside", "Generators trained by others", _outside(scale)),
    )


def digits(scale: Scale, chosen: tuple[int, ...]) -> Digits:
    """Training images of the digits ``chosen``."""
    return Digits(f"digits-{_joined(chosen)}", chosen, scale.digits)


def digits_apart(scale: Scale, chosen: tuple[int, ...]) -> Digits:
    """Other images of the digits ``chosen``."""
    return Digits(f"digits-{_joined(chosen)}-apart", chosen, scale.digits_apart, scale.digits)


def _drawings(scale: Scale) -> Avatars:
    return Avatars("drawings", SOURCE_STYLES, scale.drawings)


def _target(scale: Scale, count: int) -> Avatars:
    return Avatars(f"{TARGET_STYLE}-{count}", (TARGET_STYLE,), count)


def _target_apart(scale: Scale) -> Avatars:
    largest = max(*scale.targets, scale.transfer_images)
    return Avatars(f"{TARGET_STYLE}-apart", (TARGET_STYLE,), scale.apart, APART, _target(scale, largest))


def _sources(scale: Scale) -> dict[str, Run]:
    """Pairs from random weights, by name."""
    faces, drawings = recipes.faces(scale), _drawings(scale)
    made = {
        f"digits-{name}": Run(
            f"source-digits-{name}",
            "scratch",
            digits(scale, chosen),
            {**recipes.digits_from_scratch(scale), "steps": scale.steps_digits},
            model=recipes.digits_model(scale),
        )
        for name, chosen in SOURCE_DIGITS.items()
    }
    for name, settings, steps in (
        ("wgan-resnet", recipes.wgan(scale), scale.steps_wgan),
        ("gpgan", recipes.gpgan_from_scratch(scale), scale.steps_gpgan),
        ("dcgan", recipes.small(scale), scale.steps_small),
        ("biggan", {**recipes.small(scale), "labels": "folders"}, scale.steps_small),
    ):
        settings = {**settings, "steps": steps}
        made[name] = Run(f"source-{name}", "scratch", drawings, settings, model=faces[name])
    return made


def _frozen(scale: Scale) -> tuple[Run, ...]:
    """Stage 1 of every family, of which batch and spectral normalisation have buffers."""
    sources = _sources(scale)
    mining = {**recipes.small(scale), "stage2": "none", "steps": scale.steps_small}
    return tuple(
        Run(f"frozen-{name}", "minegan", _target(scale, scale.targets[0]), mining, sources=(sources[name],))
        for name in ("gpgan", "wgan-resnet", "dcgan", "biggan")
    )


def _on_manifold(scale: Scale) -> tuple[Run, ...]:
    return tuple(
        Run(
            f"on-manifold-{_joined(target)}-seed{seed}",
            "minegan",
            digits(scale, target),
            {**recipes.mining(scale), "stage2": "none"},
            seed,
            digits_apart(scale, target),
            (_sources(scale)["digits-all"],),
        )
        for target in ON_MANIFOLD
        for seed in scale.seeds
    )


def _two_sources(scale: Scale) -> tuple[Run, ...]:
    # The critic is that of the first source, so the relevant one stands second.
    sources = tuple(_sources(scale)[f"digits-{name}"] for name in ("round", "straight"))
    return tuple(
        Run(
            f"two-sources-{_joined(target)}-seed{seed}",
            "minegan",
            digits(scale, target),
            recipes.two_sources(scale),
            seed,
            digits_apart(scale, target),
            sources,
        )
        for target in (RELEVANT, BOTH_RELEVANT)
        for seed in scale.seeds
    )


def _off_manifold(scale: Scale) -> tuple[Run, ...]:
    """Stage 1 alone and both stages, of one length; the source has not seen the target's digit."""
    stages = {
        "stage1": {"stage2": "none"},
        "stage2": {"stage2": "all", "stage2_start": scale.steps_mining // 2},
    }
    return tuple(
        Run(
            f"off-manifold-{name}-seed{seed}",
            "minegan",
            digits(scale, RELEVANT),
            {**recipes.mining(scale), **settings},
            seed,
            digits_apart(scale, RELEVANT),
            (_sources(scale)["digits-round"],),
        )
        for name, settings in stages.items()
        for seed in scale.seeds
    )


def _transfer(scale: Scale) -> tuple[Run, ...]:
    every = max(1, scale.steps_transfer // scale.evaluations)
    settings = {**recipes.wgan(scale), "steps": scale.steps_transfer, "eval_every": every}
    return tuple(
        Run(
            f"transfer-{which}-seed{seed}",
            "transfergan",
            _target(scale, scale.transfer_images),
            {**settings, "transfer": which},
            seed,
            _target_apart(scale),
            (_sources(scale)["wgan-resnet"],),
        )
        for which in TRANSFERS
        for seed in scale.seeds
    )


def _methods(scale: Scale) -> tuple[Run, ...]:
    return tuple(
        Run(
            f"methods-{method}-{count}-seed{seed}",
            method,
            _target(scale, count),
            recipes.on_gpgan(method, scale),
            seed,
            _target_apart(scale),
            (_sources(scale)["gpgan"],),
        )
        for count in scale.targets
        for method in METHODS
        for seed in scale.seeds
    )


def _outside(scale: Scale) -> tuple[Run, ...]:
    names = tuple(GENERATORS)
    both, share = len(names), scale.outside_images // len(names)
    targets = [(name, (name,), scale.outside_images) for name in names] + [("mixture", names, share)]
    return tuple(
        Run(
            f"outside-{name}-seed{seed}",
            "minegan",
            Drawn(f"drawn-{name}", of, count),
            recipes.outside(scale),
            seed,
            Drawn(f"drawn-{name}-apart", of, scale.apart // (both if len(of) == both else 1), APART),
            tuple(Outside(each) for each in names),
        )
        for name, of, count in targets
        for seed in scale.seeds
    )


def _joined(chosen: tuple[int, ...]) -> str:
    return "".join(map(str, chosen))
