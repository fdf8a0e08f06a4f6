"""llama.cpp through its C interface: continuous batching by sequence number, as its server does it.

The Python class of the binding runs one sequence at a time, so the batches are made here: decode tokens first, then as
much of waiting prompts as fits. A free slot goes to the line that shares most with what the slot last held, and keeps
that prefix (the server's prompt cache).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
from contract import Line, Run, Task, serve

SLOTS = 64


@dataclass
class Slot:
    """One sequence of the context: what its cache holds, and the line it works on."""

    number: int
    held: list[int] = field(default_factory=list)
    line: int | None = None
    output: list[int] = field(default_factory=list)


def shared(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)


class Context:
    """A llama.cpp context with its batch buffer, for one run over some lines."""

    def __init__(self, model: Any, task: Task, lines: list[Line]) -> None:
        longest = max(len(line.prompt) + line.max_tokens for line in lines)
        slots = min(len(lines), SLOTS)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = slots
        params.n_ctx = slots * (-(-longest // 256) * 256)
        params.n_batch = params.n_ubatch = int(task.options.get("batch_tokens", "512"))
        params.n_threads = params.n_threads_batch = task.threads
        params.flash_attn_type = 0 if task.dtype == "float32" else -1  # flash attention computes in half precision
        params.type_k = params.type_v = 0 if task.dtype == "float32" else 1
        self.handle = llama_cpp.llama_init_from_model(model, params)
        if not self.handle:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.limit = int(params.n_batch)
        self.slots = [Slot(number) for number in range(slots)]
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def take(self, waiting: list[int], lines: list[Line], keep_prefix: bool) -> None:
        """Give waiting lines to free slots."""
        for slot in self.slots:
            if slot.line is not None or not waiting:
                continue
            chosen = waiting[0]
            if keep_prefix:
                chosen = max(waiting, key=lambda number: shared(slot.held, lines[number].prompt))
            waiting.remove(chosen)
            kept = min(shared(slot.held, lines[chosen].prompt), len(lines[chosen].prompt) - 1) if keep_prefix else 0
            llama_cpp.llama_memory_seq_rm(self.memory, slot.number, kept, -1)
            slot.held, slot.line, slot.output = lines[chosen].prompt[:kept], chosen, []

    def step(self, lines: list[Line]) -> None:
        """Decode one batch: a token of each running slot, then prompts."""
        rows, wanted = 0, []
        working = [slot for slot in self.slots if slot.line is not None]
        for slot in sorted(working, key=lambda each: not each.output):
            prompt = lines[slot.line].prompt
            at = len(slot.held)
            tokens = prompt[at : at + self.limit - rows] if at < len(prompt) else slot.output[-1:]
            if rows + len(tokens) > self.limit or not tokens:
                continue
            for offset, token in enumerate(tokens):
                self.batch.token[rows], self.batch.pos[rows] = token, at + offset
                self.batch.n_seq_id[rows], self.batch.seq_id[rows][0] = 1, slot.number
                self.batch.logits[rows] = 0
                rows += 1
            slot.held = slot.held + tokens
            if len(slot.held) >= len(prompt):
                self.batch.logits[rows - 1] = 1
                wanted.append((rows - 1, slot))
        self.batch.n_tokens = rows
        status = llama_cpp.llama_decode(self.handle, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for row, slot in wanted:
            logits = llama_cpp.llama_get_logits_ith(self.handle, row)
            slot.output.append(int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()))

    def close(self) -> None:
        """Free what the library allocated."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.handle)


def load(task: Task) -> Run:
    """The model from its GGUF file (`options["export"]`)."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(task.options["export"].encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {task.options['export']}")

    def run(lines: list[Line]) -> list[list[int]]:
        context = Context(model, task, lines)
        waiting, outputs = list(range(len(lines))), [[] for _ in lines]
        while waiting or any(slot.line is not None for slot in context.slots):
            context.take(waiting, lines, task.share_prefixes)
            context.step(lines)
            for slot in context.slots:
                if slot.line is not None and len(slot.output) >= lines[slot.line].max_tokens:
                    outputs[slot.line], slot.line = slot.output, None
        context.close()
        return outputs

    return run


if __name__ == "__main__":
    serve(load)
