"""Settings that count only before torch starts its threads, and checkpoints that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores already; tiny models gain nothing from two

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What a shell passes on to what it runs in the background: the commands under test would not feel Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["testcluster.fixtures"]  # control_plane


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(family, **overrides) -> Path``: made once a session for each set of arguments.

    `overrides` are those of `tiny_models.save_checkpoint`: seed, dtype, shard_size, and fields of the config. Do not
    change what it returns: others use it too.
    """
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        from tiny_models import save_checkpoint

        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(family), family, **overrides)
        return made[key]

    return make
