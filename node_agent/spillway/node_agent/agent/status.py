"""What an agent tells the gateway of itself, from the engine's counters."""

from __future__ import annotations

from spillway.api.worker.v1.worker_pb2 import AgentStatus
from spillway.node_agent.engine import EngineStats


def agent_status(stats: EngineStats) -> AgentStatus:
    """The engine's figures as they go over the wire."""
    tiers = [
        AgentStatus.Tier(
            name=name,
            bytes=tier.bytes,
            budget_bytes=tier.budget_bytes,
            hits=tier.hits,
            misses=sum(tier.misses.values()),
        )
        for name, tier in (stats.store.tiers.items() if stats.store is not None else ())
    ]
    return AgentStatus(
        pool_blocks=stats.pool_blocks,
        pool_used_blocks=stats.pool_used,
        pool_cached_blocks=stats.pool_cached,
        prompt_tokens=stats.scheduler.prompt_tokens,
        reused_tokens=stats.scheduler.reused_tokens,
        generated_tokens=stats.generated_tokens,
        tiers=tiers,
    )
