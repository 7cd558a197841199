"""Class labels of an image set: the first folder level of its file names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError


def folder_labels(names: Sequence[str], classes: int, where: str) -> tuple[Tensor, list[str]]:
    """Labels of images named ``class/...``: int64 ``[N]``, and the class names, sorted, which number them from 0.

    ``classes`` is the number that the networks are conditioned on, ``where`` the set's name for errors.

    Raises:
        DataError: an image lies outside of every class folder, or the number of folders is not ``classes``.
    """
    found = [name.split("/", 1)[0] if "/" in name else None for name in names]
    if outside := found.count(None):
        more = "" if outside == 1 else f" and {outside - 1} more"
        raise DataError(
            f"{where}: {names[found.index(None)]}{more} in no class folder; put every image into one folder for its "
            "class, or leave --labels out"
        )
    listed = sorted(set(found))
    if len(listed) != classes:
        shown = ", ".join(listed[:10]) + (" ..." if len(listed) > 10 else "")
        beyond = next((name for name, label in zip(names, found, strict=True) if label in listed[classes:]), None)
        first = "" if beyond is None else f", {beyond} is the first image beyond them"
        raise DataError(
            f"{where} has {len(listed)} class folders ({shown}) and the networks are conditioned on {classes} classes"
            f"{first}; give as many folders as classes, or --classes"
        )
    number = {name: index for index, name in enumerate(listed)}
    return torch.tensor([number[name] for name in found]), listed
