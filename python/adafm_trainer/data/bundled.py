"""The image sets that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from adafm_trainer.errors import UsageError

NAMES = ("open-peeps-train", "open-peeps-heldout", "notionists-train", "notionists-heldout")


def bundled(name: str) -> Path:
    """Path of a bundled set, a zip of PNG files for ``load_image_set``.

    Names: "open-peeps-train" (100 images), "open-peeps-heldout" (500 others), and the same two of "notionists". What a
    set holds and how it was made stands in the JSON file beside it. Raises UsageError for another name.
    """
    if name not in NAMES:
        raise UsageError(f"no bundled image set is called {name!r}; there are: {', '.join(NAMES)}")
    path = Path(str(resources.files("adafm_trainer") / "assets" / "images" / f"{name}.zip"))
    if not path.is_file():
        raise UsageError(f"the bundled set {name!r} is missing from this installation: install the package again")
    return path
