"""A gateway with short leases, until it is killed: DATA PORT [TOKENS]."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from spillway.gateway.service.access import Access
from spillway.gateway.service.coordinator import ServiceConfig
from spillway.gateway.service.leases import LeaseRules
from spillway.gateway.service.server import gateway


async def serve(data: Path, port: int, tokens: Path | None) -> None:
    config = ServiceConfig(data, leases=LeaseRules(ttl_s=3, max_attempts=10))
    access = Access() if tokens is None else Access.load(tokens)
    async with gateway(config, f"127.0.0.1:{port}", access):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None))
