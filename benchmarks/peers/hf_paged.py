"""transformers' own continuous batching: paged cache, SDPA, packed oneDNN linears."""

from __future__ import annotations

from contract import Line, Run, Task, serve
from hf_model import load_model
from transformers import ContinuousBatchingConfig, GenerationConfig

PAGE_TOKENS = 32


def load(task: Task) -> Run:
    """A manager per batch, with cache enough for all of its lines."""
    model = load_model(task, attn_implementation="paged|sdpa")
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=task.longest)

    def run(lines: list[Line]) -> list[list[int]]:
        blocks = sum(-(-(len(line.prompt) + line.max_tokens) // PAGE_TOKENS) + 1 for line in lines)
        batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=blocks, max_batch_tokens=512, allow_block_sharing=task.share_prefixes
        )
        done: dict[int, list[int]] = {}
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=batching
        ) as manager:
            for number, line in enumerate(lines):
                manager.add_request(line.prompt, request_id=str(number), max_new_tokens=line.max_tokens)
            while len(done) < len(lines):
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    done[int(result.request_id)] = list(result.generated_tokens)
        return [done[number] for number in range(len(lines))]

    return run


if __name__ == "__main__":
    serve(load)
