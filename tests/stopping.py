"""Stopping a run, or one of several, at a chosen step."""

from __future__ import annotations

import signal

import pytest
from adafm_trainer.trainer.loop import Trainer


class Killed(Exception):
    """What ends a run as a kill does: at once, without a checkpoint."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, *, kill: bool = False) -> None:
    """SIGTERM after ``count`` training steps from now, of however many runs; ``kill``: Killed before the next one."""
    step, taken = Trainer._train_step, [0]

    def counted(trainer: Trainer) -> None:
        if kill and taken[0] == count:
            raise Killed
        step(trainer)
        taken[0] += 1
        if not kill and taken[0] == count:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", counted)
