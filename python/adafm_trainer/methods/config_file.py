"""config.yaml: a run's settings, its method and the description of its networks, written and read back."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path

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
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values: dict[str, object] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, text = line.partition(":")
        if not separator:
            raise UsageError(f"{path}:{number}: expected `key: value`, found {line!r}")
        if key not in known and key not in ("method", "model"):
            near = difflib.get_close_matches(key, [*known, "method", "model"], 1)
            raise UsageError(f"{path}:{number}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in values:
            raise UsageError(f"{path}:{number}: key {key!r} appears twice")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: the value of {key!r} is not JSON: {text.strip()!r}") from error
    required = ["method", "model", *(n for n, f in known.items() if f.default is dataclasses.MISSING)]
    if missing := [name for name in required if name not in values]:
        raise UsageError(f"{path}: missing {', '.join(missing)}")
    method, model = values.pop("method"), values.pop("model")
    if not isinstance(method, str) or not isinstance(model, dict):
        raise UsageError(f"{path}: `method` must be a string and `model` a mapping")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return method, TrainConfig(**values), model
