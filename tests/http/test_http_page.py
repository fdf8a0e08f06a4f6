"""The page: its rules without a browser, and itself in a real one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browsing
from http_ground import Door, prompts, serving, until

from spillway.api.worker.v1.worker_pb2 import AgentStatus
from spillway.gateway.service.fleet import FORGET_S, MAX_AGENTS, SAMPLE_S, Fleet, TierStatus
from spillway.gateway.service.fleet import AgentStatus as Status

MARKUP = "<img src=x onerror=alert(1)>"
STATUS = AgentStatus(
    pool_blocks=100,
    pool_used_blocks=40,
    pool_cached_blocks=35,
    prompt_tokens=1000,
    reused_tokens=730,
    tiers=[AgentStatus.Tier(name="host", bytes=3 << 20, budget_bytes=4 << 20, hits=7, misses=1)],
)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One job done, one half done, an agent that told of itself; and a name that is meant as markup."""
    with serving(tmp_path_factory.mktemp("door"), tokens=True) as door:
        door.work(wait_s=0, status=STATUS)
        done = door.batch(prompts(20))
        door.drain(20)
        door.ended(done)
        wanted = {"endpoint": "/v1/completions", "completion_window": "24h"}
        with door.client() as client:
            half = client.batches.create(input_file_id=door.upload(prompts(30), name=MARKUP), **wanted).id
            door.drain(15)
            until(lambda: ended(client.batches.retrieve(half)) == 15, "half is done")
        (door.folder / "half").write_text(half.removeprefix("batch_"))
        yield door


def ended(batch: Any) -> int:
    return int(batch.request_counts.completed + batch.request_counts.failed)


def test_the_page_is_whole_and_draws_nothing_from_elsewhere(door: Door) -> None:
    page = door.call("GET", "/", None)
    assert (page.status, page.headers["content-type"]) == (200, "text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = page.content.decode()
    assert not re.search(r"https?:|style=|onclick|<script>", text)
    for part in re.findall(r'(?:href|src)="([^"]+)"', text):
        found = door.call("GET", part, None)
        assert found.status == 200
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "innerHTML" not in found.content.decode()


def test_what_is_shown_depends_on_who_looks(door: Door) -> None:
    mine = door.call("GET", "/api/overview").json
    assert [(job["state"], job["completed"] + job["failed"], job["name"]) for job in mine["jobs"]] == [
        ("running", 15, MARKUP),
        ("completed", 20, "batch.jsonl"),
    ]
    assert mine["agents"] is None
    assert door.call("GET", "/api/overview", "token-of-b").json["jobs"] == []
    everything = door.call("GET", "/api/overview", "monitor").json
    assert [job["id"] for job in everything["jobs"]] == [job["id"] for job in mine["jobs"]]
    agent = everything["agents"][0]
    assert (agent["name"], agent["model"], agent["status"]["reused_tokens"]) == ("w", "tiny", 730)
    assert agent["status"]["tiers"] == [{"name": "host", "bytes": 3 << 20, "budget_bytes": 4 << 20, "hits": 7}]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_in_a_browser(door: Door, tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(look(door, tmp_path), 240))


async def look(door: Door, folder: Path) -> None:
    half = (door.folder / "half").read_text()
    async with browsing(folder) as page:
        await page.look(1200, 800, "light")
        await page.go(f"http://127.0.0.1:{door.port}/")
        await page.until("!document.getElementById('entry').hidden")  # no token yet: the page asks for one
        complaints = len(page.complaints)  # the browser notes the 401
        await page.js("document.getElementById('token').value = 'monitor'; document.querySelector('button').click()")
        await page.until(f"document.querySelector('[data-job=\"{half}\"]')")
        shown = await page.js(f"document.querySelector('[data-job=\"{half}\"]').innerText")
        assert "15 of 30 lines" in shown
        assert "50 %" in shown
        assert MARKUP in shown
        agent = await page.js("document.querySelector('[data-agent]').innerText")
        assert "40 % in use" in agent
        assert "3.0 MiB of 4.0 MiB" in agent
        assert "73 % found" in agent
        assert "2 jobs, 1 under way, 1 agent" in await page.js("document.getElementById('summary').innerText")
        day = await page.js("getComputedStyle(document.body).backgroundColor")
        light = await page.shot()
        await page.look(360, 740, "dark")  # a phone by night
        assert await page.js("getComputedStyle(document.body).backgroundColor") != day
        assert await page.js("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the phone"
        assert await page.shot() != light
        await page.look(1200, 800, "light")
        door.drain(15)  # the page follows by itself
        await page.until(f"document.querySelector('[data-job=\"{half}\"]').innerText.includes('completed')")
        assert not await page.js("document.querySelectorAll('img').length")
        assert page.complaints[complaints:] == []


def status(prompt: int, reused: int, hits: int) -> Status:
    return Status(prompt_tokens=prompt, reused_tokens=reused, tiers={"host": TierStatus(bytes=10, hits=hits)})


def test_the_fleet_sums_up_what_happened_between_words() -> None:
    fleet = Fleet()
    fleet.tick(100.0)
    fleet.hear("a", "m", status(1000, 500, 50), 100.0)  # what was before its first word is of no stretch
    fleet.hear("a", "m", status(1100, 560, 53), 105.0)
    fleet.hear("b", "n", None, 106.0)
    fleet.hear("a", "m", status(10, 5, 1), 107.0)  # restarted under the same name
    fleet.hear("a", "m", status(30, 15, 2), 110.0)
    fleet.tick(100.0 + SAMPLE_S - 1)
    assert len(fleet.history) == 1
    fleet.tick(100.0 + SAMPLE_S)
    sample = fleet.history[-1]
    assert (sample.prompt_tokens, sample.reused_tokens) == (120, 70)
    assert (sample.tier_hits, sample.tier_bytes) == ({"host": 4}, {"host": 10})
    assert fleet.models == ["m", "n"]
    fleet.tick(106.0 + FORGET_S + 1)
    assert [agent.name for agent in fleet.agents] == ["a"]
    assert fleet.models == ["m", "n"]


def test_the_fleet_is_bounded() -> None:
    fleet = Fleet()
    for number in range(MAX_AGENTS + 5):
        fleet.hear(str(number), "m", None, 0.0)
    assert (len(fleet.agents), fleet.overlooked) == (MAX_AGENTS, 5)
    for second in range(10_000):
        fleet.tick(float(second))
    assert len(fleet.history) == fleet.history.maxlen
