"""Files that go to the disk while they are being written."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PART = 64 * 2**20  # bytes that are sent to the disk at a time


class Output:
    """A new file whose parts are synchronised behind the writer's back, so that disk and processor work together.

    Left alone, the system would begin when much of its memory waits to be written, and ``close`` would wait for that.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._thread = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._sent = 0

    def write(self, data: Any) -> int:
        """Append bytes.

        Raises:
            OSError: of this part or of the one before.
        """
        written = self._file.write(data)
        if self.tell() - self._sent >= _PART:
            self._sent = self.tell()
            self._file.flush()
            if self._sync:
                self._sync.result()
            self._sync = self._thread.submit(os.fdatasync, self._file.fileno())
        return written

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Returns when all of it is on the disk."""
        self._file.flush()
        self._thread.shutdown()
        if self._sync:
            self._sync.result()
        os.fsync(self._file.fileno())
        self._file.close()
