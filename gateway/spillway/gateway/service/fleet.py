"""Which agents there are and how they fare: the last word of each, and the sum of all over the last hour.

Pure bookkeeping: no clock, no I/O; whoever calls says what time it is. Memory is bounded by the number of agents that
were heard of in the last minutes, and by the length of the history.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FORGET_S = 600.0
"""An agent that has been silent for so long is forgotten."""
MAX_AGENTS = 4096
SAMPLE_S = 15.0
MAX_SAMPLES = 240


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier of an agent's KV store. `hits` and `misses` are blocks, since the agent was started."""

    bytes: int = 0
    budget_bytes: int = 0
    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What an agent tells of itself. Blocks of the device pool are of now; tokens since the agent was started."""

    pool_blocks: int = 0
    pool_used_blocks: int = 0
    pool_cached_blocks: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    tiers: dict[str, TierStatus] = field(default_factory=dict)


@dataclass(slots=True)
class Agent:
    """An agent as the gateway knows it. `heard_s` is monotonic time."""

    name: str
    model: str
    heard_s: float
    status: AgentStatus | None = None


@dataclass(slots=True)
class Sample:
    """All agents over one stretch of time that ended at `end_s`. Bytes are of its end; the rest happened in it."""

    end_s: float
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    tier_bytes: dict[str, int] = field(default_factory=dict)
    tier_hits: dict[str, int] = field(default_factory=dict)


class Fleet:
    """Agents by name. Those beyond `MAX_AGENTS` are not noted (counted in `overlooked`)."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._models: set[str] = set()
        self._current = Sample(0.0)
        self.history: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self.overlooked = 0

    @property
    def agents(self) -> list[Agent]:
        """Those that were heard of lately, by name."""
        return sorted(self._agents.values(), key=lambda agent: agent.name)

    @property
    def models(self) -> list[str]:
        """Names of all models that agents have served since the start, sorted."""
        return sorted(self._models)

    def hear(self, name: str, model: str, status: AgentStatus | None, now_s: float) -> None:
        """An agent called; `status` is None if it said nothing of itself."""
        agent = self._agents.get(name)
        if agent is None:
            if len(self._agents) >= MAX_AGENTS:
                self.overlooked += 1
                return
            agent = self._agents[name] = Agent(name, model, now_s)
        if len(self._models) < MAX_AGENTS:
            self._models.add(model)
        agent.model, agent.heard_s = model, now_s
        if status is not None:
            self._add(agent.status, status)
            agent.status = status

    def tick(self, now_s: float) -> None:
        """To be called now and then: forgets the silent, and ends the current sample if it is time."""
        for agent in [agent for agent in self._agents.values() if now_s - agent.heard_s > FORGET_S]:
            del self._agents[agent.name]
        if now_s - self._current.end_s < SAMPLE_S:
            return
        self._current.end_s = now_s
        for agent in self._agents.values():
            for tier, figures in agent.status.tiers.items() if agent.status else ():
                self._current.tier_bytes[tier] = self._current.tier_bytes.get(tier, 0) + figures.bytes
        self.history.append(self._current)
        self._current = Sample(now_s)

    def _add(self, before: AgentStatus | None, now: AgentStatus) -> None:
        """What happened between two words of an agent. Its first word, or one after a restart, tells of no stretch."""
        if before is None or now.prompt_tokens < before.prompt_tokens:
            return
        sample = self._current
        sample.prompt_tokens += now.prompt_tokens - before.prompt_tokens
        sample.reused_tokens += max(0, now.reused_tokens - before.reused_tokens)
        sample.generated_tokens += max(0, now.generated_tokens - before.generated_tokens)
        for tier, figures in now.tiers.items():
            grown = figures.hits - before.tiers.get(tier, TierStatus()).hits
            sample.tier_hits[tier] = sample.tier_hits.get(tier, 0) + max(0, grown)
