"""The blocks of a job's prompts, named as the agents name them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from spillway.api.errors import LineError
from spillway.api.lines import MAX_LINE_BYTES, parse_line
from spillway.cli.engine_options import chosen_dtype
from spillway.cli.kv_target import KvError
from spillway.cli.options import Dtype
from spillway.kvstore import BlockHash, KVIdentity, block_hash
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.completion import Limits, LineTranslator
from spillway.node_agent.load import kv_identity
from spillway.node_agent.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class JobLines:
    """``line``: counted from 1; None for all of ``input``."""

    model: str
    input: Path
    line: int | None
    dtype: Dtype | None
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The full blocks of one prompt, first block first."""

    line: int
    custom_id: str
    prompt_tokens: int
    blocks: tuple[BlockHash, ...]


def chains_of(job: JobLines) -> tuple[KVIdentity, list[Chain]]:
    """Whose blocks they are, and one chain per prompt; lines that cannot run are left out. Reads all the weights, for
    what names a model's blocks is their content.

    Raises KvError, ModelError.
    """
    checkpoint = Checkpoint.open(job.model)
    spec = checkpoint.spec
    dtype = chosen_dtype(job.dtype, "auto")
    identity = kv_identity(spec, checkpoint.digest().hex(), dtype, job.block_tokens)
    limits = Limits(spec.max_positions, sys.maxsize, spec.vocab)
    translator = LineTranslator(Tokenizer.load(checkpoint.folder, checkpoint.config), limits, 0)
    chains = []
    try:
        with job.input.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if raw.strip() and job.line in (None, number):
                    chains += _chains(translator, raw.rstrip(b"\r\n"), number, identity)
    except OSError as error:
        raise KvError(f"{job.input} cannot be read: {error.strerror}") from error
    if not chains:
        which = "no line that can run" if job.line is None else f"no line {job.line} that can run"
        raise KvError(f"{job.input} has {which}", "Lines are counted from 1, blank ones too.")
    return identity, chains


def _chains(translator: LineTranslator, raw: bytes, number: int, identity: KVIdentity) -> list[Chain]:
    line = parse_line(raw, number)
    requests = line if isinstance(line, LineError) else translator.requests(line)
    if isinstance(line, LineError) or isinstance(requests, LineError):
        return []
    return [
        Chain(number, line.custom_id, len(request.prompt), tuple(_blocks(request.prompt, identity)))
        for request in requests
    ]


def _blocks(prompt: tuple[int, ...], identity: KVIdentity) -> list[BlockHash]:
    parent, size, blocks = identity.root(), identity.block_tokens, []
    for start in range(0, len(prompt) - size + 1, size):
        parent = block_hash(parent, prompt[start : start + size])
        blocks.append(parent)
    return blocks
