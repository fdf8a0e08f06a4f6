"""OpenVINO GenAI's continuous batching pipeline: paged cache, split prefill, prefix caching where lines share.

The pipeline looks for cached prefixes when a line is added, and all lines of a call are added at once. So that lines
with a shared prefix find it, they are given in two calls: one line of each prefix first, then the others. A CPU without
bfloat16 instructions computes in float32 whatever is asked for.
"""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from contract import Line, Run, Task, serve

PREFIX_TOKENS = 64


def waves(lines: list[Line]) -> list[list[int]]:
    """Line numbers: the first line of each prefix, then the rest."""
    first: dict[tuple[int, ...], int] = {}
    for number, line in enumerate(lines):
        first.setdefault(tuple(line.prompt[:PREFIX_TOKENS]), number)
    rest = sorted(set(range(len(lines))) - set(first.values()))
    return [wave for wave in (list(first.values()), rest) if wave]


def load(task: Task) -> Run:
    """The pipeline on the exported model (`options["export"]`)."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = int(task.options["kv_gib"])
    scheduler.max_num_seqs = int(task.options.get("sequences", "64"))
    scheduler.max_num_batched_tokens = int(task.options.get("batch_tokens", "512"))
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = task.share_prefixes
    can_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if task.dtype == "bfloat16" and can_bfloat16 else "f32"
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": task.threads,
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(task.options["export"], scheduler, "CPU", properties)

    def call(lines: list[Line]) -> list[list[int]]:
        prompts = [openvino.Tensor(np.array([line.prompt], dtype=np.int64)) for line in lines]
        settings = []
        for line in lines:
            each = openvino_genai.GenerationConfig()
            each.max_new_tokens, each.ignore_eos, each.do_sample = line.max_tokens, True, False
            settings.append(each)
        return [list(result.m_generation_ids[0]) for result in pipeline.generate(prompts, settings)]

    def run(lines: list[Line]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in lines]
        for wave in waves(lines) if task.share_prefixes else [list(range(len(lines)))]:
            for number, tokens in zip(wave, call([lines[n] for n in wave]), strict=True):
                outputs[number] = tokens
        return outputs

    return run


if __name__ == "__main__":
    serve(load)
