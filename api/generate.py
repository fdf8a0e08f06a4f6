"""Makes the Python code of the protos beside them. Usage: generate.py [TARGET], default: where the protos are.

Needs the dev extra. What it makes is checked in, so that nobody who only uses Spillway needs a protobuf compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc_tools
from google.api import client_pb2
from grpc_tools import protoc

SOURCE = Path(__file__).parent
WELL_KNOWN_PROTOS = Path(grpc_tools.__file__).parent / "_proto"
GOOGLEAPIS_PROTOS = Path(client_pb2.__file__).parents[2]


def generate(target: Path) -> None:
    """Compiles every proto under `api/` into `target`. Raises RuntimeError with protoc's status if that fails."""
    protos = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.proto"))
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    status = protoc.main(
        [
            "protoc",
            *(f"-I{path}" for path in (SOURCE, WELL_KNOWN_PROTOS, GOOGLEAPIS_PROTOS)),
            *plugins,
            *outputs,
            *protos,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
