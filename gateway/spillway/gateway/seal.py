"""Writing the output and error files in input order, each in one piece.

Nothing here changes the ledger, and both files follow from it alone: sealing that was killed at any point is done again
and writes the same bytes.
"""

from __future__ import annotations

from collections import Counter

from spillway.api.errors import JobCorruptError, StorageError
from spillway.api.results import batch_request_id, error_line
from spillway.gateway.durable import remove, replacing
from spillway.gateway.intake import decode_error
from spillway.gateway.ledger import Ledger
from spillway.gateway.manifest import SealedRecord
from spillway.gateway.paths import JobPaths
from spillway.gateway.records import Record, RecordKind


def seal(ledger: Ledger, num_lines: int, job_digest: bytes, paths: JobPaths) -> SealedRecord:
    """Writes both files. The output is written even if it is empty; the error file only if a line failed.

    Raises JobCorruptError if a result was damaged since the job was opened (its line then counts as not done),
    StorageError if the disk is full or failing; the targets are then as they were.
    """
    try:
        with replacing(paths.output) as output:
            for index in range(num_lines):
                record = _read(ledger, index)
                if record.kind is RecordKind.RESULT:
                    output.write(record.payload)
            output_bytes = output.tell()
        return _seal_errors(ledger, output_bytes, job_digest, paths)
    except OSError as error:
        raise StorageError(
            f"cannot write {paths.output} or {paths.errors}: {error.strerror}",
            "Make room and run again: all results are kept, only the files are written anew.",
        ) from error


def _seal_errors(ledger: Ledger, output_bytes: int, job_digest: bytes, paths: JobPaths) -> SealedRecord:
    codes: Counter[str] = Counter()
    error_bytes = None
    if ledger.num_errors == 0:
        remove(paths.errors)
    else:
        with replacing(paths.errors) as errors:
            for record in ledger.errors():
                error = decode_error(record.payload)
                codes[str(error.code)] += 1
                errors.write(error_line(batch_request_id(job_digest, record.index, error.custom_id), error))
            error_bytes = errors.tell()
    return SealedRecord(ledger.num_results, ledger.num_errors, output_bytes, error_bytes, dict(codes))


def _read(ledger: Ledger, index: int) -> Record:
    record = ledger.read(index)
    if record is None:
        raise JobCorruptError(
            f"the result of line index {index} was damaged on disk",
            "Run again: the line is done anew, the rest is kept.",
        )
    return record
