"""events.jsonl: what happened in a run, and when. Programs read this file; people read the logs, which say the same.

Every line has ``time`` (seconds since 1970) and ``event``. Rank 0 writes the file. A resumed run appends to it.

========  ============================================================================================
start     the first step is about to begin: ``step`` (done so far), ``world_size``, ``layers``
phase     rank 0 has entered ``phase``, a field of ``[timeouts]``
move      something moved on or off rank 0's device: ``what``, ``seconds``, ``free_gib`` [before, after]
          (before the phase for which it makes room)
saved     a checkpoint is complete: ``step``, ``seconds``
warning   something a person should know: ``text``
end       the run has ended: ``outcome``, ``why``. A crash, or a mistake found before the start, leaves none
========  ============================================================================================
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def record(event: str, **fields: Any) -> None:
    """Record one event: in events.jsonl on rank 0, and in the log on every rank."""
    words = ", ".join(f"{name} {value}" for name, value in fields.items())
    level = logging.WARNING if event == "warning" else logging.INFO
    _log.log(level, "%s: %s", event, words, extra={"event": event, "fields": fields})


def write_to(file: Path, earlier: Sequence[str]) -> None:
    """Write this process's events to ``file`` from now on, behind the complete lines of earlier starts."""
    file.write_text("".join(earlier))
    handler = logging.FileHandler(file)
    handler.setFormatter(_JsonLine())
    _log.handlers = [handler]
    _log.setLevel(logging.INFO)


class _JsonLine(logging.Formatter):
    def format(self, record: Any) -> str:
        return json.dumps({"time": record.created, "event": record.event, **record.fields})
