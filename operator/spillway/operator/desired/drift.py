"""Whether an object of the cluster still is what it should be, defaults of the API server aside."""

from __future__ import annotations

from typing import Any

from spillway.api.resources import quantity_bytes
from spillway.api.resources.common import ResourceError

_AMOUNTS = frozenset({"requests", "limits"})


def holds(observed: Any, desired: Any) -> bool:
    """Whether `observed` has all of `desired`: it may have further fields, but lists agree in length.

    What is false, zero or no text the server may leave out. Amounts of memory and storage are compared as numbers,
    since it writes "1024Mi" as "1Gi".
    """
    if observed is None:
        return not desired and not isinstance(desired, dict | list)
    if isinstance(desired, dict):
        return isinstance(observed, dict) and all(
            _same_amounts(observed.get(key) or {}, value) if key in _AMOUNTS else holds(observed.get(key), value)
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return (
            isinstance(observed, list)
            and len(observed) == len(desired)
            and all(holds(*pair) for pair in zip(observed, desired, strict=True))
        )
    return bool(observed == desired)


def _same_amounts(observed: dict[str, str], desired: dict[str, str]) -> bool:
    return all(
        name in observed and _amount(name, observed[name]) == _amount(name, amount) for name, amount in desired.items()
    )


def _amount(name: str, amount: str) -> str | int:
    try:
        return quantity_bytes(amount) if name in ("memory", "storage") else amount
    except ResourceError:  # written by somebody else, in a way of his own: then it is another amount
        return amount
