"""Every method on every family it is for: a run, its exact resume, and what of it may change."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.cli.train import parse_config
from adafm_trainer.errors import SourceError, UsageError
from adafm_trainer.methods.config import TrainConfig
from adafm_trainer.methods.presets import preset
from adafm_trainer.models import biggan_layers, wgan_resnet
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.catalogue import build_generator
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.dcgan import DCGANConfig
from adafm_trainer.models.mnist import MnistConfig
from adafm_trainer.models.source import load_pair
from adafm_trainer.models.wgan_config import WganResNetConfig
from adafm_trainer.trainer.checkpoint import load_checkpoint
from adafm_trainer.trainer.load import load_run
from adafm_trainer.trainer.sampling import generate
from adafm_trainer.trainer.start import resume_run, start_run
from safetensors.torch import load_file
from tiny import MODEL, digest, image_folder, settings, source_folder
from torch import nn

BIGGAN = BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=(16,))
FAMILIES = {
    "gpgan": MODEL,
    "wgan-resnet": WganResNetConfig(size=16, dim=2, z_dim=6),
    "biggan": BIGGAN,
    "mnist": MnistConfig(channels=1, dim=2, z_dim=6),
}
CRITICS = {"critic_steps": 2, "order": "discriminator-first", "r1_interval": 1, "beta2": 0.9}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    image_folder(folder / "images", 10)
    for k in range(3):
        image_folder(folder / "classes" / f"c{k}", 4, seed=k)
    for name, model in FAMILIES.items():
        source_folder(folder / name, model)
    return folder


def run(world: Path, name: str, method: str, **changes) -> Path:
    changes = {"steps": 4, "snap": 2, **changes}
    return start_run(method, settings(world, name, **changes))


def tensors(folder: Path, step: int | None = None) -> dict:
    return load_checkpoint(folder / "checkpoints")[1]


def rows(folder: Path) -> list[dict]:
    return [
        row for line in (folder / "stats.jsonl").read_text().splitlines() if "event" not in (row := json.loads(line))
    ]


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("wgan-resnet", "transfergan", CRITICS),
        ("wgan-resnet", "adafm", {"freeze_g": 2, **CRITICS}),
        ("wgan-resnet", "minegan", {"stage2_start": 2, **CRITICS}),
        ("biggan", "minegan", {"stage2_start": 2, "loss": "hinge", "r1_gamma": 0.0}),
        ("biggan", "adafm", {"freeze_g": 3, "loss": "hinge"}),
        ("mnist", "minegan", {"stage2_start": 2, "miner_dim": 3, "miner_init": "glorot", **CRITICS}),
        ("gpgan", "minegan", {"stage2_start": 2, "stage2": "adafm", "freeze_g": 2}),
        ("gpgan", "freezed", {"freeze_d": 2, "aug": "diffaug"}),
        ("gpgan", "bsa", {"freeze_d": 1}),
        ("biggan", "bsa", {"loss": "hinge"}),
        ("gpgan", "transfergan", {"aug": "ada", "reg": "l2sp", "reg_weight": 0.1}),
        ("gpgan", "adafm", {"freeze_g": 2, "reg": "ewc", "reg_weight": 10.0, "critic_steps": 2}),
        ("gpgan", "scratch", {"order": "discriminator-first", "adam_epsilon": "tensorflow"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(world: Path, tmp_path: Path, family: str, method: str, changes) -> None:
    changes = {"source": str(world / family), **changes}
    whole = run(world, str(tmp_path / "whole"), method, **changes)
    parts = run(world, str(tmp_path / "parts"), method, **{**changes, "steps": 2})
    resume_run(parts, steps=4)
    assert digest(whole) == digest(parts)
    assert rows(whole)[-1]["images"] == 4 * 4 * changes.get("critic_steps", 1)
    loaded = load_run(whole, "cpu")
    images = generate(loaded.generator, 0, "sample", range(3), autocast=loaded.autocast)
    assert images.shape[0] == 3 and images.isfinite().all() and images.abs().max() <= 1


@pytest.mark.parametrize("family", [*FAMILIES, "dcgan"])
def test_bsa_trains_a_scale_and_a_shift_of_every_channel(world: Path, tmp_path: Path, family: str) -> None:
    """Filters and linear layers keep their bits; what is trained is of the channels' number, or makes that."""
    if family == "dcgan":
        source_folder(tmp_path / "dcgan", DCGANConfig(size=16, channels=3, ngf=4, ndf=4, z_dim=6))
    source = tmp_path / "dcgan" if family == "dcgan" else world / family
    folder = run(world, str(tmp_path / "run"), "bsa", source=str(source), loss="hinge")
    before = load_file(source / "average.safetensors")
    after = {k.removeprefix("generator."): v for k, v in tensors(folder).items() if k.startswith("generator.")}
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    added = after.keys() - before.keys()
    if family in ("gpgan", "mnist"):
        assert all(name.endswith(".bias") for name in moved) and moved
        scales = {name: after[name] for name in added if name.endswith(".gamma")}
        assert scales and all(s.shape[1:].numel() == 1 and not (s == 1).any() for s in scales.values())
        assert all(not after[name].any() for name in added - scales.keys())
    else:
        network = build_generator(load_pair(source).cfg)
        kinds = (nn.BatchNorm2d, wgan_resnet.BatchNorm, biggan_layers.BatchNorm, biggan_layers.ConditionalBatchNorm)
        inside = tuple(f"{name}." for name, layer in network.named_modules() if isinstance(layer, kinds))
        parameters = {name for name, _ in network.named_parameters()}
        assert not added and {name for name in parameters if name.startswith(inside)} == moved & parameters
        assert moved & parameters


@pytest.mark.parametrize("family", ["gpgan", "biggan", "wgan-resnet"])
def test_mining_leaves_every_bit_of_the_generator(world: Path, tmp_path: Path, family: str) -> None:
    folder = run(world, str(tmp_path / "run"), "minegan", source=str(world / family), stage2="none")
    _, model, average, _ = load_checkpoint(folder / "checkpoints")
    source = load_file(world / family / "average.safetensors")
    for prefix, state in (("generator.generator.", model), ("generator.", average)):
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert found.keys() == source.keys()
        assert all(torch.equal(found[name], value) for name, value in source.items())
    moved = run(world, str(tmp_path / "moving"), "minegan", source=str(world / family), stage2="none", loss="nonsat")
    assert any(k.startswith("generator.miner.") for k in tensors(moved))


def test_several_sources_are_mined_together(world: Path, tmp_path: Path) -> None:
    other = source_folder(tmp_path / "other", ModelConfig(arch="resnet", size=16, nf=4, nf_max=8, z_dim=9))
    sources = (str(world / "gpgan"), str(other))
    changes = {"source": sources, "mining_warmup": 1, "stage2_start": 3}
    whole = run(world, str(tmp_path / "whole"), "minegan", **changes)
    p = tensors(whole)["generator.p"]
    assert p.sum().item() == pytest.approx(1) and not torch.equal(p, torch.full_like(p, 0.5))
    parts = run(world, str(tmp_path / "parts"), "minegan", **{**changes, "steps": 2})
    resume_run(parts, steps=4)
    assert digest(whole) == digest(parts)


@pytest.mark.parametrize("conditioning", ["batchnorm", "concatenate"])
def test_an_unconditional_source_becomes_conditional(world: Path, tmp_path: Path, conditioning: str) -> None:
    changes = {
        **CRITICS,
        "conditioning": conditioning,
        "source": str(world / "wgan-resnet"),
        "data": str(world / "classes"),
        "labels": "folders",
    }
    folder = run(world, str(tmp_path / "run"), "transfergan", classes=3, lr_g=0.0, lr_d=0.0, **changes)
    loaded = load_run(folder, "cpu")
    z = torch.randn(5, 6)
    pictures = [loaded.generator(z, torch.full((5,), k)) for k in range(3)]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert "class_loss" in rows(folder)[-1]
    with pytest.raises(UsageError, match="conditioned on 3 classes: add --labels folders"):
        run(world, str(tmp_path / "b"), "transfergan", classes=3, source=changes["source"])
    with pytest.raises(SourceError, match="only an unconditional one of family wgan-resnet"):
        run(world, str(tmp_path / "c"), "transfergan", classes=3, source=str(world / "gpgan"))


@pytest.mark.parametrize("transfer", ["both", "generator", "discriminator", "none"])
def test_only_the_chosen_network_starts_from_the_source(world: Path, tmp_path: Path, transfer: str) -> None:
    changes = {"source": str(world / "gpgan"), "seed": 5, "lr_g": 0.0, "lr_d": 0.0}
    folder = run(world, str(tmp_path / "run"), "transfergan", transfer=transfer, **changes)
    model = tensors(folder)
    for network, file in (("generator", "average"), ("discriminator", "discriminator")):
        source = load_file(world / "gpgan" / f"{file}.safetensors")
        same = all(torch.equal(model[f"{network}.{name}"], value) for name, value in source.items())
        assert same == (transfer in ("both", network))


@pytest.mark.parametrize(
    ("method", "changes", "error", "message"),
    [
        ("adafm", {"source": ("a", "b")}, UsageError, "2 sources were given, and `adafm train adafm` takes 1"),
        ("bsa", {"freeze_g": 2}, SourceError, "--freeze-g is 2: bsa freezes every filter"),
        ("bsa", {"copy": "gmdn"}, SourceError, "--copy gmdn leaves parts of the generator at random"),
        ("freezed", {"freeze_d": 0}, SourceError, "--freeze-d is 0: freezed freezes at least 1"),
        ("transfergan", {"transfer": "none", "freeze_g": 1}, SourceError, "starts at random must not be frozen"),
        ("transfergan", {"labels": "folders"}, UsageError, "makes no network here that is conditioned on labels"),
        ("transfergan", {"aug": "ada", "loss": "wgan-gp"}, UsageError, "--aug ada reads the sign"),
        ("minegan", {"stage2": "adafm", "freeze_g": 1}, SourceError, "no convolution to modulate"),
        ("minegan", {"stage2": "adafm", "freeze_g": 99}, SourceError, "--freeze-g 99"),
    ],
)
def test_bad_settings_say_what_to_change(world: Path, tmp_path: Path, method: str, changes, error, message) -> None:
    values = {"source": str(world / "gpgan"), **changes}
    with pytest.raises(error, match=message):
        run(world, str(tmp_path / "run"), method, **values)


def test_sources_of_another_image_shape_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="source 2 makes images of 32 pixels and 3 channels, source 1 of 16 and 3"):
        run(world, str(tmp_path / "run"), "minegan", source=(str(world / "gpgan"), str(world / "biggan")))


def test_settings_are_those_of_the_family_and_the_publication(world: Path, tmp_path: Path) -> None:
    flags = ["--source", str(world / "wgan-resnet"), "--data", "d", "--outdir", "o"]
    recipe = parse_config("transfergan", "adafm train transfergan", flags)
    assert (recipe.critic_steps, recipe.order, recipe.lr_g, recipe.faithful) == (5, "discriminator-first", 1e-4, False)
    published = parse_config("transfergan", "adafm train transfergan", [*flags, "--faithful", "--batch", "4"])
    assert (published.lr_g, published.ema, published.adam_epsilon) == (1e-5, 0.0, "tensorflow")
    assert (published.batch, published.beta1, published.beta2) == (4, 0.0, 0.9)
    assert parse_config("adafm", "adafm train adafm", ["--source", str(world / "gpgan"), *flags[2:]]).critic_steps == 1
    for method, arch in (("minegan", "biggan"), ("minegan", "mnist"), ("transfergan", "resnet2"), ("adafm", "resnet4")):
        TrainConfig(data="d", outdir="o", **preset(method, True, arch))


@pytest.mark.parametrize("family", ["wgan-resnet", "biggan", "mnist"])
def test_published_settings_take_a_step(world: Path, tmp_path: Path, family: str) -> None:
    method = "transfergan" if family == "wgan-resnet" else "minegan"
    values = {**preset(method, True, FAMILIES[family].arch), "steps": 2, "batch": 4, "batch_gpu": 2, "stage2_start": 1}
    folder = start_run(method, settings(world, str(tmp_path / "run"), source=str(world / family), **values))
    assert all(math.isfinite(rows(folder)[-1][name]) for name in ("d_loss", "g_loss"))


def test_a_source_is_trained_for_longer_than_a_target(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr("adafm_trainer.cli.pretrain.start_run", lambda method, config, model: taken.append(config))
    for words in ([], ["--faithful"], ["--steps", "3"]):
        assert cli.main(["pretrain", "--data", "d", "--outdir", "o", *words]) == 0
    published = preset("scratch", True).get("steps", 8400)
    assert [config.steps for config in taken] == [8400, published, 3] and preset("scratch")["steps"] == 4000


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_source_keeps_the_statistics_it_is_asked_for(world: Path, tmp_path: Path, statistics: str) -> None:
    words = ["pretrain", "--arch", "wgan-resnet", "--size", "16", "--nf", "2", "--z-dim", "6", "--batch", "4"]
    words += ["--data", str(world / "images"), "--outdir", str(tmp_path / "run"), "--steps", "2", "--eval-every", "-1"]
    assert cli.main([*words, "--statistics", statistics, "--device", "cpu"]) == 0
    source = load_pair(tmp_path / "run" / "source")
    assert source.cfg.statistics == statistics
    assert any(name.endswith("running_mean") for name in source.generator_state) == (statistics == "running")
