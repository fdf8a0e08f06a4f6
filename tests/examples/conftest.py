"""The examples and the benchmark are scripts: put their folders where they find their neighbours."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("examples", "examples/documents", "examples/recall", "benchmarks", "benchmarks/peers")
sys.path[:0] = [str(CHECKOUT / folder) for folder in FOLDERS]
