"""What a kind says about itself beside its schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError

from spillway.api.resources.common import Part, ResourceError


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `kubectl get`; priority 1 shows with `-o wide`."""

    name: str
    type: str
    json_path: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Scale:
    """Paths of the scale subresource."""

    spec_replicas: str
    status_replicas: str
    selector: str


class Metadata(Part):
    """What is read of an object's metadata."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: dict[str, str] = Field(default={})
    finalizers: tuple[str, ...] = ()
    deletion_timestamp: str | None = None


class Kind(Part):
    """Base of the resources."""

    plural: ClassVar[str]
    short_names: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    scale: ClassVar[Scale | None] = None
    metadata: Metadata = Field(exclude=True)

    @classmethod
    def read(cls, manifest: dict[str, Any]) -> Self:
        """The object in a manifest that the API server gave. Raises ResourceError with the first field at fault."""
        try:
            return cls.model_validate(manifest)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ResourceError(f"{cls.__name__}: {where}: {first['msg']}") from error
