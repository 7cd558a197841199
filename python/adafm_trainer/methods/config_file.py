"""config.yaml: a run's settings, its method and the description of its networks, written and read back."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .config import TrainConfig


def write_config(path: Path, method: str, config: TrainConfig, model: dict) -> None:
    """Write ``key: value`` lines, values as JSON (a subset of YAML), that ``read_config`` reads back."""
    lines = [f"method: {json.dumps(method)}", f"model: {json.dumps(model)}"]
    lines += [f"{field.name}: {json.dumps(getattr(config, field.name))}" for field in dataclasses.fields(config)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_config(path: Path) -> tuple[str, TrainConfig, dict]:
    """Read what ``write_config`` wrote: method, settings, model description.

    Raises:
        UsageError: an unknown, repeated or missing key, or a value that is not JSON; with file, line and nearest name.
    """
    method, values, model = read_recipe(path)
    required = [field.name for field in dataclasses.fields(TrainConfig) if field.default is dataclasses.MISSING]
    missing = [] if model is not None else ["model"]
    if missing := [*missing, *(name for name in required if name not in values)]:
        raise UsageError(f"{path}: missing {', '.join(missing)}")
    assert model is not None
    return method, TrainConfig(**values), model


def read_recipe(path: Path) -> tuple[str, dict[str, Any], dict | None]:
    """Method, settings and, where the file has one, model description of a file in which only ``method`` has to be.

    Raises:
        UsageError: an unknown or repeated key, no method, or a value that is not JSON; with file, line, nearest name.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)} | {"method", "model"}
    values: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, text = line.partition(":")
        if not separator:
            raise UsageError(f"{path}:{number}: expected `key: value`, found {line!r}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            raise UsageError(f"{path}:{number}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in values:
            raise UsageError(f"{path}:{number}: key {key!r} appears twice")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: the value of {key!r} is not JSON: {text.strip()!r}") from error
    if "method" not in values:
        raise UsageError(f"{path}: missing method")
    method, model = values.pop("method"), values.pop("model", None)
    if not isinstance(method, str) or not (model is None or isinstance(model, dict)):
        raise UsageError(f"{path}: `method` must be a string and `model` a mapping")
    return method, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}, model
