"""Files and models that cannot work: one message that says what is wrong, before work is spent."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import completion, write_lines
from commands import refused


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def spoiled(model: Path, tmp_path: Path) -> Path:
    """A copy of it for the test to damage."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [completion("a", "a lazy dog")])


def said(model: Path | str, source: Path | str, output: Path | str, *more: str | Path) -> str:
    words = ["--model", model, "--input", source, "--output", output, "--dtype", "float32", "--device", "cpu"]
    return refused("run", *words, *more)


def test_inputs_that_are_no_batch(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_bytes(b"\n \r\n\n")
    (tmp_path / "packed").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "wide").write_text("{}\n", encoding="utf-16")
    os.mkfifo(tmp_path / "pipe")
    for name, expected in [
        ("empty", "no request"),
        ("blank", "no request"),
        ("packed", "gzip"),
        ("wide", "UTF-16"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("nothing", "does not exist"),
        ("n" * 300, "name too long"),
        ("empty/in.jsonl", "does not exist"),
    ]:
        assert expected in said(model, tmp_path / name, tmp_path / "out.jsonl"), name


def test_outputs_that_cannot_be_written(model: Path, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[Path | str, tuple[str | Path, ...], str]] = [
        (source, (), "same file"),
        (".", (), "is a directory"),
        ("/", (), "is a directory"),
        ("..", (), "is a directory"),
        (tmp_path, (), "is a directory"),
        ("no/out", (), "does not exist"),
        ("n" * 300, (), "name too long"),
        ("n" * 248, (), "name too long"),
        ("out", ("--errors", "out"), "same file"),
        ("out", ("--report", "out"), "same file"),
        ("out", ("--report", "no/report"), "does not exist"),
        ("out", ("--report", "."), "is a directory"),
        ("out", ("--device-kv", "1KiB"), "--device-kv at least"),
        ("out", ("--device-kv", "4000TiB"), "--device-kv less"),
        ("out", ("--device-kv", "much"), "is not a size"),
        ("out", ("--device-kv", "9" * 400), "more bytes than any machine has"),
    ]
    told = [(output, more, expected, said(model, source, output, *more)) for output, more, expected in cases]
    assert [row for row in told if row[2] not in row[3]] == []
    assert not Path("out").exists()


def test_models_that_cannot_run(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "no config.json" in said(tmp_path / "folder", source, tmp_path / "out")
    assert "not a folder" in said(tmp_path / "nowhere", source, tmp_path / "out")
    assert "not a folder" in said(source, source, tmp_path / "out")
    assert "neither a folder nor a hub id" in said("no such model", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"", "config.json"),
        ("config.json", b"[" * 100_000, "config.json"),
        ("config.json", b"\xff\xfe{}", "config.json"),
        ("config.json", b"{}", "names no model_type"),
        ("config.json", b'{"model_type": "llama"}', "weights missing from the checkpoint"),
        ("tokenizer.json", None, "no tokenizer"),
        ("tokenizer.json", b"{", "no tokenizer"),
        ("tokenizer_config.json", b"[]", "no tokenizer"),
        ("generation_config.json", b"[]", "generation_config.json"),
        ("generation_config.json", b'{"eos_token_id": "two"}', "eos_token_id"),
        ("model.safetensors", None, "has neither"),
        ("model.safetensors", b"\0" * 100, "model.safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "outside its folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "nothing.safetensors"}}', "not there"),
    ],
)
def test_files_of_a_model_that_make_no_sense(
    spoiled: Path, source: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is None:
        (spoiled / name).unlink()
    else:
        (spoiled / name).write_bytes(content)
    assert expected in said(spoiled, source, spoiled / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": -64},
        {"hidden_size": 10**30},
        {"rms_norm_eps": None},
        {"rms_norm_eps": "small"},
        {"max_position_embeddings": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}},
        {"rope_parameters": ["default"]},
        {"rope_parameters": {"rope_type": ["default"]}},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"head_dim": 17},
        {"vocab_size": 3},
    ],
    ids=str,
)
def test_settings_of_a_model_that_make_no_sense(spoiled: Path, source: Path, fields: dict[str, Any]) -> None:
    path = spoiled / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    said(spoiled, source, spoiled / "out")
