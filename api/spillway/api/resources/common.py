"""What the resources share: base models, quantities, conditions, rules."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from spillway.api.errors import SpillwayError

GROUP = "spillway.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

_UNITS = {f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGTP", 1)} | {
    letter: 10 ** (3 * power) for power, letter in enumerate(("", "k", "M", "G", "T", "P"))
}

Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,11}(Ki|Mi|Gi|Ti)$", max_length=14)]
"""A positive number of bytes in a binary unit, "512Mi"."""
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
"""Name of another object in the same namespace."""
SecretKey = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]


class ResourceError(SpillwayError):
    """A resource, or an object that Kubernetes gave us, cannot be understood."""


def quantity_bytes(quantity: str) -> int:
    """Bytes of a Kubernetes quantity with a binary unit, a decimal one, or none. Raises ResourceError."""
    found = re.fullmatch(r"([0-9]+)([KMGTP]i|[kMGTPm]?)", quantity)
    if found is None:
        raise ResourceError(f"{quantity!r} is not a quantity of bytes")
    number, unit = int(found[1]), found[2]
    return number // 1000 if unit == "m" else number * _UNITS[unit]


def rule(expression: str, message: str) -> dict[str, str]:
    """A CEL rule of the CRD: `message` is what people read when `expression` is false."""
    return {"rule": expression, "message": message}


class Part(BaseModel):
    """Base of everything inside a resource: camelCase in YAML, immutable, unknown fields left to the server."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


def rules(*each: dict[str, str]) -> ConfigDict:
    """Model configuration that carries CEL rules into the CRD."""
    extra: dict[str, Any] = {"x-kubernetes-validations": list(each)}
    return ConfigDict(json_schema_extra=extra)


def named_like_a_host() -> ConfigDict:
    """Configuration of a kind whose name becomes part of host names, with letters left for what follows it."""
    expression = "self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
    return rules(
        rule(expression, "the name takes up to 50 lower-case letters, digits and dashes, and begins with a letter")
    )


class Condition(Part):
    """One thing that is true of the object or not, in the shape all of Kubernetes uses."""

    type: str = Field(max_length=64, description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=64, description="One word for programs.")
    message: str = Field(default="", max_length=1024, description="One sentence for people.")
    last_transition_time: str = Field(
        description="When `status` last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int = Field(default=0, ge=0, description="The generation of the spec this was said about.")


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]
