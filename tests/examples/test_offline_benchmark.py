"""The arithmetic and the measuring of the offline benchmark."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from harness import docs, results
from harness.environments import read_recipes
from harness.measure import measured
from harness.models import RANDOM_MODEL, Shape, checkpoint, shape_of, tiny_llama
from harness.modes import short_lines
from harness.peers import PEERS
from harness.workloads import PANELS, WORKLOADS, Workload, make

from spillway.api.lines import BatchLine, parse_line

SHAPE = Shape(layers=2, hidden=8, inner=16, heads=2, kv_heads=1, head_dim=4, vocabulary=100)


def test_flops_of_one_line_counted_by_hand() -> None:
    """Three prompt tokens and two generated: four tokens computed, two sampled, attention over 1+2+3+4 keys."""
    linears = 2 * 2 * (8 * 8 + 8 * 8 + 8 * 8 + 3 * 8 * 16)
    head = 2 * 8 * 100
    keys = 1 + 2 + 3 + 4
    assert SHAPE.token_flops == linears
    assert Workload("w", [([1, 2, 3], 2)]).flops(SHAPE) == 4 * linears + 2 * head + keys * 4 * 2 * 2 * 4


def test_a_shared_prefix_counts_once() -> None:
    prefix = list(range(64))
    apart = Workload("w", [([*prefix, 1], 1), ([99, *prefix[1:], 2], 1)]).flops(SHAPE)
    together = Workload("w", [([*prefix, 1], 1), ([*prefix, 2], 1)]).flops(SHAPE)
    attention = SHAPE.attention_flops(1) * (64 * 65 // 2)
    assert apart - together == 64 * SHAPE.token_flops + attention


@pytest.mark.parametrize("name", [*WORKLOADS, PANELS])
def test_workloads_are_seeded_and_their_lines_are_valid(name: str, tmp_path: Path) -> None:
    work = make(name, 8192)
    assert work == make(name, 8192)
    assert work != make(name, 8192, seed=1)
    work.write_jsonl(tmp_path / "in.jsonl", "m")
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines()
    assert len(lines) * work.prompts_per_line == len(work.lines)
    assert all(isinstance(parse_line(line, at), BatchLine) for at, line in enumerate(lines, 1))


def test_mixed_lengths_are_as_the_documentation_says() -> None:
    lines = make("mixed", 8192).lines
    assert len(lines) == 128
    assert all(32 <= len(prompt) <= 512 and 16 <= tokens <= 128 for prompt, tokens in lines)


def test_match_counts_tokens_from_the_start() -> None:
    assert results.match_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == (0.5 + 1.0) / 2
    assert results.match_share([[1]], [[1, 2, 3, 4]]) == 0.25


def test_match_of_texts_counts_the_tokens_that_the_text_begins_with(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [300, 301, 200, 302, 4000, 5000, 150, 151]
    text = tokenizer.decode(tokens)
    assert results.match_share_of_texts([text], [tokens], folder) == 1.0
    cut = tokenizer.decode(tokens[:5])
    assert results.match_share_of_texts([cut + "#" + text[len(cut) :]], [tokens], folder) == 5 / 8
    assert results.match_share_of_texts(["#" + text], [tokens], folder) == 0.0


def test_the_tiny_model_has_the_shape_its_config_says(tmp_path: Path) -> None:
    shape = shape_of(tiny_llama(tmp_path / "tiny"))
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 2, 1, 32)
    assert max(max(prompt) for prompt, _ in short_lines(50, shape).lines) < shape.vocabulary


def test_a_process_is_measured_with_its_children(tmp_path: Path) -> None:
    child = "x = bytearray(96 << 20)\nimport time\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(0.6)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = measured([sys.executable, "-c", parent], dict(os.environ), tmp_path / "log", limit_s=60)
    assert done.return_code == 0
    assert done.peak_rss_bytes > 96 << 20
    assert done.wall_s >= 0.6
    assert done.cpu_s > 0


def test_a_process_past_its_limit_is_ended(tmp_path: Path) -> None:
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    done = measured([sys.executable, "-c", sleeper], dict(os.environ), tmp_path / "log", limit_s=0.5)
    assert done.return_code is None
    assert done.wall_s < 60


def test_a_failing_process_gives_its_code_and_its_words(tmp_path: Path) -> None:
    done = measured([sys.executable, "-c", "raise SystemExit('no')"], dict(os.environ), tmp_path / "log", limit_s=60)
    assert done.return_code == 1
    assert (tmp_path / "log").read_text() == "no\n"


def test_every_peer_has_an_environment_and_a_script() -> None:
    recipes = read_recipes()
    for peer in PEERS.values():
        assert peer.environment in recipes
        assert (Path(results.__file__).parent.parent / "peers" / peer.script).is_file()
    assert all(recipe.on is None or recipe.on in recipes for recipe in recipes.values())
    assert all("==" in recipe.packages[0] or "==" in recipe.no_deps[0] for recipe in recipes.values())


def test_a_changed_recipe_has_another_digest() -> None:
    recipes = read_recipes()
    assert len({recipe.digest() for recipe in recipes.values()}) == len(recipes)


def test_kept_comparisons_print_as_tables_with_failures_last() -> None:
    figures = {
        "generated_tokens_per_s": 100.0,
        "batch_s": 10.0,
        "process_s": 12.0,
        "process_cpu_s": 20.0,
        "peak_rss_bytes": 1 << 30,
        "match_share": None,
        "packed_share": 0.5,
    }
    kept = {
        "model": "m",
        "workload": "mixed",
        "dtype": "float32",
        "lines": 1,
        "prompt_tokens": 10,
        "output_tokens": 1000,
        "threads": 2,
        "machine": {"processor": "cpu"},
        "peers": {
            "vllm": {"error": "pip said\nno"},
            "openvino": figures | {"batch_s": 11.0},
            "spillway": figures | {"match_share": 1.0},
        },
    }
    rows = results.table(json.loads(json.dumps(kept))).splitlines()
    assert rows[4].startswith("| **spillway** | 100 | 10.0 | 12.0 | 20.0 | 1024 | 1.000 | 50% |")
    assert "OpenVINO" in rows[5]
    assert rows[6].startswith("| vLLM, CPU build | failed: no |")


@pytest.mark.slow
def test_the_random_model_has_206_million_parameters(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(checkpoint(RANDOM_MODEL, tmp_path) / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a mapping
    assert round(total / 1e6, 1) == 205.6


def test_the_tables_in_the_documentation_are_the_kept_results() -> None:
    texts = [page.read_text() for page in docs.PAGES]
    assert sum(text.count("<!-- table ") for text in texts) >= 8
    assert [docs.filled(text) for text in texts] == texts, "run `python benchmarks/offline.py docs`"
