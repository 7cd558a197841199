"""A measured value together with what it was measured with, so that unlike values are never compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class MetricValue:
    """One value with an interval of about 95 % (``low``, ``high``; None where there is none) and its protocol.

    ``extractor`` and ``extractor_hash`` are None for a value computed from bare features.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n_fake: int | None = None
    n_real: int | None = None
    extractor: str | None = None
    extractor_hash: str | None = None
    note: str = ""

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict) -> MetricValue:
        return cls(**record)

    def tagged(self, **fields: object) -> MetricValue:
        return replace(self, **fields)

    def minus(self, other: MetricValue) -> float:
        """``self.value - other.value``. Raises ValueError where the two were measured differently."""
        check_comparable(self, other)
        return self.value - other.value


def check_comparable(first: MetricValue, *others: MetricValue) -> None:
    """Raises ValueError unless all values come from the same extractor (by hash) and the same numbers of images."""
    for other in others:
        if first.extractor_hash != other.extractor_hash:
            raise ValueError(
                f"values from different feature extractors cannot be compared: {first.extractor} "
                f"({_short(first.extractor_hash)}) and {other.extractor} ({_short(other.extractor_hash)}); "
                "measure both with the same one"
            )
        if (first.n_fake, first.n_real) != (other.n_fake, other.n_real):
            raise ValueError(
                f"values from different numbers of images cannot be compared: {first.n_fake} against {first.n_real} "
                f"and {other.n_fake} against {other.n_real}; measure both with the same numbers"
            )


def _short(digest: str | None) -> str:
    return "no hash" if digest is None else digest[:12]
