"""Files over HTTP: what goes up comes down, whole or in part, and nobody sees another's."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from http_ground import Door, prompts, serving, until

from spillway.api.batch.v1 import batch_pb2

MAX_INPUT_BYTES = 1 << 20


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("door")
    (folder / "limits.toml").write_text(
        "[tenant.small]\ninput_bytes = 2000\n[tenant.once]\ninput_bytes = 2000\n"
        "[tenant.slow]\ncalls_per_second = 0.01\n"
    )
    with serving(folder, "--max-input", "1MiB", "--limits", str(folder / "limits.toml"), tokens=True) as door:
        yield door


def form(*parts: tuple[str, str], boundary: str = "xyz") -> dict[str, bytes | str]:
    """A form by hand: (what follows `form-data; `, content)."""
    body = "".join(f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n{text}\r\n" for head, text in parts)
    return {
        "body": f"{body}--{boundary}--\r\n".encode(),
        "Content_Type": f"multipart/form-data; boundary={boundary}",
    }


def test_a_file_goes_up_and_comes_down_and_goes_away(door: Door) -> None:
    content = prompts(50)
    with door.client() as client:
        made = client.files.create(file=("my batch.jsonl", content), purpose="batch")
        assert (made.object, made.bytes, made.purpose) == ("file", len(content), "batch")
        assert made.filename == "my batch.jsonl"
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).read() == content
        assert made.id in [each.id for each in client.files.list(purpose="batch")]
        gone = client.files.delete(made.id)
        assert gone.deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                call(made.id)
            assert refused.value.code == "file_not_found"


def test_an_upload_needs_no_order_of_its_fields_and_no_length(door: Door) -> None:
    content = prompts(1).decode()
    made = door.call("POST", "/v1/files", **form(('name="file"; filename="x"', content), ('name="purpose"', "batch")))
    assert made.status == 200
    assert door.call("GET", f"/v1/files/{made.json['id']}/content").content == content.encode()


def test_lists_come_in_pages_by_time(door: Door) -> None:
    ids = [door.upload(prompts(1), "token-of-b") for _ in range(5)]
    with door.client("token-of-b") as client:
        assert [each.id for each in client.files.list(limit=2)] == ids[::-1]  # the client asks for page after page
        assert [each.id for each in client.files.list(limit=2, order="asc")] == ids
        first = client.files.list(limit=2, after=ids[3])
        assert [each.id for each in first.data] == [ids[2], ids[1]]
        assert first.has_more
        assert not client.files.list(after=ids[0]).data
        assert not client.files.list(purpose="assistants").data


def test_another_tenants_file_does_not_exist(door: Door) -> None:
    mine = door.upload(prompts(3))
    with door.client("token-of-b") as stranger:
        for call in (
            lambda: stranger.files.retrieve(mine),
            lambda: stranger.files.content(mine),
            lambda: stranger.files.delete(mine),
            lambda: stranger.files.list(after=mine),
            lambda: stranger.batches.create(input_file_id=mine, endpoint="/v1/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                call()
            assert refused.value.code == "file_not_found"
    assert door.call("GET", f"/v1/files/{mine}").status == 200


@pytest.mark.parametrize("token", [None, "", "wrong", "token-of-a\tx"])
def test_nobody_gets_in_without_a_known_token(door: Door, token: str | None) -> None:
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file-0/content"),
        ("DELETE", "/v1/files/file-0"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches/batch_0/cancel"),
        ("GET", "/v1/models"),
        ("GET", "/api/overview"),
        ("GET", "/metrics"),
        ("HEAD", "/v1/files"),
    ):
        refused = door.call(method, path, token)
        assert refused.status == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        assert method == "HEAD" or refused.code == "invalid_api_key"


def test_each_token_is_for_its_kind(door: Door) -> None:
    both = {"token-of-a", "monitor"}
    for path, allowed in (("/v1/files", {"token-of-a"}), ("/metrics", {"monitor"}), ("/api/overview", both)):
        for token in ("token-of-a", "agent", "monitor"):
            answer = door.call("GET", path, token)
            assert answer.status == (200 if token in allowed else 403), (path, token)
            assert token in allowed or answer.code == "forbidden"


def test_ranges_are_what_they_say_and_resume_a_download(door: Door) -> None:
    content = prompts(200)
    path = f"/v1/files/{door.upload(content)}/content"
    whole = door.call("GET", path)
    assert (whole.status, whole.content, whole.headers["accept-ranges"]) == (200, content, "bytes")
    size = len(content)
    for asked, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        (f"bytes={size - 5}-", size - 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size + 100}", 5, size),
        (f"bytes=-{size + 100}", 0, size),
    ):
        part = door.call("GET", path, Range=asked)
        assert (part.status, part.content) == (206, content[start:stop]), asked
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    for asked in (f"bytes={size}-", "bytes=9-3", "bytes=a-b", "lines=0-1", "bytes=0-1,5-6"):
        refused = door.call("GET", path, Range=asked)
        assert (refused.status, refused.code) == (416, "range_not_satisfiable"), asked
    got = b""
    while len(got) < size:  # a client that loses its connection every 1000 bytes
        stretch = f"bytes={len(got)}-{len(got) + 999}"
        got += door.call("GET", path, Range=stretch, If_Match=whole.headers["etag"]).content
    assert got == content
    assert door.call("GET", path, Range="bytes=5-", If_Match='"other"').status == 412


def test_quotas_and_rates_are_those_of_the_tenant(door: Door) -> None:
    kept = door.upload(b"x" * 1500, "token-of-small")
    with door.client("token-of-small") as client:
        with pytest.raises(openai.RateLimitError) as refused:
            door.upload(b"x" * 1500, "token-of-small")
        assert refused.value.code == "quota_bytes"
        client.files.delete(kept)
        door.upload(b"x" * 1500, "token-of-small")
    assert door.call("GET", "/v1/files", "token-of-slow").status == 200
    refused = door.call("GET", "/v1/files", "token-of-slow")
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 100
    assert door.call("GET", "/api/overview", "token-of-slow").status == 200  # the page does not count


def test_a_file_and_the_batches_made_of_it_count_once(door: Door) -> None:
    """So do files of equal content; what counts is what lies on the disk, and it goes with the last that needs it."""
    content = prompts(12)
    assert 1000 < len(content) < 2000  # the quota
    inputs = door.folder / "jobs" / "inputs"
    before = set(inputs.iterdir())
    with door.client("token-of-once") as client:
        file = door.upload(content, "token-of-once")
        wanted = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batches = [client.batches.create(**wanted).id for _ in range(2)]
        (stored,) = set(inputs.iterdir()) - before
        assert stored.stat().st_nlink == 4
        with pytest.raises(openai.RateLimitError) as refused:
            door.upload(prompts(13), "token-of-once")
        assert refused.value.code == "quota_bytes"
        client.files.delete(file)
        for name in batches:
            client.batches.cancel(name)
            door.ended(name, "token-of-once")
    with door.jobs("token-of-once") as stub:
        for name in batches:
            stub.DeleteJob(batch_pb2.DeleteJobRequest(name=f"jobs/{name.removeprefix('batch_')}"))
    assert not stored.exists()
    door.upload(prompts(13), "token-of-once")


def test_an_upload_over_the_quota_is_refused_before_it_is_sent_or_while_it_comes_in(door: Door) -> None:
    stated = door.call(
        "POST",
        "/v1/files",
        "token-of-small",
        body=b"",
        Content_Length=str(1 << 19),
        Content_Type="multipart/form-data; boundary=x",
    )
    assert (stated.status, stated.code) == (429, "quota_bytes")

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(1 << 9):  # more than the gateway takes from anybody: so it did not wait for the end
            yield b"x" * 4096

    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
    headers = {"Authorization": "Bearer token-of-small", "Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/v1/files", endless(), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (429, "quota_bytes")
    connection.close()
    until(lambda: not list((door.folder / "jobs" / "incoming").iterdir()), "nothing is left of it")


def test_what_is_too_large_leaves_nothing_behind(door: Door) -> None:
    before = door.call("GET", "/v1/files").json["data"]
    with door.client() as client, pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("big.jsonl", b"x" * (MAX_INPUT_BYTES + 1)), purpose="batch")
    assert (refused.value.status_code, refused.value.code) == (413, "input_too_large")
    stated = door.call(
        "POST", "/v1/files", body=b"", Content_Length=str(1 << 40), Content_Type="multipart/form-data; boundary=x"
    )
    assert (stated.status, stated.code) == (413, "input_too_large")
    assert door.call("GET", "/v1/files").json["data"] == before
    assert not list((door.folder / "jobs" / "incoming").iterdir())


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([('name="purpose"', "batch")], "file"),
        ([('name="file"; filename="x"', "{}\n")], "purpose"),
        ([('name="file"; filename="x"', "{}\n"), ('name="purpose"', "fine-tune")], "purpose"),
        ([('name="file"; filename="x"', ""), ('name="purpose"', "batch")], "file"),
        ([('name="file"; filename="x"', "1"), ('name="file"; filename="y"', "2")], "file"),
        ([('name="purpose"', "b" * 2000)], "purpose"),
        ([('name="file"; filename="x"', "{}"), ('name="purpose"', "batch"), ('name="other"', "1")], "other"),
        ([('name="file"; filename="' + "x" * 300 + '"', "{}"), ('name="purpose"', "batch")], "file"),
        (
            [('name="file"; filename="x"', "{}"), ('name="purpose"', "batch"), ('name="expires_after[seconds]"', "9")],
            "expires_after[anchor]",
        ),
        (
            [
                ('name="file"; filename="x"', "{}"),
                ('name="purpose"', "batch"),
                ('name="expires_after[anchor]"', "created_at"),
                ('name="expires_after[seconds]"', "9"),
            ],
            "expires_after[seconds]",
        ),
    ],
)
def test_a_bad_form_names_its_field(door: Door, parts: list[tuple[str, str]], param: str) -> None:
    refused = door.call("POST", "/v1/files", **form(*parts))
    assert (refused.status, refused.code, refused.json["error"]["param"]) == (400, "invalid_argument", param)


def test_a_form_that_breaks_off_is_no_file(door: Door) -> None:
    whole = form(('name="purpose"', "batch"), ('name="file"; filename="x"', "line\n" * 1000))
    body = bytes(whole.pop("body"))
    before = door.call("GET", "/v1/files").json["data"]
    for cut in (10, 100, 1000, len(body) - 5):
        refused = door.call("POST", "/v1/files", body=body[:cut], **whole)
        assert (refused.status, refused.code) == (400, "invalid_argument")
    assert door.call("GET", "/v1/files").json["data"] == before


def test_a_file_may_say_how_long_it_is_kept(door: Door) -> None:
    with door.client() as client:
        made = client.files.create(
            file=("x", prompts(1)), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert made.expires_at == made.created_at + 3600
    record = next((door.folder / "jobs" / "files" / "a").glob(f"{made.id.removeprefix('file-')}/file.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"expires_s": 1.0}))  # time passes
    assert door.call("GET", f"/v1/files/{made.id}").status == 404
    assert made.id not in [each["id"] for each in door.call("GET", "/v1/files").json["data"]]


def test_pages_of_others_cannot_call(door: Door, tmp_path: Path) -> None:
    assert door.call("GET", "/v1/files", Origin="https://evil.example").status == 403
    assert door.call("GET", "/v1/files", Origin=f"http://127.0.0.1:{door.port}").status == 200
    with serving(tmp_path) as open_door:  # no token: any page of a browser here could call, if it were answered
        assert open_door.call("GET", "/v1/files", None).status == 200
        assert open_door.call("GET", "/v1/files", None, Host=f"localhost:{open_door.port}").status == 200
        assert open_door.call("GET", "/v1/files", None, Host=f"rebound.example:{open_door.port}").status == 403
        assert open_door.call("POST", "/v1/files", None, Origin="null").status == 403


def test_files_outlive_the_gateway(tmp_path: Path) -> None:
    content = prompts(7)
    with serving(tmp_path) as door:
        name = door.upload(content)
        half = tmp_path / "jobs" / "files" / "default" / ("0" * 28)
        half.mkdir()  # what a crash in the middle of a deletion leaves
        (half / "input.jsonl").write_bytes(b"x")
    with serving(tmp_path) as door:
        assert door.call("GET", f"/v1/files/{name}/content").content == content
        assert [each["id"] for each in door.call("GET", "/v1/files").json["data"]] == [name]
        until(lambda: not half.exists(), "the rest of a deleted file is swept away")
