"""The image sets that come with the package, and the renderer that made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from adafm_trainer.data import dicebear
from adafm_trainer.data.bundled import NAMES, bundled
from adafm_trainer.data.images import load_image_set
from adafm_trainer.errors import UsageError


@pytest.mark.parametrize("name", NAMES)
def test_bundled_sets_are_what_their_metadata_says(name: str) -> None:
    images = load_image_set(bundled(name), size=64)
    record = json.loads(bundled(name).with_suffix(".json").read_text("utf-8"))
    style = record["styles"][0]
    assert len(images) == record["count"] == (100 if name.endswith("train") else 500) and not images.manifest["rejects"]
    assert {(r["width"], r["height"], r["mode"]) for r in images.manifest["images"]} == {(64, 64, "RGB")}
    assert style["licence"] == "CC0 1.0" and "publicdomain/zero" in style["licence_url"] and style["author"]
    seeds = [seed for first, last in style["indices"] for seed in range(first, last + 1)]
    assert images.names == [f"{style['style']}/{style['style']}-{seed:06d}.png" for seed in seeds]
    total = hashlib.sha256(b"".join(dicebear.pixel_hash(p) for p in images.pixels.permute(0, 2, 3, 1).numpy()))
    assert total.hexdigest() == record["pixels_sha256"]
    assert hashlib.sha256(bundled(name).read_bytes()).hexdigest() == record["file_sha256"]


@pytest.mark.parametrize("style", ["open-peeps", "notionists"])
def test_bundled_heldout_images_are_not_training_images(style: str) -> None:
    sets = [load_image_set(bundled(f"{style}-{part}"), size=64).pixels for part in ("train", "heldout")]
    assert len({p.numpy().tobytes() for p in torch.cat(sets)}) == 600
    assert sum(f.stat().st_size for f in bundled(f"{style}-train").parent.iterdir()) < 5_000_000


def test_unknown_bundled_name_lists_the_names() -> None:
    with pytest.raises(UsageError, match="open-peeps-train"):
        bundled("open-peeps")


def test_renders_repeat_the_bundled_pixels(tmp_path: Path) -> None:
    pytest.importorskip("dicebear", reason="the extra 'study' is not installed")
    pytest.importorskip("resvg_py", reason="the extra 'study' is not installed")
    out = tmp_path / "a.zip"
    dicebear.main(["--style", "open-peeps", "--count", "3", "--output", str(out)])
    expected = load_image_set(bundled("open-peeps-train"), size=64)
    assert torch.equal(load_image_set(out, size=64).pixels, expected.pixels[:3])

    record = dicebear.write_set(tmp_path / "b.zip", ["open-peeps"], 2, exclude=[out], size=64)
    assert record["styles"][0]["indices"] == [[3, 4]], "excluded images are passed over"
    first = out.read_bytes()
    dicebear.write_set(out, ["open-peeps"], 3)
    assert out.read_bytes() == first, "the same arguments give the same bytes"

    with pytest.raises(UsageError, match="not CC0"):
        dicebear.write_set(tmp_path / "c.zip", ["micah"], 1)
    with pytest.raises(UsageError, match="no style is called 'peeps'"):
        dicebear.style_info("peeps")
    assert all(dicebear.style_info(s).licence == "CC0 1.0" for s in dicebear.SOURCE_STYLES)
    assert not {"open-peeps", "notionists"} & set(dicebear.SOURCE_STYLES)
