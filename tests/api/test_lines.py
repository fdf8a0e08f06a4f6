"""A line of a batch file is a checked request or a coded error, whatever bytes it is made of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spillway.api.bodies import ChatBody, CompletionBody
from spillway.api.errors import MAX_MESSAGE_CHARS, ErrorCode, LineError
from spillway.api.lines import MAX_CUSTOM_ID_CHARS, MAX_LINE_BYTES, BatchLine, parse_line
from spillway.api.results import error_line

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def line(body: Any = None, *, url: str = COMPLETIONS, drop: tuple[str, ...] = (), **envelope: Any) -> bytes:
    fields = {"custom_id": "a", "method": "POST", "url": url, "body": body} | envelope
    return json.dumps({name: value for name, value in fields.items() if name not in drop}).encode()


def completion(**fields: Any) -> bytes:
    return line({"model": "m", "prompt": "hi"} | fields)


def chat(**fields: Any) -> bytes:
    return line({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields, url=CHAT)


def message(**fields: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": "hi"} | fields])


def accepted(raw: bytes) -> BatchLine:
    parsed = parse_line(raw, 1)
    assert isinstance(parsed, BatchLine), parsed
    return parsed


def refused(raw: bytes) -> LineError:
    parsed = parse_line(raw, 7)
    assert isinstance(parsed, LineError), parsed
    assert parsed.line == 7
    return parsed


class TestAccepted:
    def test_completion(self) -> None:
        parsed = accepted(completion(max_tokens=5, temperature=0, stop="\n"))
        assert (parsed.custom_id, parsed.url, parsed.line_number) == ("a", COMPLETIONS, 1)
        assert isinstance(parsed.body, CompletionBody)
        assert (parsed.body.max_new_tokens, parsed.body.temperature, parsed.body.stop_strings) == (5, 0, ("\n",))

    def test_chat(self) -> None:
        parsed = accepted(chat(max_completion_tokens=3, logprobs=True, top_logprobs=2))
        assert isinstance(parsed.body, ChatBody)
        assert (parsed.body.max_new_tokens, parsed.body.num_logprobs) == (3, 2)
        assert parsed.body.template_messages == [{"role": "user", "content": "hi"}]

    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [("x", ["x"]), (["x", ""], ["x", ""]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
    )
    def test_four_shapes_of_prompt(self, prompt: Any, prompts: Any) -> None:
        body = accepted(completion(prompt=prompt)).body
        assert isinstance(body, CompletionBody)
        assert body.prompts == prompts

    def test_defaults_are_openais(self) -> None:
        completion_body, chat_body = accepted(completion()).body, accepted(chat()).body
        assert completion_body.max_new_tokens == 16
        assert chat_body.max_new_tokens is None
        assert completion_body.choices_per_prompt == chat_body.choices_per_prompt == 1
        assert completion_body.num_logprobs is chat_body.num_logprobs is None
        assert completion_body.stop_strings == ()

    def test_logprobs_mean_a_count_in_one_endpoint_and_a_switch_in_the_other(self) -> None:
        assert accepted(completion(logprobs=0)).body.num_logprobs == 0
        assert accepted(chat(logprobs=True)).body.num_logprobs == 0
        assert accepted(chat(logprobs=False)).body.num_logprobs is None

    def test_every_extension_is_typed(self) -> None:
        extensions = {
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [1, 2],
            "skip_special_tokens": False,
        }
        for raw in (completion(**extensions), chat(**extensions, chat_template_kwargs={"enable_thinking": False})):
            body = accepted(raw).body
            assert {name: getattr(body, name) for name in extensions} == extensions

    def test_logit_bias_is_keyed_by_token(self) -> None:
        assert accepted(completion(logit_bias={"15": -100, "3": 0.5})).body.logit_biases == {15: -100.0, 3: 0.5}

    def test_what_is_said_for_the_users_own_sake_is_let_through(self) -> None:
        accepted(chat(user="u", metadata={"k": "v"}))

    def test_null_means_not_given(self) -> None:
        names = ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "tools", "user"]
        accepted(chat(**dict.fromkeys(names)))

    @pytest.mark.parametrize(
        "harmless",
        [
            {"stream": False},
            {"tools": []},
            {"tool_choice": "none"},
            {"response_format": {"type": "text"}},
            {"store": False},
            {"service_tier": "auto"},
        ],
    )
    def test_unsupported_fields_that_ask_for_nothing_are_let_through(self, harmless: dict[str, Any]) -> None:
        accepted(chat(**harmless))

    def test_text_parts_are_joined_and_developer_is_system(self) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        body = accepted(chat(messages=[{"role": "developer", "content": parts, "name": "n"}])).body
        assert isinstance(body, ChatBody)
        assert body.template_messages == [{"role": "system", "content": "one\ntwo", "name": "n"}]

    def test_history_with_tool_answers_can_be_replayed(self) -> None:
        rows = [
            {"role": "assistant", "content": "calling", "refusal": None, "tool_calls": []},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ]
        body = accepted(chat(messages=rows)).body
        assert isinstance(body, ChatBody)
        assert body.template_messages[1] == {"role": "tool", "content": "42", "tool_call_id": "c1"}

    def test_white_space_and_escapes_are_json_s_business(self) -> None:
        raw = b' \t{"custom_id":"\\u0061","method":"POST","url":"/v1/completions",'
        raw += b'"body":{"model":"m","prompt":"\\ud83d\\ude00 \\\\ud800"}} \r'
        parsed = accepted(raw)
        assert parsed.custom_id == "a"
        assert parsed.body.prompt == "😀 \\ud800"

    def test_a_line_of_just_the_limit(self) -> None:
        raw = completion(prompt="x" * 1000)
        assert isinstance(parse_line(raw, 1, len(raw)), BatchLine)
        assert refused_code(parse_line(raw, 1, len(raw) - 1)) == ErrorCode.LINE_TOO_LONG


def refused_code(parsed: BatchLine | LineError) -> ErrorCode:
    assert isinstance(parsed, LineError)
    return parsed.code


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"{}{}",
        b"\xff\xfe{}",
        b'{"a":"\xc3"}',
        b'{"a":"\xed\xa0\x80"}',  # a surrogate, encoded as if it were a character
        b'{"custom_id":"a","custom_id":"a"}',
        b'{"body":{"n":1,"n":1}}',
        b'{"custom_id":"\\ud800"}',
        b'{"\\udc00":1}',
        b'{"custom_id":"a\x01"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join(b'"%d":0' % number for number in range(5000)) + b"}",
        completion().decode().encode("utf-16"),
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_parsers_disagree_about_is_not_json(raw: bytes) -> None:
    error = refused(raw)
    assert error.code == ErrorCode.INVALID_JSON
    assert error.custom_id is None


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (line({}, drop=("custom_id",)), "missing_parameter", "custom_id"),
        (line({}, drop=("method",)), "missing_parameter", "method"),
        (line({}, drop=("url",)), "missing_parameter", "url"),
        (line({}, drop=("body",)), "missing_parameter", "body"),
        (line({}, extra=1), "unknown_parameter", "extra"),
        (line({}, custom_id=""), "invalid_request", "custom_id"),
        (line({}, custom_id=7), "invalid_request", "custom_id"),
        (line({}, custom_id=None), "invalid_request", "custom_id"),
        (line({}, custom_id="x" * (MAX_CUSTOM_ID_CHARS + 1)), "invalid_request", "custom_id"),
        (line({}, method="GET"), "invalid_request", "method"),
        (line({}, method=["POST"]), "invalid_request", "method"),
        (line({}, url="/v1/embeddings"), "invalid_request", "url"),
        (line({}, url=[CHAT]), "invalid_request", "url"),
        (line([]), "invalid_request", "body"),
        (line("x"), "invalid_request", "body"),
    ],
)
def test_envelope(raw: bytes, code: str, param: str) -> None:
    error = refused(raw)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (line({"prompt": "x"}), "missing_parameter", "model"),
        (line({"model": "m"}), "missing_parameter", "prompt"),
        (line({"model": "m"}, url=CHAT), "missing_parameter", "messages"),
        (completion(model=""), "invalid_parameter", "model"),
        (completion(model=1), "invalid_parameter", "model"),
        # what belongs to the other endpoint is unknown here
        (completion(messages=[]), "unknown_parameter", "messages"),
        (chat(prompt="x"), "unknown_parameter", "prompt"),
        (completion(top_logprobs=1), "unknown_parameter", "top_logprobs"),
        (completion(temprature=1), "unknown_parameter", "temprature"),
        (message(naem="x"), "unknown_parameter", "messages[0].naem"),
        (message(content=[{"type": "text", "text": "", "x": 1}]), "unknown_parameter", "messages[0].content[0].x"),
        # real parameters that Spillway does not offer
        (completion(stream=True), "unsupported_parameter", "stream"),
        (completion(stream=0), "unsupported_parameter", "stream"),
        (completion(suffix="x"), "unsupported_parameter", "suffix"),
        (completion(echo=True), "unsupported_parameter", "echo"),
        (chat(tools=[{}]), "unsupported_parameter", "tools"),
        (chat(tool_choice="auto"), "unsupported_parameter", "tool_choice"),
        (chat(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
        (chat(modalities=["audio"]), "unsupported_parameter", "modalities"),
        (chat(audio={}), "unsupported_parameter", "audio"),
        (chat(guided_json={}), "unsupported_parameter", "guided_json"),
        (message(role="assistant", tool_calls=[{}]), "unsupported_parameter", "messages[0].tool_calls"),
        (message(content=[{"type": "image_url"}]), "unsupported_parameter", "messages[0].content[0].type"),
        # types
        (completion(max_tokens=True), "invalid_parameter", "max_tokens"),
        (completion(max_tokens=1.0), "invalid_parameter", "max_tokens"),
        (completion(max_tokens="1"), "invalid_parameter", "max_tokens"),
        (completion(temperature=True), "invalid_parameter", "temperature"),
        (completion(temperature="0"), "invalid_parameter", "temperature"),
        (completion(logprobs=True), "invalid_parameter", "logprobs"),
        (chat(logprobs=1), "invalid_parameter", "logprobs"),
        (completion(ignore_eos=1), "invalid_parameter", "ignore_eos"),
        (completion(prompt=None), "invalid_parameter", "prompt"),
        (completion(prompt=[]), "invalid_parameter", "prompt"),
        (completion(prompt=True), "invalid_parameter", "prompt"),
        (completion(prompt=[True]), "invalid_parameter", "prompt"),
        (completion(prompt=[1, True]), "invalid_parameter", "prompt[1]"),
        (completion(prompt=[1, "x"]), "invalid_parameter", "prompt[1]"),
        (completion(prompt=["x", 1]), "invalid_parameter", "prompt[1]"),
        (completion(prompt=[[1], []]), "invalid_parameter", "prompt[1]"),
        (completion(prompt=[[1], [2, -1]]), "invalid_parameter", "prompt[1][1]"),
        (completion(prompt=[2**31]), "invalid_parameter", "prompt[0]"),
        (completion(prompt=["x"] * 3000), "invalid_parameter", "prompt"),
        (completion(stop=1), "invalid_parameter", "stop"),
        (completion(stop=["x", 1]), "invalid_parameter", "stop[1]"),
        (completion(stop=""), "invalid_parameter", "stop"),
        (completion(stop=["x"] * 100), "invalid_parameter", "stop"),
        (chat(messages=[]), "invalid_parameter", "messages"),
        (chat(messages=None), "invalid_parameter", "messages"),
        (chat(messages=["x"]), "invalid_parameter", "messages[0]"),
        (message(role="wizard"), "invalid_parameter", "messages[0].role"),
        (message(content=None), "invalid_parameter", "messages[0].content"),
        (message(content=[]), "invalid_parameter", "messages[0].content"),
        (message(content=[{"type": "sound"}]), "invalid_parameter", "messages[0].content[0].type"),
        (message(content=[{"type": "text", "text": 1}]), "invalid_parameter", "messages[0].content[0].text"),
        (message(tool_call_id="x"), "invalid_parameter", "messages[0].tool_call_id"),
        (chat(metadata={"k": 1}), "invalid_parameter", "metadata.k"),
        (completion(logit_bias={"x": 1}), "invalid_parameter", "logit_bias"),
        (completion(logit_bias={"-1": 1}), "invalid_parameter", "logit_bias"),
        (completion(logit_bias={"٣": 1}), "invalid_parameter", "logit_bias"),
        (completion(logit_bias={"1": 101}), "invalid_parameter", "logit_bias"),
        (completion(logit_bias={"1": 1, "01": 2}), "invalid_parameter", "logit_bias"),
        # ranges
        (completion(max_tokens=0), "invalid_parameter", "max_tokens"),
        (completion(temperature=2.1), "invalid_parameter", "temperature"),
        (completion(temperature=-0.1), "invalid_parameter", "temperature"),
        (completion(top_p=0), "invalid_parameter", "top_p"),
        (completion(top_p=1.01), "invalid_parameter", "top_p"),
        (completion(n=0), "invalid_parameter", "n"),
        (completion(n=129), "invalid_parameter", "n"),
        (completion(seed=2**63), "invalid_parameter", "seed"),
        (completion(top_k=-2), "invalid_parameter", "top_k"),
        (completion(min_p=1.5), "invalid_parameter", "min_p"),
        (completion(repetition_penalty=0), "invalid_parameter", "repetition_penalty"),
        (completion(presence_penalty=3), "invalid_parameter", "presence_penalty"),
        (completion(logprobs=21), "invalid_parameter", "logprobs"),
        (completion(stop_token_ids=[-1]), "invalid_parameter", "stop_token_ids[0]"),
        # fields that must agree
        (completion(best_of=2), "invalid_parameter", "best_of"),
        (completion(min_tokens=17), "invalid_parameter", "min_tokens"),
        (chat(max_tokens=1, max_completion_tokens=2), "invalid_parameter", "max_tokens"),
        (chat(top_logprobs=3), "invalid_parameter", "top_logprobs"),
    ],
    ids=lambda value: value[-60:].decode() if isinstance(value, bytes) else None,
)
def test_body(raw: bytes, code: str, param: str) -> None:
    error = refused(raw)
    assert (error.code, error.param) == (code, param), error
    assert error.custom_id == "a"  # so that the error can be told to whoever asked


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("template", ['"temperature": %s', '"logit_bias": {"1": %s}', '"max_tokens": %s'])
def test_numbers_that_are_not_finite(number: str, template: str) -> None:
    raw = completion().replace(b'"prompt"', (template % number).encode() + b', "prompt"')
    assert refused(raw).code == ErrorCode.INVALID_PARAMETER


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b"[" * 40 + b"]" * 40])
def test_template_arguments_are_plain_json(value: bytes) -> None:
    raw = chat(chat_template_kwargs={"x": "VALUE"}).replace(b'"VALUE"', value)
    error = refused(raw)
    assert (error.code, error.param) == (ErrorCode.INVALID_PARAMETER, "chat_template_kwargs")


@pytest.mark.parametrize("digits", [20, 100, 4301, 100_000])
def test_huge_integers(digits: int) -> None:
    for raw in (completion(seed="X"), completion(temperature="X"), line({}, custom_id="X")):
        error = refused(raw.replace(b'"X"', b"1" * digits))
        assert error.code in (ErrorCode.INVALID_PARAMETER, ErrorCode.INVALID_REQUEST, ErrorCode.MISSING_PARAMETER)


def test_the_default_limit_is_eight_mebibytes() -> None:
    assert refused(b" " * (MAX_LINE_BYTES + 1)).code == ErrorCode.LINE_TOO_LONG
    assert refused(b" " * MAX_LINE_BYTES).code == ErrorCode.INVALID_JSON


def test_errors_stay_short_whatever_the_line_holds() -> None:
    for raw in (
        completion(**{"x" * 1_000_000: 1}),
        line({}, **{"y" * 1_000_000: 1}),
        b'{"%s":1,"%s":1}' % (b"z" * 100_000, b"z" * 100_000),
        chat(messages=[{"role": "user", "content": "", "q" * 100_000: 1}]),
        chat(messages=[{}] * 100_000),
        completion(prompt=[True] * 100_000),
    ):
        assert len(error_line("id", refused(raw))) < 2000
    assert len(LineError(ErrorCode.INTERNAL, "x" * 10_000, 1).message) == MAX_MESSAGE_CHARS


# Everything below: no input makes the parser raise, and what it accepts means the same to another JSON parser.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
field_names = st.sampled_from(
    sorted({*ChatBody.model_fields, *CompletionBody.model_fields, "tools", "stream", "response_format", "nonsense"})
)
plausible = st.one_of(
    json_values,
    st.sampled_from([0, 1, 1.5, "x", ["x"], [1], [[1]], {"1": 2}, [{"role": "user", "content": "x"}], True, None]),
)
bodies = st.dictionaries(field_names, plausible, max_size=6)


def check_total(raw: bytes) -> None:
    parsed = parse_line(raw, 3)
    if isinstance(parsed, LineError):
        row = json.loads(error_line("batch_req_0", parsed))
        assert row["error"]["code"] == parsed.code
        assert row["error"]["line"] == parsed.line == 3
    else:
        fields = json.loads(raw)
        assert fields["custom_id"] == parsed.custom_id
        for name, value in parsed.body.model_dump(exclude_unset=True).items():
            if name != "messages":
                assert fields["body"][name] == value


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf{}")
@settings(deadline=None)
def test_any_bytes(raw: bytes) -> None:
    check_total(raw)


@given(bodies, st.sampled_from([CHAT, COMPLETIONS]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_fields(body: dict[str, Any], url: str, escape: bool) -> None:
    body = {"model": "m"} | body
    fields = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    raw = json.dumps(fields, ensure_ascii=escape)
    check_total(raw.encode("utf-8", "surrogatepass"))


@given(
    bodies,
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["flip", "cut", "double"])), min_size=1, max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_good_lines_with_damage(body: dict[str, Any], damage: list[tuple[int, str]]) -> None:
    raw = completion(**body)
    for where, what in damage:
        where %= len(raw) + 1
        if what == "flip" and where < len(raw):
            raw = raw[:where] + bytes([raw[where] ^ 1 << where % 8]) + raw[where + 1 :]
        elif what == "cut":
            raw = raw[:where]
        else:
            raw = raw[:where] + raw[where // 2 :]
    check_total(raw)


@given(json_values)
@settings(deadline=None)
def test_any_json_value_as_a_line(value: Any) -> None:
    check_total(json.dumps(value).encode())
