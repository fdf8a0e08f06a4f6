"""What can go wrong between the operator, a cluster and a gateway."""

from __future__ import annotations

from spillway.api.errors import SpillwayError


class ConfigError(SpillwayError):
    """What the operator was told at its start cannot be used."""


class GatewayError(SpillwayError):
    """The gateway did not do what was asked; it is asked again."""


class ClusterError(SpillwayError):
    """The API server did not do what was asked."""


class UnreachableError(ClusterError):
    """No answer, none for now, or no credentials to ask with."""


class NotFoundError(ClusterError):
    """The object does not exist."""


class ConflictError(ClusterError):
    """The object exists already, or was changed since it was read."""


class RefusedError(ClusterError):
    """Invalid or forbidden: the message says which."""
