"""Errors a user can act on. Each class carries the exit code that the command line returns for it."""

from __future__ import annotations


class AdafmError(Exception):
    """Base of every error that is the caller's to mend: the message names the value, the place and the remedy."""

    exit_code = 1
    alike = False
    """Whether every process of a run on several devices raises this error at the same point."""


class UsageError(AdafmError):
    """A flag or a configuration value that cannot be used."""

    exit_code = 2


class DataError(AdafmError):
    """A training or evaluation set that cannot be read or is too damaged to use."""

    exit_code = 3


class SourceError(AdafmError):
    """A source network or checkpoint that does not fit what was asked."""

    exit_code = 4


class DivergedError(AdafmError):
    """Training stopped because its numbers or its pictures were lost."""

    exit_code = 5
    alike = True


class DiskError(AdafmError):
    """A file that could not be written; the last good checkpoint is intact."""

    exit_code = 6


class Interrupted(AdafmError):
    """Stopped by a signal after a whole step; the run can be resumed exactly."""

    exit_code = 75
    alike = True


class PeerError(AdafmError):
    """Another process of this run failed or is gone: ``rank`` that left word of it, with the exit code of its error."""

    def __init__(self, message: str, rank: int | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code
