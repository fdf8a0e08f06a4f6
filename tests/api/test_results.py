"""Result lines are, byte for byte, what a reader of OpenAI's batch output files expects, less the white space."""

from __future__ import annotations

import json
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.api.errors import ErrorCode, LineError
from spillway.api.results import (
    LOWEST_LOGPROB,
    BodyHead,
    Choice,
    LineIds,
    TokenAlternative,
    TokenLogprobs,
    Usage,
    batch_request_id,
    chat_body,
    completion_body,
    error_line,
    line_ids,
    result_line,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
IDS = LineIds(batch="batch_req_123", request="req_123", body="chatcmpl-123")
DIGEST = b"\x07" * 32


def token(text: str, logprob: float) -> TokenAlternative:
    return TokenAlternative(text, text.encode(), logprob)


def test_the_example_of_the_batch_guide() -> None:
    """The line that OpenAI's guide shows, with its own ids; white space and system_fingerprint apart."""
    guide = """{"id": "batch_req_123", "custom_id": "request-2", "response": {"status_code": 200,
        "request_id": "req_123", "body": {"id": "chatcmpl-123", "object": "chat.completion", "created": 1711652795,
        "model": "gpt-3.5-turbo-0125", "choices": [{"index": 0, "message": {"role": "assistant",
        "content": "Hello.", "refusal": null}, "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 22, "completion_tokens": 2, "total_tokens": 24},
        "system_fingerprint": null}}, "error": null}"""
    head = BodyHead("chatcmpl-123", 1711652795, "gpt-3.5-turbo-0125")
    body = chat_body(head, [Choice(0, "Hello.", "stop")], Usage(22, 2))
    assert result_line(IDS, "request-2", body).decode() == json.dumps(json.loads(guide), separators=(",", ":")) + "\n"


def test_completion_body() -> None:
    body = completion_body(BodyHead("cmpl-1", 5, "m"), [Choice(0, "a", "length"), Choice(1, "b", "stop")], Usage(3, 2))
    assert body.decode() == (
        '{"id":"cmpl-1","object":"text_completion","created":5,"model":"m","choices":['
        '{"text":"a","index":0,"logprobs":null,"finish_reason":"length"},'
        '{"text":"b","index":1,"logprobs":null,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5},"system_fingerprint":null}'
    )


def test_chat_logprobs_carry_bytes() -> None:
    half = TokenAlternative("\N{REPLACEMENT CHARACTER}", b"\xc3", -1.5)
    rows = (TokenLogprobs(token("H", -0.25), (token("H", -0.25), half)),)
    body = json.loads(chat_body(BodyHead("chatcmpl-1", 5, "m"), [Choice(0, "H", "stop", rows)], Usage(1, 1)))
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "H",
                "logprob": -0.25,
                "bytes": [72],
                "top_logprobs": [
                    {"token": "H", "logprob": -0.25, "bytes": [72]},
                    {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -1.5, "bytes": [195]},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_logprobs_carry_offsets_in_characters() -> None:
    rows = (
        TokenLogprobs(token("Hé", -0.5), (token("Hé", -0.5), token("Ho", -1.0))),
        TokenLogprobs(token("llo", -0.25)),
    )
    body = json.loads(completion_body(BodyHead("cmpl-1", 5, "m"), [Choice(0, "Héllo", "stop", rows)], Usage(1, 2)))
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["Hé", "llo"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"Hé": -0.5, "Ho": -1.0}, None],
        "text_offset": [0, 2],
    }


def test_of_two_tokens_that_read_the_same_the_likelier_counts() -> None:
    same = (TokenAlternative("\ufffd", b"\xc3", -0.5), TokenAlternative("\ufffd", b"\xe2", -2.0))
    choice = Choice(0, "\ufffd", "stop", (TokenLogprobs(same[0], same),))
    body = json.loads(completion_body(BodyHead("cmpl-1", 5, "m"), [choice], Usage(1, 1)))
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -0.5}]


def test_impossible_tokens_have_the_lowest_logprob_and_nan_is_an_error() -> None:
    choice = Choice(0, "x", "stop", (TokenLogprobs(token("x", -inf)),))
    body = json.loads(chat_body(BodyHead("i", 5, "m"), [choice], Usage(1, 1)))
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == LOWEST_LOGPROB
    with pytest.raises(ValueError, match="NaN"):
        chat_body(BodyHead("i", 5, "m"), [Choice(0, "x", "stop", (TokenLogprobs(token("x", nan)),))], Usage(1, 1))


def test_error_line() -> None:
    error = LineError(ErrorCode.UNKNOWN_PARAMETER, 'unknown parameter "x"', 3, "x", "request-2")
    assert error_line("batch_req_123", error).decode() == (
        '{"id":"batch_req_123","custom_id":"request-2","response":null,'
        '"error":{"code":"unknown_parameter","message":"unknown parameter \\"x\\"","param":"x","line":3}}\n'
    )


def test_ids_follow_from_job_line_and_name() -> None:
    ids = line_ids(DIGEST, 4, "a", CHAT)
    assert ids == line_ids(DIGEST, 4, "a", CHAT)
    assert ids.batch == batch_request_id(DIGEST, 4, "a")
    assert (ids.batch[:10], ids.request[:4], ids.body[:9]) == ("batch_req_", "req_", "chatcmpl-")
    assert line_ids(DIGEST, 4, "a", COMPLETIONS).body.startswith("cmpl-")
    others = [line_ids(DIGEST, 5, "a", CHAT), line_ids(DIGEST, 4, "b", CHAT), line_ids(b"\x08" * 32, 4, "a", CHAT)]
    assert len({ids.batch, *(other.batch for other in others)}) == 4


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@given(text.filter(bool), text, text)
@settings(deadline=None)
def test_any_text_stays_itself_on_one_line(custom_id: str, model: str, content: str) -> None:
    head = BodyHead("chatcmpl-1", 5, model)
    row = result_line(IDS, custom_id, chat_body(head, [Choice(0, content, "stop")], Usage(1, 1)))
    assert row.count(b"\n") == 1
    assert row.endswith(b"\n")
    fields = json.loads(row)
    assert fields["custom_id"] == custom_id
    assert fields["response"]["body"]["model"] == model
    assert fields["response"]["body"]["choices"][0]["message"]["content"] == content
