"""Sources, folders and labels that do not fit: what the command line says of each, or what it does with it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from adafm_trainer import cli
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.dcgan import DCGANConfig
from adafm_trainer.models.wgan_config import WganResNetConfig
from tiny import MODEL, image_folder, source_folder

WGAN = WganResNetConfig(size=16, dim=2, z_dim=6)
SOURCES = {
    "gpgan": MODEL,
    "grey": dataclasses.replace(MODEL, channels=1),
    "large": dataclasses.replace(MODEL, size=32),
    "wgan": WGAN,
    "two-classes": dataclasses.replace(WGAN, classes=2),
    "biggan": BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=(16,)),
    "dcgan": DCGANConfig(size=16, ngf=4, ndf=4, z_dim=6),
}
USAGE, DATA, SOURCE = 2, 3, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    for count in (1, 2, 25):
        image_folder(folder / f"{count}-images", count)
    for k in range(3):
        image_folder(folder / "classes" / f"c{k}", 3, seed=k)
    shutil.copytree(folder / "classes", folder / "strays")
    image_folder(folder / "strays", 2)
    for name, model in SOURCES.items():
        source_folder(folder / name, model)
    return folder


def train(world: Path, out: Path, method: str, source: str, data: str = "25-images", *more: str) -> int:
    sources = [flag for name in source.split(",") for flag in ("--source", str(world / name))]
    flags = ["--steps", "1", "--batch", "2", "--precision", "fp32", "--device", "cpu", "--eval-samples", "4"]
    flags += ["--extractor", "random-v1"]
    return cli.main(
        ["train", method, "--data", str(world / data), "--outdir", str(out / "run"), *sources, *flags, *more]
    )


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("minegan", "gpgan", "empty"), DATA, "empty holds no images: looked for .png"),
        (("minegan", "gpgan", "absent"), DATA, "no images at .*absent"),
        (("minegan", "gpgan", "1-images", "--holdout", "1"), DATA, "--holdout 1 leaves fewer than 2 of the 1 images"),
        (("minegan", "gpgan", "25-images", "--holdout", "24"), DATA, "--holdout 24 leaves fewer than 2 of the 25"),
        (("transfergan", "two-classes", "classes"), USAGE, "conditioned on 2 classes: add --labels folders"),
        (("adafm", "two-classes", "classes", "--freeze-g", "2"), USAGE, "conditioned on 2 classes: add --labels"),
        (("transfergan", "two-classes", "25-images", "--labels", "folders"), DATA, "000.png and 24 more in no class"),
        (
            ("transfergan", "two-classes", "strays", "--labels", "folders"),
            DATA,
            "000.png and 1 more in no class folder",
        ),
        (
            ("transfergan", "two-classes", "classes", "--labels", "folders"),
            DATA,
            "has 3 class folders .c0, c1, c2. and .* on 2 classes, c2/000.png is the first image beyond them",
        ),
        (
            ("transfergan", "wgan", "classes", "--labels", "folders", "--classes", "4"),
            DATA,
            "has 3 class folders .* conditioned on 4 classes",
        ),
        (
            ("transfergan", "two-classes", "classes", "--labels", "folders", "--classes", "3"),
            SOURCE,
            "--classes 3: the source has 2 classes, .* use --classes 2",
        ),
        (("transfergan", "gpgan", "classes", "--classes", "3"), SOURCE, "the source is of family resnet"),
        (("adafm", "biggan", "25-images", "--head", "new"), SOURCE, "--head new puts .* on a GP-GAN source"),
        (("adafm", "dcgan", "25-images", "--freeze-g", "9"), SOURCE, "--freeze-g 9 .*cannot modulate 9 groups"),
        (("freezed", "wgan", "25-images", "--freeze-d", "9"), SOURCE, "--freeze-d 9: cannot freeze 9 groups"),
        (("minegan", "gpgan,grey"), SOURCE, "source 2 makes images of 16 pixels and 1 channels, source 1 of 16 and 3"),
        (("minegan", "gpgan,large"), SOURCE, "source 2 makes images of 32 pixels .* source 1 of 16"),
        (("minegan", "gpgan,dcgan,biggan"), SOURCE, "source 3 makes images of 32 pixels"),
        (("minegan", "biggan", "25-images", "--miner-dim", "3"), SOURCE, "u_dim is 3 .* size of its latent, 8"),
        (("minegan", "biggan", "25-images", "--miner-init", "glorot"), SOURCE, "miner_init is 'glorot'"),
        (
            ("scratch", "gpgan", "2-images", "--reg", "l2sp", "--reg-weight", "1"),
            USAGE,
            "no trained parameter .* source",
        ),
        (
            ("minegan", "gpgan", "2-images", "--stage2", "none", "--reg", "l2sp", "--reg-weight", "1"),
            USAGE,
            "no trained parameter of the MinedGenerator comes from the source; take --reg none",
        ),
        (
            ("transfergan", "gpgan", "2-images", "--transfer", "none", "--reg", "ewc", "--reg-weight", "1"),
            SOURCE,
            "--transfer none --reg ewc: the generator starts at random",
        ),
    ],
)
def test_the_message_names_what_is_wrong(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple, code: int, message: str
) -> None:
    assert train(world, tmp_path, *command) == code
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("source", "field", "value", "message"),
    [
        ("gpgan", "size", 32, "is (8, 16, 3, 3) in the source and (16, 16, 3, 3) in the target"),
        ("gpgan", "channels", 1, "conv_img.weight is (3, 8, 3, 3) in the source and (1, 8, 3, 3)"),
        ("gpgan", "arch", "biggan", "model.json cannot be read: ValueError: unknown field base"),
        ("gpgan", "arch", "nope", "arch is 'nope'; expected one of resnet, "),
        ("gpgan", "size", 17, "size is 17; family resnet makes powers of two"),
        ("two-classes", "classes", 3, "res1.bn1.weight is (2, 8) in the source and (3, 8) in the target"),
    ],
)
@pytest.mark.parametrize("method", ["transfergan", "minegan"])
def test_a_description_that_does_not_fit_the_weights(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method, source, field, value, message
) -> None:
    folder = world / f"{method}-{source}-{field}-{value}"
    shutil.copytree(world / source, folder)
    description = json.loads((folder / "model.json").read_text())
    description["model"][field] = value
    (folder / "model.json").write_text(json.dumps(description))
    labels = ("classes", "--labels", "folders") if source == "two-classes" else ("25-images",)
    assert train(world, tmp_path, method, folder.name, *labels) == SOURCE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "source"),
    [("minegan", "gpgan"), ("transfergan", "wgan"), ("minegan", "gpgan,dcgan"), ("scratch", "dcgan")],
)
@pytest.mark.parametrize(
    ("data", "says"), [("1-images", "kid, fd and kmmd left out: they need 2 images"), ("25-images", "")]
)
def test_few_images_train_and_what_cannot_be_measured_is_said(
    world: Path, tmp_path: Path, method: str, source: str, data: str, says: str
) -> None:
    assert train(world, tmp_path, method, source, data) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert says in log and ("left out" in log) == bool(says)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(name.startswith("kid[") for name in row["metrics"]) == (data != "1-images")
    last = json.loads((tmp_path / "run" / "stats.jsonl").read_text().splitlines()[-1])
    assert (last["nearest_share"] is None) == (data == "1-images")
    assert (tmp_path / "run" / "report.html").is_file()


def test_judging_by_too_few_images(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(world, tmp_path, "transfergan", "gpgan") == 0
    judge = ["eval", str(tmp_path / "run"), "--samples", "4", "--extractor", "random-v1", "--device", "cpu"]
    assert cli.main([*judge, "--data", str(world / "empty")]) == DATA
    assert cli.main([*judge, "--data", str(world / "2-images"), "--iw", "1"]) == DATA
    assert "it needs 4 images, got 2 in" in capsys.readouterr().err
    assert cli.main([*judge, "--data", str(world / "1-images")]) == 0
    assert "kid, fd and kmmd left out" in capsys.readouterr().out
    for pair in (("1-images", "25-images"), ("25-images", "1-images")):
        assert cli.main(["distance", *(str(world / name) for name in pair), "--extractor", "random-v1"]) == DATA
        assert "1-images holds 1 image; a distance needs at least 2" in capsys.readouterr().err
