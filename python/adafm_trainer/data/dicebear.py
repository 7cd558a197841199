"""Renders sets of avatars from the vector styles of DiceBear: the drawings that stand in for photographs offline.

Each image is a deterministic function of the pinned package versions, the style, the seed and the size. A set is a zip
of PNG files plus a JSON file beside it that says where the drawings come from and repeats the command. Two sets of one
style are made disjoint by seed ranges, and by ``exclude`` also image by image, because a style has few enough parts for
two seeds to give the same picture.

Needs the extra ``study``. Run as
``python -m adafm_trainer.data.dicebear --style open-peeps --count 100 --output open-peeps.zip``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shlex
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from adafm_trainer.errors import DataError, UsageError

PACKAGES = {"dicebear-core": "10.7.0", "dicebear-styles": "10.6.0", "resvg-py": "0.5.0"}
# What a source network is trained on: each is CC0 and draws a head or a bust. No target set uses one of them.
SOURCE_STYLES = ("lorelei", "pixel-art", "cutouts", "shadows", "cameo", "moods")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_SEEDS_PER_IMAGE = 50


@dataclass(frozen=True)
class StyleInfo:
    """Where a style comes from, in the words of its own metadata."""

    style: str
    author: str
    licence: str
    licence_url: str
    source: str
    source_url: str


def _require_packages() -> dict[str, str]:
    found = {}
    for name, wanted in PACKAGES.items():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            pins = " ".join(f"{n}=={v}" for n, v in PACKAGES.items())
            raise UsageError(f"avatars need {name}: install the extra 'study' or: pip install {pins}") from error
        if found[name] != wanted:
            raise UsageError(
                f"{name} is {found[name]}, but renders repeat only with {wanted}: pip install {name}=={wanted}"
            )
    return found


def _definition(style: str) -> dict:
    folder = resources.files("dicebear_styles")
    entry = folder.joinpath(f"{style}.json")
    if not entry.is_file():
        known = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".json"))
        raise UsageError(f"no style is called {style!r}; there are: {', '.join(known)}")
    return json.loads(entry.read_text("utf-8"))


def style_info(style: str) -> StyleInfo:
    """Author, licence and origin of a style, read from the style's own file."""
    _require_packages()
    meta = _definition(style).get("meta", {})
    licence, creator, source = meta.get("license", {}), meta.get("creator", {}), meta.get("source", {})
    return StyleInfo(
        style=style,
        author=creator.get("name", "unknown"),
        licence=licence.get("name", "unknown"),
        licence_url=licence.get("url", ""),
        source=source.get("name", ""),
        source_url=source.get("url", ""),
    )


class Renderer:
    """Draws avatars of one style. ``renderer(index)`` -> uint8 ``[size, size, 3]``, a pure function of the index.

    ``ground`` is the colour seen through transparent pixels; styles with a background of their own keep it.
    """

    def __init__(self, style: str, size: int, ground: str = "white") -> None:
        _require_packages()
        from dicebear import Avatar, Style
        from resvg_py import svg_to_bytes

        if size < 1:
            raise UsageError(f"size must be at least 1, got {size}")
        self.style, self.size = style, size
        self._ground = (*ImageColor.getrgb(ground)[:3], 255)
        self._definition = Style(_definition(style))
        self._avatar, self._rasterise = Avatar, svg_to_bytes

    def seed(self, index: int) -> str:
        return f"{self.style}-{index}"

    def __call__(self, index: int) -> np.ndarray:
        svg = self._avatar(self._definition, {"seed": self.seed(index), "size": self.size}).to_string()
        drawing = Image.open(io.BytesIO(bytes(self._rasterise(svg_string=svg)))).convert("RGBA")
        if drawing.size != (self.size, self.size):
            drawing = drawing.resize((self.size, self.size), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", drawing.size, self._ground)
        canvas.alpha_composite(drawing)
        return np.asarray(canvas.convert("RGB"))


def render_distinct(
    renderer: Renderer, count: int, first: int = 0, exclude: set[bytes] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields ``count`` pairs (seed index, image) that differ from each other and from ``exclude``, pixel for pixel.

    Seeds run upwards from ``first``; a seed whose picture is already there is passed over. ``exclude`` holds
    ``pixel_hash`` values and is not changed. Raises DataError where the style has too few different pictures.
    """
    seen = set(exclude or ())
    index, last = first, first + count * _SEEDS_PER_IMAGE
    for produced in range(count):
        while True:
            if index >= last:
                raise DataError(
                    f"style {renderer.style!r} gave {produced} different images of the {count} asked for from seeds "
                    f"{first} to {last - 1} at {renderer.size} px: ask for fewer"
                )
            image = renderer(index)
            index += 1
            if (key := pixel_hash(image)) not in seen:
                seen.add(key)
                break
        yield index - 1, image


def pixel_hash(image: np.ndarray) -> bytes:
    """SHA-256 of the shape and the pixels of a uint8 image."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()


def _hashes_in(archive: Path) -> set[bytes]:
    with zipfile.ZipFile(archive) as file:
        names = [n for n in file.namelist() if n.endswith(".png")]
        return {pixel_hash(np.asarray(Image.open(io.BytesIO(file.read(n))).convert("RGB"))) for n in names}


def write_set(
    output: Path,
    styles: Sequence[str],
    count: int,
    *,
    first: int = 0,
    size: int = 64,
    ground: str = "white",
    exclude: Sequence[Path] = (),
    other_licences: bool = False,
) -> dict:
    """Renders ``count`` different images of each style into ``output``, a zip of PNG files, with a JSON file beside it.

    The zip holds ``<style>/<style>-<seed index, 6 digits>.png`` in order of style and seed, with fixed time stamps, so
    the same arguments give the same bytes. ``exclude``: zips whose images must not recur. Styles under another licence
    than CC0 are refused unless ``other_licences``. Returns the metadata that was written.
    """
    if count < 1 or first < 0:
        raise UsageError(f"count must be at least 1 and first not negative, got {count} and {first}")
    infos = [style_info(style) for style in styles]
    for info in infos:
        if not info.licence.startswith("CC0") and not other_licences:
            raise UsageError(
                f"style {info.style!r} is under {info.licence!r}, not CC0: choose another, or pass "
                f"--other-licences and give {info.author} the credit its licence asks for"
            )
    excluded: set[bytes] = set().union(*(_hashes_in(p) for p in exclude))
    records, digest = [], hashlib.sha256()
    output.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as file:
        for info in infos:
            seeds = []
            for index, image in render_distinct(Renderer(info.style, size, ground), count, first, excluded):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG", optimize=True)
                name = f"{info.style}/{info.style}-{index:06d}.png"
                file.writestr(zipfile.ZipInfo(name, _ZIP_TIME), encoded.getvalue())
                digest.update(pixel_hash(image))
                seeds.append(index)
            records.append({**asdict(info), "seeds": f"{info.style}-<index>", "indices": _ranges(seeds)})
    record = {
        "styles": records,
        "count": count * len(infos),
        "size": size,
        "ground": ground,
        "excluded_sets": [p.name for p in exclude],
        "packages": _require_packages(),
        "pixels_sha256": digest.hexdigest(),
        "file_sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "command": _command(output, styles, count, first, size, ground, exclude, other_licences),
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _ranges(seeds: Sequence[int]) -> list[list[int]]:
    """Sorted numbers as closed ranges: [1, 2, 3, 7] -> [[1, 3], [7, 7]]."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and ranges[-1][1] == seed - 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ranges


def _command(
    output: Path,
    styles: Sequence[str],
    count: int,
    first: int,
    size: int,
    ground: str,
    exclude: Sequence[Path],
    other_licences: bool,
) -> str:
    words = ["python", "-m", "adafm_trainer.data.dicebear"]
    for style in ("source",) if tuple(styles) == SOURCE_STYLES else styles:
        words += ["--style", style]
    words += ["--count", str(count), "--first", str(first), "--size", str(size), "--ground", ground]
    for path in exclude:
        words += ["--exclude", path.name]
    words += ["--other-licences"] if other_licences else []
    return shlex.join([*words, "--output", output.name])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adafm_trainer.data.dicebear", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--style", action="append", required=True, help="a DiceBear style, or 'source' for the six source styles"
    )
    parser.add_argument("--count", type=int, required=True, help="different images per style")
    parser.add_argument("--first", type=int, default=0, help="first seed index (default 0)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    parser.add_argument("--ground", default="white", help="colour behind transparent pixels (default white)")
    parser.add_argument("--exclude", type=Path, action="append", default=[], help="zip whose images must not recur")
    parser.add_argument("--other-licences", action="store_true", help="also render styles that are not CC0")
    parser.add_argument("--output", type=Path, required=True, help="zip to write")
    args = parser.parse_args(arguments)
    record = write_set(
        args.output,
        [name for style in args.style for name in (SOURCE_STYLES if style == "source" else (style,))],
        args.count,
        first=args.first,
        size=args.size,
        ground=args.ground,
        exclude=args.exclude,
        other_licences=args.other_licences,
    )
    for style in record["styles"]:
        span = f"seeds {style['indices'][0][0]} to {style['indices'][-1][1]}"
        print(f"{style['style']}: {args.count} images, {span}, {style['licence']}, by {style['author']}")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
