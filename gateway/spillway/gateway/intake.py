"""One pass over the input: every line is checked before any line runs.

While the file streams through, each line leaves 16 bytes of table, 21 bytes of duplicate check and its prefix keys (in
a scratch file); errors go straight to the ledger. So memory is a matter of the number of lines, not of what they hold.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from spillway.api.errors import ErrorCode, InputError, LineError, StorageError
from spillway.api.lines import BatchLine
from spillway.gateway.families import LEVELS, families
from spillway.gateway.options import LineRules
from spillway.gateway.order import PrefixOrder, most_tokens, prompt_bytes
from spillway.gateway.reader import InputFile, Progress, RawLine
from spillway.gateway.records import Record, RecordKind, encode, file_header
from spillway.gateway.table import LINE_DTYPE, LineTable

MAX_LINES = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Intake:
    """What a pass over the input yields. `input_digest` is the SHA-256 of the file."""

    table: LineTable
    input_digest: bytes


def take_in(
    source: InputFile, log_path: Path, log_key: int, rules: LineRules, progress: Progress | None = None
) -> Intake:
    """Checks every line, writes the errors into a new ledger at `log_path`, and orders the rest by shared prefix.

    Raises InputError for a file without any line, InputChangedError, StorageError.
    """
    try:
        with log_path.open("wb") as log, tempfile.TemporaryFile(dir=log_path.parent) as scratch:
            log.write(file_header(log_key))
            collected = _Collector(log, log_key, scratch)
            digest = hashlib.sha256()
            for raw in source.lines(rules.max_bytes, digest, progress):
                collected.add(raw, rules.check(raw.content, raw.number))
            table = collected.table(source)
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot prepare the job in {log_path.parent}: {error}", "Make room and run again."
        ) from error
    if len(table.lines) == 0:
        raise InputError(f"the input {source.path} holds no request line", "Give it one JSON object per line.")
    return Intake(table, digest.digest())


def encode_error(error: LineError) -> bytes:
    """A LineError as the ledger keeps it."""
    return msgspec.json.encode(error)


def decode_error(payload: bytes) -> LineError:
    """The LineError in a ledger record."""
    return msgspec.json.decode(payload, type=LineError)


def refusal(source: InputFile, line: np.void, rules: LineRules) -> LineError:
    """Why a line of the table does not run: what is wrong with it alone, else that it repeats a custom_id.

    Raises InputChangedError.
    """
    number, length = int(line["number"]), int(line["length"])
    raw = source.read_line(int(line["offset"]), length) if length else None
    checked = rules.check(raw, number)
    if isinstance(checked, LineError):
        return checked
    return LineError(
        ErrorCode.DUPLICATE_CUSTOM_ID, "an earlier line has this custom_id", number, "custom_id", checked.custom_id
    )


class _Collector:
    """Flat columns that grow line by line."""

    def __init__(self, log: BinaryIO, log_key: int, scratch: BinaryIO) -> None:
        self._log, self._log_key = log, log_key
        self._order = PrefixOrder(scratch)
        self._offsets, self._lengths, self._numbers = array("Q"), array("I"), array("I")
        self._valid = array("B")
        self._names = array("Q")  # two words of digest for each line with a usable custom_id
        self._named = array("I")  # and that line's index

    def add(self, raw: RawLine, checked: BatchLine | LineError) -> None:
        """Takes in the next line."""
        index = len(self._offsets)
        if index >= MAX_LINES:
            raise InputError(f"more than {MAX_LINES} lines", "Split the input.")
        self._offsets.append(raw.offset)
        self._lengths.append(len(raw.content or b""))
        self._numbers.append(raw.number)
        if checked.custom_id is not None:
            self._names.frombytes(xxhash.xxh3_128_digest(checked.custom_id.encode("utf-8")))
            self._named.append(index)
        self._valid.append(isinstance(checked, BatchLine))
        if isinstance(checked, BatchLine):
            self._order.add(*prompt_bytes(checked.body), most_tokens(checked.body))
        else:
            self._write_error(index, checked)

    def table(self, source: InputFile) -> LineTable:
        """The finished table; lines whose custom_id was taken get their error here."""
        lines = np.zeros(len(self._offsets), dtype=LINE_DTYPE)
        for name, column in (("offset", self._offsets), ("length", self._lengths), ("number", self._numbers)):
            lines[name] = np.frombuffer(column, dtype=LINE_DTYPE[name])
        valid = np.array(np.frombuffer(self._valid, dtype=bool))
        runnable = np.flatnonzero(valid).astype(np.uint32)
        for index in self._repeated_names():
            if valid[index]:
                valid[index] = False
                self._write_error(int(index), refusal(source, lines[index], LineRules(MAX_LINES)))
        numbers = self._order.order()
        numbers = numbers[valid[runnable[numbers]]]
        return LineTable(
            lines, runnable[numbers], tuple(families(*self._order.keys_at(each, numbers)) for each in LEVELS)
        )

    def _repeated_names(self) -> npt.NDArray[np.uint32]:
        """Indices of lines whose custom_id an earlier line has, in order of the file."""
        words = np.frombuffer(self._names, dtype=np.uint64).reshape(-1, 2)
        indices = np.frombuffer(self._named, dtype=np.uint32)
        by_name = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal names stay in order of the file
        ordered = words[by_name]
        repeats = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
        return np.sort(indices[by_name[repeats]])

    def _write_error(self, index: int, error: LineError) -> None:
        self._log.write(encode(Record(index, RecordKind.ERROR, encode_error(error)), self._log_key))
