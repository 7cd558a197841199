"""Image sets: what is read, how it is converted, what is refused, and the order batches are drawn in."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from adafm_trainer.data.decode import BadImage, DecodeSettings, decode
from adafm_trainer.data.grid import make_grid, save_grid, to_uint8
from adafm_trainer.data.images import load_image_set
from adafm_trainer.data.prepare import prepare
from adafm_trainer.data.sampler import indices
from adafm_trainer.errors import DataError, UsageError
from PIL import Image

SIZE = 32


def picture(seed: int = 0, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return low.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress(b"\0" * 4096)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


PNG, JPEG = encoded(picture()), encoded(picture(), "JPEG", quality=95)
BAD_FILES = {
    "empty.png": b"",
    "text.png": b"this is not an image\n",
    "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "noise.jpg": bytes(np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8)),
    "signature.png": PNG[:8],
    "header_only.png": PNG[:33],
    "cut.png": PNG[: len(PNG) // 2],
    "crc.png": flipped(PNG, len(PNG) // 2),
    "no_width.png": png_header(0, 64),
    "bomb.png": png_header(50_000, 50_000, colour=0),
    "wide_bomb.png": png_header(40_000_000, 2, colour=0),
    "over_limit.png": png_header(9_000, 9_000, colour=0),
    "too_few_rows.png": png_header(640, 480),
    "start.jpg": JPEG[:20],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "most.jpg": JPEG[: len(JPEG) * 9 // 10],
    "start.gif": encoded(picture(), "GIF")[:13],
    "cut.gif": encoded(picture(), "GIF")[:300],
    "cut.bmp": encoded(picture(), "BMP")[:700],
    "cut.webp": encoded(picture(), "WEBP")[:60],
    "cut.tif": encoded(picture(), "TIFF")[:500],
    "huge.ppm": b"P6 90000 90000 255\n" + b"\0" * 100,
    "short.ppm": b"P6 64 64 255\n" + b"\0" * 100,
    "float.tif": encoded(Image.fromarray(np.random.default_rng(2).random((40, 40), dtype=np.float32)), "TIFF"),
    "int32.tif": encoded(Image.fromarray(np.full((40, 40), 1 << 20, np.int32)), "TIFF"),
    "dot.png": encoded(Image.new("RGB", (1, 1))),
    "icon.png": encoded(picture(width=3, height=3)),
    "strip.png": encoded(picture(width=1200, height=40)),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
    "archive.png": b"PK\x05\x06" + b"\0" * 18,
}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def good_files(count: int) -> dict[str, bytes]:
    return {f"good/{i:03d}.png": encoded(picture(i)) for i in range(count)}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(BAD_FILES[name], DecodeSettings(SIZE))
    assert str(caught.value)


def test_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(BadImage, match="more than the 64000000 pixels allowed"):
        decode(BAD_FILES["bomb.png"], DecodeSettings(SIZE))
    with pytest.raises(BadImage, match="9000x9000, more than the 64000000 pixels allowed"):
        decode(BAD_FILES["over_limit.png"], DecodeSettings(SIZE))
    with pytest.raises(BadImage, match="48x40, more than the 1000 pixels allowed"):
        decode(PNG, DecodeSettings(SIZE, max_pixels=1000))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_bad_files_are_set_aside_and_listed(tmp_path: Path, packed: bool) -> None:
    files = {**good_files(620), **BAD_FILES}
    path = write_zip(tmp_path / "set.zip", files) if packed else write_folder(tmp_path / "set", files)
    images = load_image_set(path, size=SIZE)
    assert len(images) == 620 and images.pixels.shape == (620, 3, SIZE, SIZE)
    assert {r["name"] for r in images.manifest["rejects"]} == set(BAD_FILES)
    assert all(r["reason"] for r in images.manifest["rejects"])
    assert torch.equal(images.pixels[7], load_one(encoded(picture(7))))


def test_too_many_bad_files_stop_the_load(tmp_path: Path) -> None:
    bad = dict(list(BAD_FILES.items())[:3])
    path = write_folder(tmp_path / "set", {**good_files(40), **bad})
    with pytest.raises(DataError) as caught:
        load_image_set(path, size=SIZE)
    message = str(caught.value)
    assert "3 of 43 images" in message and all(name in message for name in bad) and caught.value.exit_code == 3
    assert len(load_image_set(path, size=SIZE, max_bad_share=0.1)) == 40
    with pytest.raises(DataError, match="2 of 2"):
        load_image_set(write_folder(tmp_path / "bad", {"a.png": b"", "b.png": b""}), size=SIZE, max_bad_share=1.0)


def test_long_lists_of_bad_files_are_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 10 more"):
        load_image_set(write_folder(tmp_path, {f"{i}.png": b"" for i in range(30)}), size=SIZE)


@pytest.mark.parametrize(
    "files", [{}, {"notes.txt": b"x", ".hidden.png": PNG, "__MACOSX/a.png": PNG}], ids=["bare", "other"]
)
def test_empty_sets_name_the_path_and_what_was_looked_for(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "folder").mkdir()
    for path in (write_zip(tmp_path / "a.zip", files), write_folder(tmp_path / "folder", files)):
        with pytest.raises(DataError) as caught:
            load_image_set(path, size=SIZE)
        assert str(path) in str(caught.value) and ".png" in str(caught.value)


def test_missing_path_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_image_set(tmp_path / "nothing", size=SIZE)
    (tmp_path / "one.png").write_bytes(PNG)
    with pytest.raises(DataError, match="not a zip archive"):
        load_image_set(tmp_path / "one.png", size=SIZE)
    whole = write_zip(tmp_path / "whole.zip", good_files(3)).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="zip"):
        load_image_set(tmp_path / "cut.zip", size=SIZE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside.png", "points outside"),
        ("a/../../b.png", "points outside"),
        ("/etc/absolute.png", "absolute name"),
        ("C:/windows.png", "absolute name"),
        ("..\\outside.png", "points outside"),
        ("a\\b.png", "no portable name"),
    ],
)
def test_archive_with_unsafe_name_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    path = write_zip(tmp_path / "set.zip", {**good_files(30), name: PNG})
    with pytest.raises(DataError, match=reason):
        load_image_set(path, size=SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


def test_archive_with_duplicate_link_secret_or_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "double.zip"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.png", PNG)
        archive.writestr("a.png", JPEG)
    with pytest.raises(DataError, match="comes twice"):
        load_image_set(path, size=SIZE)

    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "target")
    with pytest.raises(DataError, match="is a link"):
        load_image_set(tmp_path / "link.zip", size=SIZE)

    data = bytearray(write_zip(tmp_path / "secret.zip", {"a.png": PNG}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(data)
    with pytest.raises(DataError, match="is encrypted"):
        load_image_set(tmp_path / "secret.zip", size=SIZE)

    path = write_zip(tmp_path / "bomb.zip", {"a.bmp": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="unpacks to 20000000 bytes"):
        load_image_set(path, size=SIZE)


def test_damaged_archive_entry_is_set_aside(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {**good_files(40), "odd.png": encoded(picture(99))})
    data = path.read_bytes()
    path.write_bytes(flipped(data, data.index(encoded(picture(99))) + 100))
    images = load_image_set(path, size=SIZE)
    assert len(images) == 40 and [r["name"] for r in images.manifest["rejects"]] == ["odd.png"]


def load_one(data: bytes, **options: object) -> torch.Tensor:
    return torch.from_numpy(decode(data, DecodeSettings(SIZE, **options)).pixels)


def paletted(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (48, 48), 3)
    image.putpalette([*([0, 0, 0] * 3), *colour])
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encoded(Image.new("L", (48, 48), 77)), (77, 77, 77), id="grey"),
        pytest.param(encoded(Image.new("1", (48, 48), 1)), (255, 255, 255), id="one-bit"),
        pytest.param(encoded(Image.new("I;16", (48, 48), 77 * 257)), (77, 77, 77), id="16-bit"),
        pytest.param(encoded(paletted((9, 10, 11))), (9, 10, 11), id="palette"),
        pytest.param(encoded(Image.new("CMYK", (48, 48), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), id="cmyk"),
        pytest.param(encoded(Image.new("RGB", (48, 48), (10, 200, 30)), "BMP"), (10, 200, 30), id="bmp"),
        pytest.param(encoded(Image.new("RGB", (48, 48), (10, 200, 30)), "PPM"), (10, 200, 30), id="ppm"),
        pytest.param(
            encoded(Image.new("RGB", (48, 48), (10, 200, 30)), "WEBP", lossless=True), (10, 200, 30), id="webp"
        ),
        pytest.param(encoded(Image.new("RGBA", (48, 48), (10, 200, 30, 0))), (255, 255, 255), id="transparent"),
        pytest.param(encoded(Image.new("LA", (48, 48), (100, 255))), (100, 100, 100), id="grey-alpha"),
    ],
)
def test_colour_modes(data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = load_one(data)
    assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8
    assert tuple(pixels[:, 16, 16].tolist()) == expected


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    pixels = load_one(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels[:, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("alpha", "expected"), [("white", (177, 127, 127)), ("black", (50, 0, 0)), ("drop", (100, 0, 0))]
)
def test_alpha_policies(alpha: str, expected: tuple[int, int, int]) -> None:
    data = encoded(Image.new("RGBA", (48, 48), (100, 0, 0, 128)))
    found = load_one(data, alpha=alpha)[:, 0, 0].to(torch.int64)
    assert (found - torch.tensor(expected)).abs().max() <= 1


def test_alpha_error_refuses_transparent_pixels_only() -> None:
    with pytest.raises(BadImage, match="transparent"):
        load_one(encoded(Image.new("RGBA", (48, 48), (1, 2, 3, 254))), alpha="error")
    assert load_one(encoded(Image.new("RGBA", (48, 48), (1, 2, 3, 255))), alpha="error")[:, 0, 0].tolist() == [1, 2, 3]


def test_palette_transparency_follows_the_policy() -> None:
    data = encoded(paletted((50, 60, 70)), transparency=3)
    assert load_one(data)[:, 0, 0].tolist() == [255, 255, 255]
    assert load_one(data, alpha="drop")[:, 0, 0].tolist() == [50, 60, 70]


def test_camera_rotation_is_obeyed() -> None:
    image = Image.new("RGB", (48, 48), "white")
    image.paste("red", (0, 0, 48, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = load_one(encoded(image, "PNG", exif=exif))
    # Orientation 6: turn by 90 degrees clockwise, so the top half comes to lie on the right.
    assert pixels[:, 16, 28].tolist() == [255, 0, 0] and pixels[:, 16, 3].tolist() == [255, 255, 255]


def test_grey_sets() -> None:
    pixels = load_one(encoded(Image.new("RGB", (48, 48), (255, 0, 0))), channels=1)
    assert pixels.shape == (1, SIZE, SIZE) and pixels[0, 0, 0] == 76
    assert load_one(encoded(picture(mode="L")), channels=1, fit="pad").shape == (1, SIZE, SIZE)


def stripes(width: int, height: int) -> bytes:
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (width // 4, 0, width - width // 4, height))
    return encoded(image)


def test_fits() -> None:
    data = stripes(128, 64)
    crop, pad, stretch = (load_one(data, fit=fit) for fit in ("crop", "pad", "stretch"))
    assert crop[1, :, 2:-2].max() <= 2, "the centre 64x64 of the file is all red"
    assert pad[:, 2, 16].tolist() == [255, 255, 255] and pad[:, 16, 16].tolist() == [255, 0, 0]
    assert load_one(data, fit="pad", alpha="black")[:, 2, 16].tolist() == [0, 0, 0]
    assert stretch[:, 2, 16].tolist() == [255, 0, 0] and stretch[:, 2, 2].tolist() == [255, 255, 255]


def test_faithful_preparation_matches_an_independent_bilinear_resize() -> None:
    data = encoded(picture(3, 96, 75))
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        reference, size=(SIZE, 96 * SIZE // 75), mode="bilinear", antialias=True, align_corners=False
    )
    left = round((resized.shape[3] - SIZE) / 2)
    expected = resized[0, :, :, left : left + SIZE]
    found = load_one(data, resample="bilinear").float()
    assert (found - expected).abs().max() <= 1.0
    assert (load_one(data).float() - expected).abs().max() > 2.0, "Lanczos differs, so the filter is used"


def test_image_of_the_right_size_is_untouched() -> None:
    image = picture(5, SIZE, SIZE)
    for resample in ("lanczos", "bilinear"):
        assert np.array_equal(load_one(encoded(image), resample=resample).permute(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize(
    "options", [{"fit": "cover"}, {"alpha": "grey"}, {"resample": "box"}, {"channels": 4}, {"size": 0}]
)
def test_unknown_options_are_usage_errors(tmp_path: Path, options: dict[str, object]) -> None:
    value = next(iter(options.values()))
    with pytest.raises(UsageError, match=str(value)):
        load_image_set(write_folder(tmp_path, good_files(1)), **{"size": SIZE, **options})


def test_order_manifest_and_progress(tmp_path: Path) -> None:
    files = {"b/2.png": encoded(picture(2)), "a.png": encoded(picture(1)), "b/10.JPG": JPEG, "notes.txt": b"x"}
    files["copy.png"] = files["a.png"]
    calls: list[tuple[int, int]] = []
    images = load_image_set(
        write_folder(tmp_path, files), size=SIZE, progress=lambda done, total: calls.append((done, total))
    )
    manifest = images.manifest
    assert images.names == ["a.png", "b/10.JPG", "b/2.png", "copy.png"] == [r["name"] for r in manifest["images"]]
    assert manifest["ignored"] == 1 and manifest["duplicates"] == 1 and manifest["settings"]["resample"] == "lanczos"
    assert manifest["images"][1]["width"] == 48 and len(manifest["images"][1]["sha256"]) == 64
    assert calls[-1] == (4, 4) and json.loads(json.dumps(manifest)) == manifest
    same = load_image_set(write_zip(tmp_path / "x.zip", files), size=SIZE)
    assert same.manifest["sha256"] == manifest["sha256"] and torch.equal(same.pixels, images.pixels)
    (tmp_path / "a.png").write_bytes(encoded(picture(77)))
    assert load_image_set(tmp_path, size=SIZE).manifest["sha256"] != manifest["sha256"]


def test_select_and_batch(tmp_path: Path) -> None:
    images = load_image_set(write_folder(tmp_path, good_files(10)), size=SIZE)
    part = images.select([7, 2, 5])
    assert len(part) == 3 and torch.equal(part.pixels, images.pixels[[7, 2, 5]])
    assert part.names == ["good/007.png", "good/002.png", "good/005.png"] and part.manifest["count"] == 3
    assert part.manifest["sha256"] not in (images.manifest["sha256"], images.select([2, 5, 7]).manifest["sha256"])
    batch = images.batch(torch.tensor([3, 3]))
    batch.zero_()
    assert images.pixels[3].any(), "a batch is a copy"
    for wrong in ([], [1, 1]):
        with pytest.raises(ValueError, match="select"):
            images.select(wrong)
    with pytest.raises(IndexError, match="10 images"):
        images.batch([10])


def test_set_too_large_for_memory_is_decoded_on_demand(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {**good_files(40), "bad.png": b""})
    resident = load_image_set(folder, size=SIZE)
    lazy = load_image_set(folder, size=SIZE, memory_limit=3 * SIZE * SIZE * 4)
    assert resident.in_memory and not lazy.in_memory and lazy.manifest == resident.manifest
    rows = torch.tensor([3, 39, 3, 0, 1, 2, 4, 5, 3])
    assert torch.equal(lazy.batch(rows), resident.batch(rows))
    assert torch.equal(lazy.select([9, 4]).batch([1, 0]), resident.pixels[[4, 9]])
    assert len(lazy._store._recent) <= 4
    with pytest.raises(RuntimeError, match="memory_limit"):
        _ = lazy.pixels
    (folder / "good" / "020.png").write_bytes(b"")
    with pytest.raises(DataError, match="good/020.png"):
        lazy.batch([20])


def test_folder_links_are_followed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", good_files(3))
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    images = load_image_set(folder, size=SIZE, max_bad_share=0.5)
    assert len(images) == 3 and [r["name"] for r in images.manifest["rejects"]] == ["gone.png"]


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_sampler_draws_every_image_once_per_epoch(n: int) -> None:
    epochs = [indices(5, epoch * n, n, n) for epoch in range(4)]
    assert all(sorted(e.tolist()) == list(range(n)) for e in epochs)
    assert n < 7 or len({tuple(e.tolist()) for e in epochs}) == 4


def test_sampler_depends_on_the_position_alone() -> None:
    whole = indices(9, 0, 100, 13)
    assert torch.equal(whole, torch.cat([indices(9, p, 4, 13) for p in range(0, 100, 4)]))
    assert torch.equal(whole[37:60], indices(9, 37, 23, 13)) and whole.dtype == torch.int64
    assert not torch.equal(whole, indices(10, 0, 100, 13))
    assert indices(9, 5, 0, 13).shape == (0,)


@pytest.mark.parametrize(("position", "count", "n"), [(0, 1, 0), (-1, 1, 5), (0, -1, 5)])
def test_sampler_refuses_bad_arguments(position: int, count: int, n: int) -> None:
    with pytest.raises(ValueError, match="must"):
        indices(0, position, count, n)


def prepared(pixels: torch.Tensor, rows: range | list[int], **options: object) -> torch.Tensor:
    settings = {"seed": 3, "step": 8, "flip": False, "dither": False, **options}
    return prepare(pixels, sample_indices=rows, **settings)


def test_prepare_scales_and_dithers_as_the_authors_do() -> None:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = prepared(pixels, range(64))
    torch.testing.assert_close(plain, (pixels.float() / 255 - 0.5) / 0.5, rtol=0, atol=2e-7)
    noise = prepared(pixels, range(64), dither=True) - plain
    assert noise.min() > -1e-6 and noise.max() < 1 / 128 + 1e-6
    assert abs(float(noise.mean()) - 1 / 256) < 1e-4, "the noise is not centred"
    assert torch.equal(prepared(pixels, range(64), scale=0.5), plain * 0.5)
    assert plain.dtype == torch.float32 and pixels.float().max() > 200, "the input is unchanged"


def test_prepare_draws_do_not_depend_on_the_batch_split() -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    options = {"flip": True, "dither": True}
    whole = prepared(pixels, range(16), **options)
    halves = [prepared(pixels[rows], list(rows), **options) for rows in (range(0, 8), range(8, 16))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, prepared(pixels, range(16), step=9, **options))
    assert not torch.equal(whole, prepared(pixels, range(16), seed=4, **options))


def test_prepare_flips_half_of_the_images() -> None:
    pixels = torch.zeros(400, 1, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    left = prepared(pixels, range(400), flip=True)[:, 0, 0, 0]
    assert set(left.tolist()) == {-1.0, 1.0} and 150 < int((left > 0).sum()) < 250


def test_prepare_refuses_wrong_input() -> None:
    with pytest.raises(TypeError, match="uint8"):
        prepared(torch.zeros(2, 3, 4, 4), range(2))
    with pytest.raises(ValueError, match="3 indices for 2 images"):
        prepared(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), range(3))


def test_rounding_to_eight_bits() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0, float("nan")])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255, 0]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels) and to_uint8(levels) is levels
    with pytest.raises(TypeError, match="int64"):
        to_uint8(torch.arange(3))


def test_grid(tmp_path: Path) -> None:
    images = torch.arange(5, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    grid = make_grid(images)
    assert grid.shape == (8, 18, 3) and grid[0, 17, 0] == 80 and grid[4, 0, 0] == 120 and grid[7, 17, 0] == 255
    path = save_grid(tmp_path / "deep" / "grid.png", images[:, :1], columns=5, scale=2)
    assert np.asarray(Image.open(path)).shape == (8, 60, 3) and [p.name for p in path.parent.iterdir()] == ["grid.png"]
    for wrong in (images[:0], images[:, :2], images[0]):
        with pytest.raises(ValueError, match="images must be"):
            make_grid(wrong)
