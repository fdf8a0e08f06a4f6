"""Group fsync: one thread makes what was written durable soon after, so that no writer waits for a disk."""

from __future__ import annotations

import os
import threading
import time

from spillway.api.errors import StorageError


class GroupSync:
    """Syncs a descriptor within `interval_s` of a write, at once when `max_bytes` are waiting.

    After a failed sync the kernel may have dropped pages, and a later sync would claim success: the failure is kept and
    every later call raises it.
    """

    def __init__(self, descriptor: int, interval_s: float, max_bytes: int) -> None:
        self._fd, self._interval_s, self._max_bytes = descriptor, interval_s, max_bytes
        self._changed = threading.Condition()
        self._written_bytes = 0
        self._synced_bytes = 0
        self._due_s: float | None = None  # when the oldest waiting write must be synced; None: nothing waits
        self._failure: OSError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="spillway-ledger-sync", daemon=True)
        self._thread.start()

    @property
    def synced_bytes(self) -> int:
        """Length of the part of the file, from its start, that would survive a power cut."""
        return self._synced_bytes

    def wrote(self, end_bytes: int) -> None:
        """Notes that the file was just written up to `end_bytes`. Raises StorageError if an earlier sync failed."""
        with self._changed:
            self._raise_failure()
            if self._due_s is None:
                self._due_s = time.monotonic() + self._interval_s
                self._changed.notify_all()
            self._written_bytes = max(self._written_bytes, end_bytes)
            if self._written_bytes - self._synced_bytes >= self._max_bytes and self._due_s > 0:
                self._due_s = 0
                self._changed.notify_all()

    def sync(self) -> None:
        """Returns once everything written so far is durable. Raises StorageError."""
        with self._changed:
            self._raise_failure()
        self._sync_now()
        with self._changed:
            self._raise_failure()

    def close(self) -> None:
        """Syncs and ends the thread. Raises StorageError."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.sync()

    def _run(self) -> None:
        while self._wait_until_due():
            self._sync_now()

    def _wait_until_due(self) -> bool:
        with self._changed:
            while not self._closing:
                if self._due_s is None:
                    self._changed.wait()
                elif (left_s := self._due_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                else:
                    self._due_s = None
                    return True
            return False

    def _sync_now(self) -> None:
        with self._changed:
            end_bytes = self._written_bytes
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            with self._changed:
                self._failure = error
            return
        with self._changed:
            self._synced_bytes = max(self._synced_bytes, end_bytes)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StorageError(
                f"the disk could not keep the results of the last moments: {self._failure.strerror}",
                "Check the disk and run again: what is whole in the ledger is kept, the rest runs again.",
            ) from self._failure
