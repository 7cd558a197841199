"""Ctrl-C and SIGTERM: finish the step, save, leave; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Context in which the first SIGINT or SIGTERM sets ``requested`` and a second one ends the process at once.

    A request that is inside another one counts for both.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        outer = getattr(self._previous[number], "__self__", None)
        if isinstance(outer, StopRequest):
            outer.requested = True
