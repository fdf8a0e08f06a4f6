"""The command within the test's own process: its libraries are loaded already."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import pytest

from spillway.cli.main import main


def refused(*words: str | Path) -> str:
    """What ``spillway WORDS`` says on stderr, ending with status 1. What is raised instead of told goes on."""
    with (
        mock.patch.object(sys, "argv", ["spillway", *map(str, words)]),
        contextlib.redirect_stderr(io.StringIO()) as said,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 1, said.getvalue()
    return said.getvalue()
