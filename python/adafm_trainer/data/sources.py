"""Where image files come from: a folder or a zip archive, listed in a fixed order and read one file at a time.

An archive is never extracted, and one that tries to reach outside itself or to blow up is refused as a whole.
"""

from __future__ import annotations

import os
import stat
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import Protocol

from adafm_trainer.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_FILE_BYTES = 512 * 2**20
MAX_ARCHIVE_ENTRIES = 5_000_000
MAX_ARCHIVE_BYTES = 2**40
# Deflate reaches 1032:1 only on runs of one value; a picture of any use stays far below this.
MAX_RATIO = 300
_RATIO_FROM_BYTES = 2**20


class FileSource(Protocol):
    """A listing of files: ``names`` in order, ``ignored`` = files passed over because they do not look like images."""

    kind: str
    names: list[str]
    ignored: int

    def read(self, name: str) -> bytes:
        """The whole content of one file; raises OSError or a ``zipfile`` error where it cannot be read."""


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


class FolderSource:
    """Image files anywhere below a folder, sorted by their relative path. Links are followed, each folder once."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self._root = path
        self.names, self.ignored = [], 0
        visited = set()
        for folder, subfolders, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:
                subfolders.clear()
                continue
            visited.add(real)
            for file in files:
                name = Path(folder, file).relative_to(path).as_posix()
                if _is_image(name):
                    self.names.append(name)
                else:
                    self.ignored += 1
        self.names.sort()

    def read(self, name: str) -> bytes:
        file = self._root / name
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, more than the {MAX_FILE_BYTES} allowed for one file")
        return file.read_bytes()


class ZipSource:
    """Image files in a zip archive, sorted by name. Raises DataError for an archive that is not safe to read."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read as a zip archive: {error}") from error
        self._lock = threading.Lock()
        entries = [e for e in self._archive.infolist() if not e.is_dir()]
        _check_archive(path, entries)
        self.names = sorted(e.filename for e in entries if _is_image(e.filename))
        self.ignored = len(entries) - len(self.names)

    def read(self, name: str) -> bytes:
        with self._lock:
            return self._archive.read(name)


def _check_archive(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    def refuse(what: str) -> None:
        raise DataError(f"{path} is refused: {what}. Nothing was read from it; pack the images again as a plain zip")

    if len(entries) > MAX_ARCHIVE_ENTRIES:
        refuse(f"{len(entries)} entries, more than the {MAX_ARCHIVE_ENTRIES} allowed")
    if (total := sum(e.file_size for e in entries)) > MAX_ARCHIVE_BYTES:
        refuse(f"{total} bytes unpacked, more than the {MAX_ARCHIVE_BYTES} allowed")
    seen = set()
    for entry in entries:
        # orig_filename is the name as stored: zipfile cuts filename at a zero byte and turns backslashes on Windows.
        name = entry.orig_filename
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
            refuse(f"entry {name!r} has an absolute name")
        if ".." in parts:
            refuse(f"entry {name!r} points outside the archive")
        if "\\" in name or "\0" in name:
            refuse(f"entry {name!r} has a character that no portable name has")
        if name in seen:
            refuse(f"entry {name!r} comes twice")
        seen.add(name)
        if stat.S_ISLNK(entry.external_attr >> 16):
            refuse(f"entry {name!r} is a link")
        if entry.flag_bits & 0x1:
            refuse(f"entry {name!r} is encrypted")
        if entry.file_size > MAX_FILE_BYTES:
            refuse(f"entry {name!r} unpacks to {entry.file_size} bytes, more than the {MAX_FILE_BYTES} allowed")
        if entry.file_size > max(_RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size):
            refuse(f"entry {name!r} unpacks to {entry.file_size} bytes from {entry.compress_size}")


def open_source(path: Path) -> FileSource:
    """The listing of a folder or a zip archive. Raises DataError where ``path`` is neither, or holds no image file."""
    if path.is_dir():
        source: FileSource = FolderSource(path)
    elif path.is_file():
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is a file but not a zip archive: give a folder of images or a zip of images")
        source = ZipSource(path)
    else:
        raise DataError(f"{path} does not exist: give a folder of images or a zip of images")
    if not source.names:
        raise DataError(
            f"{path} holds no images: looked for {', '.join(SUFFIXES)} at any depth "
            f"and passed over {source.ignored} other files"
        )
    return source
