"""What a run directory says, read for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass
class RunRecord:
    """Everything the report shows. Parts that a run has not written are empty."""

    root: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    manifest: dict[str, Any]
    blocks: list[dict]
    stats: list[dict]
    warnings: list[dict]
    metrics: list[dict]
    comparison: list[dict]
    notes: list[str] = field(default_factory=list)


def read_run(root: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        DataError: a file that is there cannot be understood; with file and line.
    """
    notes: list[str] = []
    rows = _rows(root / "stats.jsonl", notes)
    return RunRecord(
        root=root,
        config=_config(root / "config.yaml"),
        environment=_json(root / "environment.json", {}),
        manifest=_json(root / "data_manifest.json", {}),
        blocks=_json(root / "blocks.json", []),
        stats=[row for row in rows if "event" not in row],
        warnings=[row for row in rows if row.get("event") == "warning"],
        metrics=_rows(root / "metrics.jsonl", notes),
        comparison=_json(root / "comparison.json", []),
        notes=notes,
    )


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {key: json.loads(value) for key, _, value in pairs}


def _rows(path: Path, notes: list[str]) -> list[dict]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                notes.append(f"the last line of {path.name} is cut off: the run was killed while it wrote it")
                break
            raise DataError(f"{path}:{number}: not a row of a run: {line[:60]!r}") from error
        rows.append(row)
    return rows
