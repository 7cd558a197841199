"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere, and log.txt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO


class Console:
    """Lines go to the terminal and to ``log.txt``; the progress bar only to a terminal."""

    def __init__(self, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._log = log
        self._bar = self._stream.isatty()
        self._drawn = False

    def line(self, text: str) -> None:
        self._erase()
        print(text, file=self._stream, flush=True)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def progress(self, step: int, steps: int, seconds_per_step: float) -> None:
        """Redraw the bar; nothing where there is no terminal (the tick lines serve there)."""
        if not self._bar:
            return
        width = 32
        filled = width * step // steps
        left = duration((steps - step) * seconds_per_step)
        rate = 1 / max(seconds_per_step, 1e-9)
        text = f"[{'#' * filled}{'.' * (width - filled)}] {step}/{steps}  {rate:.1f} it/s  {left} left"
        print(f"\r{text}\x1b[K", end="", file=self._stream, flush=True)
        self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=self._stream)
            self._drawn = False


class SilentConsole(Console):
    """The console of a process that has nothing to say: rank 0 speaks for all."""

    def line(self, text: str) -> None:
        pass

    def progress(self, step: int, steps: int, seconds_per_step: float) -> None:
        pass


class Clock:
    """Wall time of a run over its interruptions, and the time of a step since the last call of ``lap``."""

    def __init__(self, spent: float = 0.0) -> None:
        self._spent, self._start = spent, time.monotonic()
        self._lap, self._lap_steps = self._start, 0

    def wall(self) -> float:
        return self._spent + time.monotonic() - self._start

    def step(self) -> None:
        self._lap_steps += 1

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self._lap) / max(self._lap_steps, 1)

    def lap(self) -> None:
        self._lap, self._lap_steps = time.monotonic(), 0


def duration(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    seconds = max(0, round(seconds))
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
