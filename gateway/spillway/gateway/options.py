"""How to open a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spillway.api.lines import MAX_LINE_BYTES

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Everything beside the input that a result depends on; a job goes on only under the same ones.

    `model` names the weights (by digest or revision), `defaults` what applies where a line is silent.
    `restart`, the one option that no result depends on, throws away what an earlier run left, its output included.
    """

    model: str
    dtype: str
    seed: int = 0
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    max_line_bytes: int = MAX_LINE_BYTES
    restart: bool = False

    def identity(self) -> dict[str, Scalar]:
        """What results depend on, on one level, so that differences can be told by name."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.seed,
            "max_line_bytes": self.max_line_bytes,
            **{f"defaults.{name}": value for name, value in sorted(self.defaults.items())},
        }
