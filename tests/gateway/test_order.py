"""The order of lines is the depth-first order of their prefix tree, at the resolution of the boundaries."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from batch_files import request
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.api.lines import BatchLine, parse_line
from spillway.gateway.order import BOUNDARIES, PrefixOrder, prompt_bytes


def ordered(prompts: list[tuple[int, bytes]]) -> list[int]:
    with tempfile.TemporaryFile() as scratch:
        order = PrefixOrder(scratch)
        for seed, prompt in prompts:
            order.add(seed, prompt)
        return [int(index) for index in order.order()]


def order_of(prompts: list[bytes]) -> list[int]:
    return ordered([(1, prompt) for prompt in prompts])


def cuts(prompt: bytes) -> list[bytes]:
    """The prefixes at which a prompt is compared, the prompt itself last."""
    return [prompt[:boundary] for boundary in BOUNDARIES if boundary <= len(prompt)] + [prompt + b"$"]


def depth_first(prompts: list[bytes]) -> list[int]:
    """The specification: a real tree, walked recursively, children in order of first appearance."""

    def walk(indices: list[int], level: int) -> list[int]:
        children: dict[bytes, list[int]] = {}
        for index in indices:
            steps = cuts(prompts[index])
            children.setdefault(steps[min(level, len(steps) - 1)], []).append(index)
        out: list[int] = []
        for child in children.values():
            finished = all(len(cuts(prompts[index])) <= level + 1 for index in child)
            out += child if finished or len(child) == 1 else walk(child, level + 1)
        return out

    return walk(list(range(len(prompts))), 0)


def shared(prompts: list[bytes], order: list[int]) -> int:
    """Bytes of prompt that a cache which remembers the line before need not compute."""
    return sum(common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order))


def common(one: bytes, other: bytes) -> int:
    """Length of the longest common prefix."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def test_boundaries_grow_by_a_quarter() -> None:
    assert BOUNDARIES[0] == 64
    assert BOUNDARIES[-1] >= 8 * 1024 * 1024
    assert all(1.2 < after / before <= 1.25 for before, after in itertools.pairwise(BOUNDARIES))


# Few, long, repeated pieces: so that prompts do share prefixes, of all lengths, and sometimes everything.
pieces = st.sampled_from([b"a" * 70, b"b" * 100, b"c" * 30, b"d", b"e" * 500])
prompts_that_share = st.lists(st.lists(pieces, max_size=8).map(b"".join), max_size=30)


@given(prompts_that_share)
@settings(max_examples=200, deadline=None)
def test_it_is_the_order_of_the_tree(prompts: list[bytes]) -> None:
    assert order_of(prompts) == depth_first(prompts)


@given(prompts_that_share)
@settings(max_examples=200, deadline=None)
def test_it_comes_near_the_best_order(prompts: list[bytes]) -> None:
    """Sorting whole prompts is the best order there is. Ours overlooks a fifth of a prefix and 64 bytes at most."""
    best = shared(prompts, sorted(range(len(prompts)), key=prompts.__getitem__))
    ours = shared(prompts, order_of(prompts))
    assert ours >= 0.8 * best - 64 * len(prompts)


def test_documents_dealt_like_cards_are_gathered() -> None:
    documents = [os.urandom(3000) for _ in range(50)]
    prompts = [documents[number % 50] + b"question %d" % number for number in range(1000)]
    order = order_of(prompts)
    changes = sum(a % 50 != b % 50 for a, b in itertools.pairwise(order))
    assert changes == 49
    assert [index % 50 for index in order[:: 1000 // 50]] == list(range(50))  # documents in order of first appearance


def test_a_tree_of_two_levels() -> None:
    system, first, second = b"s" * 1000, b"x" * 1000, b"y" * 1000
    prompts = [system + first + b"1", b"other", system + second + b"1", system + first + b"2", system + second + b"2"]
    assert order_of(prompts) == [0, 3, 2, 4, 1]


def test_equal_prompts_stay_in_order_of_the_file() -> None:
    assert order_of([b"same" * 50, b"x", b"same" * 50, b"", b"same" * 50, b""]) == [0, 2, 4, 1, 3, 5]


def test_no_lines_at_all() -> None:
    assert order_of([]) == []


def test_very_long_prompts() -> None:
    base = b"z" * 9_000_000
    assert order_of([base + b"1", base[:5_000_000] + b"2" * 4_000_000, base + b"3"]) == [0, 2, 1]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([b"p" * 200, b"p" * 300, b"q" * 100])), max_size=20))
@settings(deadline=None)
def test_kinds_of_prompt_do_not_mix(prompts: list[tuple[int, bytes]]) -> None:
    order = ordered(prompts)
    assert Counter(order) == Counter(range(len(prompts)))
    for key in {(seed, prompt[:64]) for seed, prompt in prompts}:
        places = [place for place, index in enumerate(order) if (prompts[index][0], prompts[index][1][:64]) == key]
        assert places == list(range(places[0], places[-1] + 1))


def key_of(raw: bytes) -> tuple[int, bytes]:
    line = parse_line(raw, 1)
    assert isinstance(line, BatchLine)
    return prompt_bytes(line.body)


def chat(*messages: tuple[str, str], **fields: object) -> tuple[int, bytes]:
    import json

    rows = [{"role": role, "content": content} for role, content in messages]
    body = {"model": "m", "messages": rows} | fields
    url = "/v1/chat/completions"
    return key_of(json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode())


def test_prompts_as_bytes() -> None:
    assert key_of(request("a", "text")) == (1, b"text")
    assert key_of(request("a", prompt=[1, 2])) == (2, b"\x01\0\0\0\x02\0\0\0")
    same_start = [chat(("system", "s"), ("user", text)) for text in ("one", "two")]
    assert common(same_start[0][1], same_start[1][1]) > len("systemsuser")
    assert chat(("system", "s"), ("user", "x")) != chat(("system", "su"), ("user", "x"))
    assert chat(("user", "x")) != chat(("assistant", "x"))
    assert chat(("user", "x"))[0] != key_of(request("a"))[0]
    # what changes the head of the template is compared first
    plain, thinking = chat(("user", "x")), chat(("user", "x"), chat_template_kwargs={"enable_thinking": True})
    assert common(plain[1], thinking[1]) == 0


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_one_prompt_many_times(count: int) -> None:
    assert order_of([b"again" * 100] * count) == list(range(count))


def test_among_branches_and_equal_prompts_the_longest_answer_goes_first(tmp_path: Path) -> None:
    document = b"d" * 300
    prompts = [b"short", document + b"1" * 100, document + b"2" * 100, b"other", document + b"1" * 100]
    with (tmp_path / "keys").open("w+b") as scratch:
        order = PrefixOrder(scratch)
        for prompt, answer in zip(prompts, [50, 10, 20, 30, 40], strict=True):
            order.add(1, prompt, answer)
        assert order.order().tolist() == [0, 4, 1, 2, 3]
