"""Fields that are real parameters of the API elsewhere but that Spillway does not offer.

They get their own code, so that a user learns "not here" instead of "no such thing". Null is always let through, and so
is a value that asks for nothing (`"tool_choice": "none"`): clients write defaults out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BOTH: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "service_tier": ("auto", "default", "flex"),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    # extensions of other open-model servers
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "lora_path": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "add_special_tokens": (),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "min_new_tokens": (),
    "max_new_tokens": (),
    "response_format": ({"type": "text"},),
}

COMPLETION: Mapping[str, tuple[Any, ...]] = {**_BOTH, "suffix": ("",), "echo": (False,)}

CHAT: Mapping[str, tuple[Any, ...]] = {
    **_BOTH,
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "include_reasoning": (),
    "thinking_token_budget": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
}

MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "reasoning": (),
    "reasoning_content": (),
    "annotations": ([],),
}

CONTENT_TYPES = frozenset(
    ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file", "refusal", "image")
)


def unsupported_field(fields: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]) -> str | None:
    """Name of the first field that asks for something unsupported, or None."""
    for name in fields:
        if name in table and not _asks_for_nothing(fields[name], table[name]):
            return name
    return None


def _asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    # compared with its type: JSON's true is not 1, though Python's is
    return value is None or any(type(value) is type(other) and value == other for other in harmless)
