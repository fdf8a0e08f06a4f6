"""vLLM, offline `LLM.generate`, its CPU build or its CUDA build; prefix caching where lines share."""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

from contract import Line, Run, Task, serve


def load(task: Task) -> Run:
    """The engine; it compiles the model while it loads."""
    on_cpu = task.device == "cpu"
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = task.options["kv_gib"]
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(task.model),
        dtype=task.dtype,
        max_model_len=-(-task.longest // 256) * 256,
        max_num_seqs=64 if on_cpu else 256,  # on a GPU as many as ours, and steps as large
        max_num_batched_tokens=int(task.options.get("batch_tokens", "2048" if on_cpu else "8192")),
        enable_prefix_caching=task.share_prefixes,
        enforce_eager=task.options.get("eager") == "yes",
        seed=0,
    )

    def run(lines: list[Line]) -> list[list[int]]:
        settings = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=line.max_tokens, detokenize=False)
            for line in lines
        ]
        results = engine.generate([{"prompt_token_ids": line.prompt} for line in lines], settings, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return run


if __name__ == "__main__":
    serve(load)
