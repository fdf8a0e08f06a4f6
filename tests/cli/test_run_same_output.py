"""The same job gives the same bytes, wherever its KV went and whatever shared its batches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import bodies, mixed_lines, options, run_batch, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from spillway.cli.options import KvPolicy
from spillway.cli.run import run

# One block of the tiny Llama: 3 layers, K and V, 2 heads, 16 tokens, 16 dims, 4 bytes.
BLOCK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
SMALL_POOL = 20 * BLOCK_BYTES


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("input") / "in.jsonl", mixed_lines())


@pytest.fixture(scope="module")
def quiet(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output, report = run_batch(model, source, tmp_path_factory.mktemp("quiet") / "out.jsonl")
    assert report["scheduler"]["preemptions"] == 0
    assert report["lines"]["failed"] == 0
    assert report["prefix_hit_share"] > 0.3
    return output


@pytest.mark.parametrize("sequences", [1, 7, 64])
def test_batch_size_changes_nothing(model: Path, source: Path, quiet: bytes, tmp_path: Path, sequences: int) -> None:
    output, report = run_batch(model, source, tmp_path / "out.jsonl", max_sequences=sequences)
    assert output == quiet
    assert report["scheduler"]["peak_sequences"] <= sequences + 3, "only choices of a running line come on top"


@pytest.mark.parametrize("tokens", [5, 33, 512])
def test_chunking_changes_nothing(model: Path, source: Path, quiet: bytes, tmp_path: Path, tokens: int) -> None:
    assert run_batch(model, source, tmp_path / "out.jsonl", max_batch_tokens=tokens)[0] == quiet


def test_spilling_to_host_and_disk_changes_nothing(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    host = 4 * (BLOCK_BYTES + 4096)  # less than preempted lines need, and what they need stays longest
    output, report = run_batch(
        model,
        source,
        tmp_path / "out.jsonl",
        device_kv_bytes=SMALL_POOL,
        host_kv_bytes=host,
        disk_kv_bytes=32 << 20,
        disk_dir=tmp_path / "kv",
    )
    assert output == quiet
    assert report["scheduler"]["preemptions"] > 0
    tiers = report["store"]["tiers"]
    assert tiers["host"]["hits"] > 0
    assert tiers["disk"]["hits"] > 0
    assert tiers["host"]["bytes"] <= host


def test_disk_alone_changes_nothing(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    output, report = run_batch(
        model,
        source,
        tmp_path / "out.jsonl",
        device_kv_bytes=SMALL_POOL,
        disk_kv_bytes=32 << 20,
        disk_dir=tmp_path / "kv",
    )
    assert output == quiet
    tiers = report["store"]["tiers"]
    assert tiers["staging"]["hits"] + tiers["disk"]["hits"] > 0
    assert tiers["disk"]["stores"] > 0


def test_by_what_kv_is_kept_changes_nothing_but_what_is_written(
    model: Path, source: Path, quiet: bytes, tmp_path: Path
) -> None:
    """KV of the job alone, in its own folder: by the plan only what a preempted or a coming line needs is written."""
    budgets = {"device_kv_bytes": SMALL_POOL, "host_kv_bytes": 12 * (BLOCK_BYTES + 4096), "disk_kv_bytes": 32 << 20}
    stores = {}
    for policy in KvPolicy:
        output, report = run_batch(model, source, tmp_path / f"{policy}.jsonl", kv_policy=policy, **budgets)
        assert output == quiet
        stores[policy] = report["store"]
    assert stores["plan"]["spared"] > 0
    assert stores["plan"]["puts"] < stores["lru"]["puts"] / 2
    assert stores["plan"]["tiers"]["disk"]["stores"] < stores["lru"]["tiers"]["disk"]["stores"] / 2
    assert stores["lru"]["spared"] == stores["arc"]["spared"] == 0


def test_no_tier_below_the_device_changes_nothing(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    output, report = run_batch(model, source, tmp_path / "out.jsonl", device_kv_bytes=SMALL_POOL)
    assert output == quiet
    assert report["scheduler"]["preemptions"] > 0
    assert report["store"] is None


def test_a_warm_disk_serves_the_next_run(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    kept = {"disk_kv_bytes": 32 << 20, "disk_dir": tmp_path / "kv"}
    run_batch(model, source, tmp_path / "first.jsonl", **kept)
    output, report = run_batch(model, source, tmp_path / "second.jsonl", **kept)
    assert output == quiet
    assert report["store"]["tiers"]["disk"]["hits"] > 0
    assert report["prefix_hit_share"] > 0.8


def _flip_bits(folder: Path) -> int:
    """Flip a bit in every 997th byte of every large file: data and headers alike."""
    flipped = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            content = bytearray(path.read_bytes())
            for place in range(1000, len(content), 997):
                content[place] ^= 1 << (place % 8)
                flipped += 1
            path.write_bytes(content)
    return flipped


def _truncate(folder: Path) -> int:
    cut = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            os.truncate(path, path.stat().st_size // 3 + 11)
            cut += 1
    return cut


@pytest.mark.parametrize("damage", [_flip_bits, _truncate])
def test_damaged_blocks_are_computed_again(
    model: Path, source: Path, quiet: bytes, tmp_path: Path, damage: Callable[[Path], int]
) -> None:
    kept = {"disk_kv_bytes": 32 << 20, "disk_dir": tmp_path / "kv"}
    run_batch(model, source, tmp_path / "first.jsonl", **kept)
    assert damage(tmp_path / "kv") > 0
    output, report = run_batch(model, source, tmp_path / "second.jsonl", **kept)
    assert output == quiet
    if damage is _flip_bits:
        assert report["store"]["tiers"]["disk"]["verify_failures"] > 0


def test_blocks_of_another_model_are_never_served(
    tiny_checkpoint: Callable[..., Path], model: Path, source: Path, quiet: bytes, tmp_path: Path
) -> None:
    kept = {"disk_kv_bytes": 32 << 20, "disk_dir": tmp_path / "kv"}
    other, _ = run_batch(tiny_checkpoint("llama", seed=1), source, tmp_path / "other.jsonl", **kept)
    assert other != quiet
    output, report = run_batch(model, source, tmp_path / "out.jsonl", **kept)
    assert output == quiet
    assert report["store"]["tiers"]["disk"]["hits"] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk_is_a_miss(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {mount}"):
        pytest.skip("cannot mount a tmpfs here")
    try:
        output, report = run_batch(
            model,
            source,
            tmp_path / "out.jsonl",
            device_kv_bytes=SMALL_POOL,
            disk_kv_bytes=32 << 20,
            disk_dir=mount / "kv",
        )
    finally:
        os.system(f"umount -l {mount}")
    assert output == quiet
    assert report["scheduler"]["preemptions"] > 0


def test_greedy_lines_are_those_of_transformers(model: Path, source: Path, quiet: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_batch(model, source, output, device_kv_bytes=SMALL_POOL, host_kv_bytes=4 << 20, max_batch_tokens=24)
    found = bodies(output)
    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    compared = 0
    for line in (json.loads(row) for row in source.read_text().splitlines()):
        name, body = line["custom_id"], line["body"]
        if not name.startswith(("doc", "chat", "long")):
            continue
        text = _expected(reference, tokenizer, body)
        choice = found[name]["choices"][0]
        assert choice.get("text", choice.get("message", {}).get("content")) == text, name
        compared += 1
    assert compared == 33


def _expected(reference: Any, tokenizer: Any, body: dict[str, Any]) -> str:
    if "messages" in body:
        rendered = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(body["prompt"], return_tensors="pt").input_ids
    eos = None if body.get("ignore_eos") else tokenizer.eos_token_id
    with torch.inference_mode():
        out = reference.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=eos)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_running_a_finished_job_again_does_nothing(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_batch(model, source, output)
    before = output.read_bytes(), output.stat().st_mtime_ns
    assert run(options(model, source, output)) == 0
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
