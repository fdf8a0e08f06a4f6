"""What can go wrong between the operator and a cluster."""

from __future__ import annotations

from spillway.api.errors import SpillwayError


class ClusterError(SpillwayError):
    """The API server did not do what was asked."""


class UnreachableError(ClusterError):
    """No answer, or no credentials to ask with."""


class NotFoundError(ClusterError):
    """The object does not exist."""


class ConflictError(ClusterError):
    """The object exists already, or was changed since it was read."""


class RefusedError(ClusterError):
    """Invalid, forbidden, or the server is in trouble: the message says which."""
