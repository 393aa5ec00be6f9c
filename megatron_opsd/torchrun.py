"""torchrun: starting this machine's ranks with it, and what a rank leaves for its report."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def start_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``opsd`` with ``arguments`` on so many ranks of this machine. Returns the exit status, 0 if all is well.

    The ranks say what is wrong themselves, so that nothing is added here but which of them failed first.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which would say so in five lines
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    command = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}", "-m", "megatron_opsd"]
    try:
        run.run(run.parse_args([*command, *arguments]))
    except SignalException as signal:  # the ranks have had theirs, and time to save
        return 128 + signal.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:  # a mistake, which the rank has explained
            return 2
        how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        print(
            f"opsd: rank {rank} failed ({how}); see above, and logs/ of the run's folder", file=sys.stderr, flush=True
        )
        return 1
    return 0


def leave_for_report(error: Exception) -> None:
    """Have torchrun end its report of failed ranks with this error."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"py_callstack": f"opsd: {error}", "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": f"opsd: {error}", "extraInfo": about}}))
