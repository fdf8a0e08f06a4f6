"""What was found damaged when a job was opened or read, and mended: counted, and said in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_MENDED = "the manifest was damaged and was taken from its copy"


@dataclass(slots=True)
class LedgerRepairs:
    """What opening or reading a log found and mended. All zero after a clean stop."""

    torn_bytes: int = 0
    """Cut from the end: what was being written when the process or machine died."""
    corrupt_records: int = 0
    """Damaged stretches of the log (its head included); the lines they held run again."""
    repeated_records: int = 0
    """Records of lines that had one already, or that the job does not have; ignored."""


@dataclass(frozen=True, slots=True)
class JobRepairs:
    """All that was mended in one job."""

    ledger: LedgerRepairs
    restored_errors: int = 0
    """Lines refused at intake whose record was lost; they were checked again."""
    manifest: bool = False
    """The manifest was torn and was taken from its copy."""
    table: bool = False
    """The table of lines was torn and was made anew from the input."""

    log_lost: bool = False
    """The log was gone, or not even its head was left."""

    @property
    def torn_bytes(self) -> int:
        """Of the log's tail."""
        return self.ledger.torn_bytes

    @property
    def corrupt_records(self) -> int:
        """Of the log."""
        return self.ledger.corrupt_records

    def sentences(self) -> list[str]:
        """What to tell people; empty if all was whole."""
        said = []
        if self.manifest:
            said.append(MANIFEST_MENDED)
        if self.table:
            said.append("the table of lines was damaged and was made anew from the input")
        if self.log_lost:
            said.append("the log of results was lost: all lines run again")
        if self.ledger.torn_bytes:
            said.append(f"{self.ledger.torn_bytes} bytes of a torn result were cut off the log; its line runs again")
        if self.ledger.corrupt_records:
            said.append(f"{self.ledger.corrupt_records} damaged stretches of the log: their lines run again")
        if self.ledger.repeated_records:
            said.append(f"{self.ledger.repeated_records} repeated results were ignored")
        if self.restored_errors:
            said.append(f"{self.restored_errors} refused lines were checked again, since their errors were lost")
        return said
