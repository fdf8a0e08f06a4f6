"""`/api/overview`: what the page shows. A client sees its tenant's jobs; a monitor all, and the agents."""

from __future__ import annotations

import time

from aiohttp import web

from spillway.gateway.http.objects import Json
from spillway.gateway.http.reading import CALLER, json_response
from spillway.gateway.service.access import Kind
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.fleet import Agent, Sample
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.served import ServedJob

MAX_JOBS = 200
"""A page is for looking at; those who want them all list them."""


class Overview:
    """The handler."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    async def overview(self, request: web.Request) -> web.Response:
        """Jobs that run first, then the newest; at most `MAX_JOBS`. Times in Unix seconds, ages in seconds."""
        caller = request[CALLER]
        everything = caller.kind in (None, Kind.MONITOR)
        jobs = self._coordinator.jobs(None if everything else caller.tenant)
        jobs.sort(key=lambda job: (job.state.final, -job.spec.created_s))
        answer: Json = {
            "now_s": time.time(),
            "num_jobs": len(jobs),
            "jobs": [self._job(job) for job in jobs[:MAX_JOBS]],
            "agents": None,
            "history": None,
        }
        if everything:
            now_s, fleet = time.monotonic(), self._coordinator.fleet
            answer["agents"] = [_agent(agent, now_s) for agent in fleet.agents]
            answer["history"] = [_sample(sample, now_s) for sample in fleet.history]
        return json_response(answer)

    def _job(self, job: ServedJob) -> Json:
        spec, counts, now_s = job.spec, job.counts(), time.monotonic()
        return {
            "id": spec.id,
            "name": spec.request.display_name,
            "tenant": spec.tenant,
            "model": spec.request.model,
            "state": job.state.name.lower(),
            "total": counts.total,
            "completed": counts.completed,
            "failed": counts.failed,
            "leased": job.num_leased,
            "created_s": spec.created_s,
            "end_s": None if spec.outcome is None else spec.outcome.end_s,
            "tokens_per_s": job.tokens_per_s(now_s),
            "ends_in_s": job.end_band_s(now_s),
            "waiting_reason": self._coordinator.waiting_reason(job),
        }


def _agent(agent: Agent, now_s: float) -> Json:
    status = agent.status
    told = {"name": agent.name, "model": agent.model, "silent_s": now_s - agent.heard_s, "status": None}
    if status is not None:
        told["status"] = {
            "pool_blocks": status.pool_blocks,
            "pool_used_blocks": status.pool_used_blocks,
            "pool_cached_blocks": status.pool_cached_blocks,
            "prompt_tokens": status.prompt_tokens,
            "reused_tokens": status.reused_tokens,
            "generated_tokens": status.generated_tokens,
            "tiers": [
                {"name": name, "bytes": tier.bytes, "budget_bytes": tier.budget_bytes, "hits": tier.hits}
                for name, tier in status.tiers.items()
            ],
        }
    return told


def _sample(sample: Sample, now_s: float) -> Json:
    return {
        "age_s": now_s - sample.end_s,
        "prompt_tokens": sample.prompt_tokens,
        "reused_tokens": sample.reused_tokens,
        "generated_tokens": sample.generated_tokens,
        "tier_bytes": sample.tier_bytes,
        "tier_hits": sample.tier_hits,
    }
