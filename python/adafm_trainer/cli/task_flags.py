"""The repeated ``--data NAME=FOLDER`` of several tasks, taken out of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..trainer.tasks import METHOD, Task


def take_tasks(method: str, argv: Sequence[str]) -> tuple[list[Task], list[str]]:
    """Tasks that ``argv`` names, and ``argv`` with the first task's images in place of theirs.

    One ``--data`` without a name is an ordinary run: no tasks, and ``argv`` as it is. ``NAME=FOLDER`` is a name unless
    a path is called so.

    Raises:
        UsageError: several ``--data`` for another method, one of them without a name; an ``--eval-data`` without a
            name, of a task that there is not, or a second one of the same task.
    """
    data, rest = _take("--data", argv)
    if method != METHOD or not data:
        if len(data) > 1:
            raise UsageError(f"--data is given {len(data)} times; `adafm train {method}` takes one set of images")
        return [], list(argv)
    named = [_named(value) for value in data]
    if len(data) == 1 and named[0] is None:
        return [], list(argv)
    if None in named:
        raise UsageError(
            f"--data {data[named.index(None)]}: with several tasks each is named, as --data NAME=FOLDER; the name is "
            "what the bank calls it"
        )
    held, rest = _take("--eval-data", rest)
    names = [name for name, _ in named]
    evaluation: dict[str, str] = {}
    for value in held:
        pair = _named(value)
        if pair is None or pair[0] not in names or pair[0] in evaluation:
            raise UsageError(
                f"--eval-data {value}: with several tasks give each its own held-out images once, as NAME=FOLDER with "
                f"NAME one of {', '.join(names)}; or use --holdout"
            )
        evaluation[pair[0]] = pair[1]
    tasks = [Task(name, folder, evaluation.get(name)) for name, folder in named]
    return tasks, [*rest, "--data", tasks[0].data]


def _take(flag: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Values of ``flag`` in ``argv``, and the rest."""
    values, rest, parts = [], [], iter(argv)
    for part in parts:
        if part == flag:
            value = next(parts, None)
            if value is None:
                raise UsageError(f"{flag} at the end of the command has no value; give a folder or NAME=FOLDER")
            values.append(value)
        elif part.startswith(f"{flag}="):
            values.append(part.partition("=")[2])
        else:
            rest.append(part)
    return values, rest


def _named(value: str) -> tuple[str, str] | None:
    name, equals, folder = value.partition("=")
    if not equals or Path(value).expanduser().exists():
        return None
    if not folder:
        raise UsageError(f"{value!r} names a task and no images; give NAME=FOLDER")
    return name, folder
