"""What checkpoints ask for: disk, speed of the file system, the nodes' host memory. docs/plan.md has the sources.

Plain arithmetic on sizes; all results are bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opsd.config import Config, ParallelConfig
from megatron_opsd.reliability.preemption import SAVE_MARGIN


@dataclass(frozen=True)
class SaveMemory:
    """Host memory of a save on a node, besides what the processes hold anyway.

    nodes: how many have a rank that writes. peak: at most on one of them. writing: there, until the last byte is on the
    disk, while training goes on. elsewhere: at most on the others, for a moment.
    """

    nodes: int
    peak: int
    writing: int
    elsewhere: int


def most_checkpoints(config: Config) -> int:
    """How many are on the disk at once at most: those that are kept, and the one that is being written."""
    settings, steps = config.checkpoint, config.train.steps
    if not settings.save_interval:
        return 0
    saved = [*range(settings.save_interval, steps, settings.save_interval), steps]
    if not settings.keep_last:
        return len(saved)
    best = 1 if config.evaluate.interval else 0
    *earlier, _ = saved  # they only become more, so that the most are there while the last one is written
    last, older = earlier[-settings.keep_last :], earlier[: -settings.keep_last]
    every = [step for step in older if settings.keep_every and step % settings.keep_every == 0]
    return len(last) + min(len(older), len(every) + best) + 1


def write_speed(config: Config, checkpoint: int) -> float:
    """Bytes a second with which a save of ``checkpoint`` bytes ends within the signal's lead, as run.py reckons."""
    return SAVE_MARGIN * checkpoint / config.checkpoint.signal_lead_seconds


def save_memory(
    layout: ParallelConfig,
    gpus_per_node: int,
    stages: Sequence[tuple[int, int]],
    ranks_of_a_stage: int,
    written: int,
    distributed: bool,
) -> SaveMemory:
    """Host memory of a save.

    stages: elements of a rank's dense parameters and of its experts, for each pipeline stage. written: bytes an element
    in the checkpoint. distributed: optim.use_distributed_optimizer.

    Dense parameters are written by the first data-parallel rank of each tensor-parallel one, experts by the first rank
    of those that hold them: the first ranks of each stage.
    """
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    nodes = -(-ranks_of_a_stage * len(stages) // gpus_per_node)
    peak, writing = [0] * nodes, [0] * nodes
    writers: set[int] = set()
    for stage, (dense, experts) in enumerate(stages):
        for rank in range(ranks_of_a_stage):
            node = (stage * ranks_of_a_stage + rank) // gpus_per_node
            parts = [(dense, rank < tp, ranks_of_a_stage // tp), (experts, rank < ep, ranks_of_a_stage // ep)]
            held = written * sum(elements for elements, writes, _ in parts if writes)
            peak[node] += max(held, _gathered(parts)) if distributed else held
            writing[node] += held
            writers |= {node} if held else set()
    return SaveMemory(
        nodes=len(writers),
        peak=max(peak[node] for node in writers),
        writing=max(writing[node] for node in writers),
        elsewhere=max((peak[node] for node in range(nodes) if node not in writers), default=0),
    )


def _gathered(parts: list[tuple[int, bool, int]]) -> int:
    """The most that one rank needs while optimizer states are gathered: (elements, whether it writes them, ranks).

    As in Megatron-Core's ``DistributedOptimizer.get_parameter_state_dp_zero``: 12 bytes an element are three float32
    states. A rank copies its own share. The one that writes has the whole states, and while it receives one of them
    three times its size: the parts, the parts joined, and those of the state before. Afterwards the writer copies all
    of its states, because they are views of the gathered ones.
    """
    most = kept = 0
    for elements, writes, ranks in parts:
        own = 12 * -(-elements // ranks)
        most = max(most, kept + own + (24 * elements if writes else 0))
        kept += 12 * elements if writes else 0
    return max(most, 2 * kept)
