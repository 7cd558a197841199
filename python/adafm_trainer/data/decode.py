"""One image file to one array of the asked size: colour modes, transparency, rotation, resizing.

Everything that can be wrong with a file ends as BadImage with a reason a person can act on.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageOps

from adafm_trainer.errors import UsageError

FITS = ("crop", "pad", "stretch")
ALPHAS = ("white", "black", "drop", "error")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# An explicit list keeps Pillow from trying formats that start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The shorter side may be magnified up to this often; less than that is an icon or a tracking pixel, not a picture.
_MAX_MAGNIFICATION = 8
_MAX_ASPECT = 20


class BadImage(Exception):
    """A file that cannot serve as an image; the message is the reason alone, without the name."""


@dataclass(frozen=True)
class DecodeSettings:
    """How files become arrays.

    fit: "crop" resizes the shorter side and takes the centre (the authors' preparation, with ``resample="bilinear"``),
    "pad" resizes the longer side and fills up, "stretch" resizes both. alpha: what transparent pixels become; "drop"
    ignores transparency, "error" rejects images that have any. max_pixels: checked before a file is decoded.
    """

    size: int
    channels: int = 3
    fit: str = "crop"
    alpha: str = "white"
    resample: str = "lanczos"
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        for name, allowed in (("fit", FITS), ("alpha", ALPHAS), ("resample", tuple(FILTERS)), ("channels", (1, 3))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.size < 1 or self.max_pixels < 1:
            raise UsageError(f"size and max_pixels must be at least 1, got {self.size} and {self.max_pixels}")

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Decoded:
    """Pixels uint8 ``[C, size, size]``, with the size and colour mode the file had."""

    pixels: np.ndarray
    width: int
    height: int
    mode: str


def decode(data: bytes, settings: DecodeSettings) -> Decoded:
    """Decodes one file. Raises BadImage for a file that is damaged, too large, too small or of an unknown format."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        _check_size(width, height, settings)
        image.load()
        mode = image.mode
        flat = _flatten(ImageOps.exif_transpose(image), settings)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than the {settings.max_pixels} pixels allowed") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    # Pillow's decoders raise nearly every built-in class on damaged input; the reason is kept and the file set aside.
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error
    pixels = np.array(_fit(flat, settings))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Decoded(np.ascontiguousarray(pixels), width, height, mode)


def _check_size(width: int, height: int, settings: DecodeSettings) -> None:
    if width * height > settings.max_pixels:
        raise BadImage(f"{width}x{height}, more than the {settings.max_pixels} pixels allowed")
    short, long = sorted((width, height))
    if short < 1 or short * _MAX_MAGNIFICATION < settings.size:
        raise BadImage(f"{width}x{height} pixels, too small to be enlarged to {settings.size}")
    if long > short * _MAX_ASPECT:
        raise BadImage(f"{width}x{height} pixels, longer than {_MAX_ASPECT} times its width or height")


def _flatten(image: Image.Image, settings: DecodeSettings) -> Image.Image:
    """To mode RGB or L, without transparency and without 16-bit values."""
    target = "RGB" if settings.channels == 3 else "L"
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"integer pixels from {values.min()} to {values.max()} have no known range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert(target)
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if settings.alpha == "error" and image.getchannel("A").getextrema()[0] < 255:
            raise BadImage("has transparent pixels, and alpha is 'error': choose white, black or drop")
        if settings.alpha in ("white", "black"):
            ground = Image.new("RGBA", image.size, settings.alpha)
            ground.alpha_composite(image)
            image = ground
    return image.convert("RGB").convert(target)


def _fit(image: Image.Image, settings: DecodeSettings) -> Image.Image:
    size, filter_ = settings.size, FILTERS[settings.resample]
    width, height = image.size
    if settings.fit == "stretch":
        return image.resize((size, size), filter_)
    if settings.fit == "pad":
        scaled = image.resize(_scaled(width, height, size / max(width, height)), filter_)
        canvas = Image.new(image.mode, (size, size), "black" if settings.alpha == "black" else "white")
        canvas.paste(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
        return canvas
    # Longer side truncated, offsets rounded: the arithmetic of the usual resize-then-centre-crop transform.
    short = min(width, height)
    scaled = image.resize((size * width // short, size * height // short), filter_)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    return scaled.crop((left, top, left + size, top + size))


def _scaled(width: int, height: int, factor: float) -> tuple[int, int]:
    return max(1, round(width * factor)), max(1, round(height * factor))
