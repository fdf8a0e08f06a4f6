"""What readers ask of a job that has ended; files that were damaged since are written anew from its log."""

from __future__ import annotations

from dataclasses import dataclass

from spillway.api.errors import JobCorruptError, StorageError
from spillway.api.results import Usage
from spillway.gateway.job import LOG, MANIFEST, JobCounts
from spillway.gateway.manifest import Manifest
from spillway.gateway.paths import JobPaths
from spillway.gateway.repairs import MANIFEST_MENDED
from spillway.gateway.seal import seal_again, sealed_files_are_whole
from spillway.gateway.tail import ResultTail


@dataclass(frozen=True, slots=True)
class SealedResults:
    """Counts and log of a sealed job. `mended` says what was repaired, `trouble` what could not be."""

    counts: JobCounts
    tokens: Usage
    tail: ResultTail | None
    begun_s: int | None = None
    mended: tuple[str, ...] = ()
    trouble: str = ""

    @classmethod
    def load(cls, paths: JobPaths, *, discarded: bool = False) -> SealedResults:
        """Of the job with these files; all empty if it never came to sealing. `discarded`: files may be missing."""
        nothing = cls(JobCounts(0, 0, 0), Usage(0, 0), None)
        try:
            loaded = Manifest.load(paths.directory / MANIFEST)
        except JobCorruptError as error:
            return cls(nothing.counts, nothing.tokens, None, trouble=error.message)
        if loaded is None or loaded[0].sealed is None:
            return nothing
        manifest, torn = loaded
        sealed, log = loaded[0].sealed, paths.directory / LOG
        mended = [MANIFEST_MENDED] if torn else []
        trouble = ""
        if not discarded and not sealed_files_are_whole(paths, sealed):
            try:
                seal_again(paths, manifest, sealed, log)
                mended.append("the sealed files were damaged and were written anew from the log")
            except (JobCorruptError, StorageError) as error:
                trouble = error.message
        return cls(
            JobCounts(manifest.num_lines, sealed.completed, sealed.failed, sealed.errors_by_code),
            Usage(sealed.prompt_tokens, sealed.completion_tokens),
            ResultTail(log, manifest.log_key, manifest.digest()),
            manifest.created,
            tuple(mended),
            trouble,
        )
