"""OpenVINO GenAI's continuous batching pipeline: paged cache, split prefill, prefix caching where lines share."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from contract import Line, Run, Task, serve

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def load(task: Task) -> Run:
    """The pipeline on the exported model (`options["export"]`)."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = int(task.options["kv_gib"])
    scheduler.max_num_seqs = int(task.options.get("sequences", "64"))
    scheduler.max_num_batched_tokens = int(task.options.get("batch_tokens", "512"))
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = task.share_prefixes
    precision = PRECISION[task.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": task.threads,
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(task.options["export"], scheduler, "CPU", properties)

    def run(lines: list[Line]) -> list[list[int]]:
        prompts = [openvino.Tensor(np.array([line.prompt], dtype=np.int64)) for line in lines]
        settings = []
        for line in lines:
            each = openvino_genai.GenerationConfig()
            each.max_new_tokens, each.ignore_eos, each.do_sample = line.max_tokens, True, False
            settings.append(each)
        results = pipeline.generate(prompts, settings)
        return [list(result.m_generation_ids[0]) for result in results]

    return run


if __name__ == "__main__":
    serve(load)
