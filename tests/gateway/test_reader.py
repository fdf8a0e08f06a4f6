"""Lines of a file come one by one, whatever their length, with nothing of the file in memory but the line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.api.errors import InputChangedError, InputError
from spillway.gateway.reader import InputFile, RawLine


def read(path: Path, max_bytes: int = 100) -> tuple[list[RawLine], bytes]:
    digest = hashlib.sha256()
    source = InputFile(path)
    try:
        return list(source.lines(max_bytes, digest)), digest.digest()
    finally:
        source.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def test_blank_lines_are_counted_and_skipped(path: Path) -> None:
    path.write_bytes(b"\n one\r\n \t\r\n\r\ntwo")
    lines, _ = read(path)
    assert lines == [RawLine(2, 1, b" one"), RawLine(5, 13, b"two")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    lines, _ = read(path)
    assert lines == [RawLine(1, 3, b"one"), RawLine(2, 7, b"\xef\xbb\xbftwo")]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("over", range(-3, 9))
def test_the_limit_counts_what_is_in_the_line(path: Path, mark: bytes, ending: bytes, over: int) -> None:
    content = b"x" * (100 + over)
    path.write_bytes(mark + content + ending)
    (line,), _ = read(path)
    assert line.content == (content if over <= 0 else None)


def test_a_long_line_does_not_hide_the_next(path: Path) -> None:
    long = b"y" * 5_000_000
    path.write_bytes(b"one\n" + long + b"\ntwo\n" + long)
    lines, _ = read(path)
    assert [(line.number, line.content) for line in lines] == [(1, b"one"), (2, None), (3, b"two"), (4, None)]
    assert lines[2].offset == 4 + len(long) + 1


@given(st.binary(max_size=300), st.integers(1, 40))
@settings(deadline=None)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, limit: int) -> None:
    path = tmp_path_factory.mktemp("any") / "in.jsonl"
    path.write_bytes(content)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"):
        with pytest.raises(InputError):
            read(path)
        return
    lines, digest = read(path, limit)
    assert digest == hashlib.sha256(content).digest()
    expected = []
    text = content.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(text.split(b"\n"), start=1):
        bare = line.removesuffix(b"\r")
        if len(bare) > limit:
            expected.append((number, None))
        elif bare.strip(b" \t\r"):
            expected.append((number, bare))
    assert [(line.number, line.content) for line in lines] == expected
    source = InputFile(path)
    for line in lines:
        if line.content is not None:
            assert source.read_line(line.offset, len(line.content)) == line.content
    source.close()


def test_the_digest_alone(path: Path) -> None:
    path.write_bytes(b"z" * 3_000_000)
    source = InputFile(path)
    assert source.digest() == hashlib.sha256(b"z" * 3_000_000).digest()
    source.close()


def test_files_that_are_not_lines_of_text(path: Path, tmp_path: Path) -> None:
    for content, word in ((b"\xff\xfe{\x00", "UTF-16"), (b"\x1f\x8b\x08", "gzip")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=word):
            read(path)
    with pytest.raises(InputError, match="does not exist"):
        InputFile(tmp_path / "missing")
    with pytest.raises(InputError, match="not a regular file"):
        InputFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        InputFile(tmp_path / "pipe")


def test_a_file_that_is_written_to_is_noticed(path: Path) -> None:
    path.write_bytes(b"one\ntwo\n")
    source = InputFile(path)
    lines = source.lines(100, hashlib.sha256())
    assert next(lines).content == b"one"
    with path.open("ab") as file:
        file.write(b"three\n")
    with pytest.raises(InputChangedError):
        list(lines)
    with pytest.raises(InputChangedError):
        source.read_line(0, 3)
    source.close()


def test_a_file_that_is_replaced_is_still_the_old_one(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"one\n")
    source = InputFile(path)
    (tmp_path / "new").write_bytes(b"new content\n")
    (tmp_path / "new").replace(path)
    assert source.read_line(0, 3) == b"one"
    source.close()
