"""What the processes of a run tell each other outside of collectives: failures, signs of life, finished work.

It goes through the key-value store of the rendezvous, which `torchrun` holds in a process of its own, so a message
outlives the process that left it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from ..errors import AdafmError, PeerError

_FAILURE, _BEAT, _LEFT = "failure", "beat", "left"
_LONGEST_PAUSE = 0.05


class Peers:
    """One process's view of the others; ``timeout`` is the number of seconds of silence after which rank 0 is lost."""

    def __init__(self, store: distributed.Store, rank: int, timeout: float) -> None:
        self._store, self._rank, self._timeout = store, rank, timeout

    def record(self, error: BaseException) -> None:
        """Leave word why this process stops; the first word of any process stands.

        An error with a message of its own leaves the message, any other its traceback.
        """
        known = isinstance(error, AdafmError)
        text = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
        word = {"rank": self._rank, "text": text, "exit_code": error.exit_code if known else 1}
        try:
            self._store.compare_set(_FAILURE, "", json.dumps(word))
        except distributed.DistError as gone:
            self._alone(gone)

    def lost(self, what: str, reason: str) -> PeerError:
        """The error of this process when ``what`` could not be done together: the peer's own words if it left any."""
        try:
            word = self._word()
        except distributed.DistError as error:
            # The store went down with the process that held it: nobody can have left word any more.
            word, reason = None, f"{reason}; the rendezvous store is gone too ({_first_line(error)})"
        if word is None:
            return PeerError(
                f"rank {self._rank} stops at {what}: another process is gone or did not answer within "
                f"--dist-timeout {self._timeout:g} seconds ({reason})"
            )
        return PeerError(
            f"rank {self._rank} stops because rank {word['rank']} failed: {word['text']}",
            rank=word["rank"],
            exit_code=word["exit_code"],
        )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show the waiting processes that this one is alive, however long the block takes."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(min(5.0, self._timeout / 4)):
                self._store.add(_BEAT, 1)

        thread = threading.Thread(target=beat, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def announce(self, key: str) -> None:
        """Say that ``key`` has come about."""
        self._store.set(key, b"")

    def wait(self, key: str, what: str) -> None:
        """Wait until ``key`` is announced.

        Raises:
            PeerError: a process left word that it failed, or rank 0 gave no sign of life for the timeout.
        """
        beats, since, pause = -1, time.monotonic(), 0.001
        try:
            while not self._store.check([key]):
                if self._word() is not None:
                    raise self.lost(what, "")
                now, count = time.monotonic(), self._store.add(_BEAT, 0)
                if count != beats:
                    beats, since = count, now
                elif now - since > self._timeout:
                    raise self.lost(what, "rank 0 gave no sign of life")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        except distributed.DistError as error:
            raise self.lost(what, _first_line(error)) from error

    def leave(self, error: BaseException | None) -> None:
        """Let rank 0 go first, because `torchrun` ends every process as soon as one has failed.

        Only where rank 0 is known to be on its way out too: when all stop alike (``error.alike``), or it left word.
        """
        try:
            if self._rank == 0:
                self.announce(_LEFT)
            elif getattr(error, "alike", False) or (isinstance(error, PeerError) and error.rank == 0):
                deadline = time.monotonic() + self._timeout
                while not self._store.check([_LEFT]) and time.monotonic() < deadline:
                    time.sleep(_LONGEST_PAUSE)
        except distributed.DistError as gone:
            self._alone(gone)

    def _alone(self, gone: distributed.DistError) -> None:
        """The process that held the store has ended before this one: nobody is left to tell, or to wait for."""
        print(f"rank {self._rank}: the rendezvous store is gone ({_first_line(gone)})", file=sys.stderr)

    def _word(self) -> dict | None:
        return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
