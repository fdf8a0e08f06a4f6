"""What can go wrong with a test cluster."""

from __future__ import annotations


class ClusterError(Exception):
    """A part of the test cluster did not come up or did not obey; the message holds the end of its log."""


class CannotRunHere(ClusterError):
    """This machine lacks something that the test cluster stands on; the message says what."""
