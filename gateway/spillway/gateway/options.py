"""How to open a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spillway.api.errors import ErrorCode, LineError
from spillway.api.lines import MAX_LINE_BYTES, BatchLine, line_too_long, parse_line

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class LineRules:
    """What a line must be to run. `url` and `model` are the only ones that lines may name; empty: any."""

    max_bytes: int = MAX_LINE_BYTES
    url: str = ""
    model: str = ""

    @classmethod
    def named(cls, identity: Mapping[str, Scalar]) -> LineRules:
        """The rules of a job whose options have this `identity`."""
        limit, url, model = (identity.get(name) for name in ("max_line_bytes", "only_url", "only_model"))
        return cls(int(limit or MAX_LINE_BYTES), str(url or ""), str(model or ""))

    def check(self, raw: bytes | None, line_number: int) -> BatchLine | LineError:
        """A line as it stands in the input; None if it was too long to be read."""
        if raw is None:
            return line_too_long(line_number, self.max_bytes)
        line = parse_line(raw, line_number, self.max_bytes)
        if isinstance(line, LineError):
            return line
        if self.url and line.url != self.url:
            message = f"the batch is for {self.url}"
            return LineError(ErrorCode.INVALID_REQUEST, message, line_number, "url", line.custom_id)
        if self.model and line.body.model != self.model:
            message = f"the batch runs on the model of its first valid line, {self.model[:100]!r}: use one file a model"
            return LineError(ErrorCode.INVALID_PARAMETER, message, line_number, "model", line.custom_id)
        return line


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Everything beside the input that a result depends on; a job goes on only under the same ones.

    `model` names the weights (by digest or revision), `defaults` what applies where a line is silent.
    `only_url` and `only_model`, where given, have lines refused that name others. `restart`, the one option that no
    result depends on, throws away what an earlier run left, its output included.
    """

    model: str
    dtype: str
    seed: int = 0
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    max_line_bytes: int = MAX_LINE_BYTES
    only_url: str = ""
    only_model: str = ""
    restart: bool = False

    @property
    def rules(self) -> LineRules:
        """What intake asks of each line."""
        return LineRules(self.max_line_bytes, self.only_url, self.only_model)

    def identity(self) -> dict[str, Scalar]:
        """What results depend on, on one level, so that differences can be told by name."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.seed,
            "max_line_bytes": self.max_line_bytes,
            **{name: value for name in ("only_url", "only_model") if (value := getattr(self, name))},
            **{f"defaults.{name}": value for name, value in sorted(self.defaults.items())},
        }
