"""Memory that a peer reads by NIXL, one side at a time. What both sides make of it: test_peer_tier."""

import time

import numpy as np
import pytest
from kv_factories import content

from spillway.kvstore.errors import PeerError

pytest.importorskip("nixl", reason="NIXL is not installed", exc_type=ImportError)

from spillway.kvstore.peer.fabric import SLOTS, Landing, Slots

PATIENCE_S = 60
MOST_BYTES = 40_000


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def test_a_slot_stays_as_it_is_until_all_others_were_used() -> None:
    slots = Slots(MOST_BYTES)
    landing = Landing(slots.card(), MOST_BYTES)
    placed = [(slots.place(content(number, MOST_BYTES - number)), number) for number in range(SLOTS)]
    for start, number in placed:
        assert np.array_equal(landing.read(start, MOST_BYTES - number, soon()), content(number, MOST_BYTES - number))
    assert slots.place(content(9, 100)) == placed[0][0]
    landing.close()
    slots.close()


def test_a_peer_that_is_gone_is_an_error_in_time() -> None:
    slots = Slots(MOST_BYTES)
    landing = Landing(slots.card(), MOST_BYTES)
    start = slots.place(content(1, MOST_BYTES))
    landing.read(start, MOST_BYTES, soon())
    slots.close()
    with pytest.raises((PeerError, TimeoutError)):
        landing.read(start, MOST_BYTES, time.monotonic() + 2)
    landing.close()


def test_a_card_that_is_none_is_an_error() -> None:
    with pytest.raises(PeerError):
        Landing(b"no card at all", MOST_BYTES)
