"""Description of a GAN memory pair: the source it is made of, and what is added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import GPGAN_FAMILIES, ModelConfig

# What the class-conditional script of Cong et al. (NeurIPS 2020) puts in place of the source's label embedding.
PUBLISHED_EMBEDDING = 0.8393
CLASS_INITS = ("zero", "uniform")


@dataclass(frozen=True)
class MemoryConfig:
    """A pair in the form of GAN memory (Cong et al., NeurIPS 2020).

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    source: ModelConfig
    """Sizes of the GP-GAN pair that stays frozen."""
    classes: int = 0
    """Classes of a task, which enter G by the bias of its linear layer and are D's logits; 0: no labels, the source's
    label 0 throughout."""
    embedding: float | None = None
    """With ``classes``: constant in place of the source's embedding; None keeps that of the source's label 0."""
    class_init: str = "zero"
    """With ``classes``: start of the classes' biases and of D's logits. zero: the source's function; uniform: both as
    nn.Linear starts, as published."""
    normalise_d: bool = False
    """Whether D's filters are normalised when the source is loaded (as G's always are)."""
    components: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Low-rank storage: for each of G's convolutions that has stored components, their numbers for gamma and beta."""
    arch: str = "memory"

    def __post_init__(self) -> None:
        if self.arch != "memory":
            raise ValueError(f"arch is {self.arch!r}; a GAN memory's is 'memory'")
        if self.source.arch not in GPGAN_FAMILIES:
            raise ValueError(
                f"the source is of arch {self.source.arch!r}; GAN memory is made of one of {', '.join(GPGAN_FAMILIES)}"
            )
        if self.classes < 0:
            raise ValueError(f"classes is {self.classes}; it must not be negative (0: no classes of its own)")
        if self.class_init not in CLASS_INITS:
            raise ValueError(f"class_init is {self.class_init!r}; expected {' or '.join(CLASS_INITS)}")
        if self.embedding is not None and not (self.classes and self.source.embed):
            raise ValueError(
                f"embedding is {self.embedding}; it stands in for the embedding of a source that has one (embed is "
                f"{self.source.embed}), in a class-conditional memory (classes is {self.classes})"
            )
        for name, pair in self.components.items():
            if len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"components of {name} is {pair}; expected two numbers, for gamma and beta")

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def z_dim(self) -> int:
        return self.source.z_dim

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; the source's are nested."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["source"] = self.source.to_json()
        values["components"] = {name: list(pair) for name, pair in self.components.items()}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MemoryConfig:
        """Inverse of ``to_json``; fields left out take their default.

        Raises:
            ValueError: no source, an unknown field, or an inadmissible value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or "source" not in values:
            raise ValueError("the description of a GAN memory lacks its source")
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"unknown field {', '.join(unknown)} in the model description; known: {', '.join(known)}")
        components = {name: tuple(pair) for name, pair in values.get("components", {}).items()}
        return cls(**{**values, "source": ModelConfig.from_json(values["source"]), "components": components})
