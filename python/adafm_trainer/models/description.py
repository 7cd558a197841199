"""Descriptions of network pairs as JSON: what every family's dataclass shares."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass ``kind`` from a dictionary of its fields; fields left out take their default.

    Raises:
        ValueError: an unknown field, a required field that is absent, or an inadmissible value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"the model description is a {type(values).__name__}; expected a JSON object")
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown field {', '.join(unknown)} in the model description; known: {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"the model description lacks {', '.join(missing)}")
    return kind(**values)


def check_counts(description: Any, **least: int) -> None:
    """Raise ValueError for the first named field that is not an integer of at least its bound."""
    for name, bound in least.items():
        value = getattr(description, name)
        if type(value) is not int or value < bound:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {bound}")
