"""Writing the output and error files in input order, each in one piece.

Nothing here changes the ledger, and both files follow from it alone: sealing that was killed at any point is done again
and writes the same bytes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from spillway.api.errors import JobCorruptError, StorageError
from spillway.api.results import Usage, batch_request_id, error_line
from spillway.gateway.durable import remove, replacing
from spillway.gateway.intake import decode_error
from spillway.gateway.ledger import Ledger
from spillway.gateway.manifest import Manifest, SealedRecord
from spillway.gateway.paths import JobPaths
from spillway.gateway.records import Record, RecordKind


def seal(ledger: Ledger, job_digest: bytes, paths: JobPaths, tokens: Usage) -> SealedRecord:
    """Writes both files. The output is written even if it is empty; the error file only if a line failed.

    `tokens`: those of all results, for the record. Raises JobCorruptError if a result was damaged since the job was
    opened (its line then counts as not done), StorageError if the disk is full or failing; the targets are then as
    they were.
    """
    try:
        with replacing(paths.output) as output:
            for index in range(ledger.num_lines):
                record = _read(ledger, index)
                if record.kind is RecordKind.RESULT:
                    output.write(record.payload)
            output_bytes = output.tell()
        codes, error_bytes = _seal_errors(ledger, job_digest, paths)
        return SealedRecord(
            completed=ledger.num_results,
            failed=ledger.num_errors,
            output_bytes=output_bytes,
            error_bytes=error_bytes,
            errors_by_code=codes,
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
        )
    except OSError as error:
        raise StorageError(
            f"cannot write {paths.output} or {paths.errors}: {error.strerror}",
            "Make room and run again: all results are kept, only the files are written anew.",
        ) from error


def sealed_files_are_whole(paths: JobPaths, sealed: SealedRecord) -> bool:
    """Whether both files have the size that was written."""
    sizes = [path.stat().st_size if path.exists() else None for path in (paths.output, paths.errors)]
    return sizes == [sealed.output_bytes, sealed.error_bytes]


def seal_again(paths: JobPaths, manifest: Manifest, sealed: SealedRecord, log: Path) -> None:
    """Writes the files of a sealed job anew from the log that was kept.

    Raises JobCorruptError if the log is damaged, too; StorageError.
    """
    tokens = Usage(sealed.prompt_tokens, sealed.completion_tokens)
    ledger = Ledger(log, manifest.num_lines, manifest.log_key)
    try:
        if not ledger.undone().any() and seal(ledger, manifest.digest(), paths, tokens) == sealed:
            return
    finally:
        ledger.close()
    raise JobCorruptError(
        f"results of {paths.directory} are damaged, and its log cannot restore them", "Submit the input again."
    )


def _seal_errors(ledger: Ledger, job_digest: bytes, paths: JobPaths) -> tuple[dict[str, int], int | None]:
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
    return dict(codes), error_bytes


def _read(ledger: Ledger, index: int) -> Record:
    record = ledger.read(index)
    if record is None:
        raise JobCorruptError(
            f"the result of line index {index} was damaged on disk",
            "Run again: the line is done anew, the rest is kept.",
        )
    return record
