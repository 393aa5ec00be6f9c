"""A Megatron model of any layout, streamed out as whole Hugging Face tensors on every rank."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_opsd.weights.load import global_parameters
from megatron_opsd.weights.mapping import NameTable, Rule, Shape


@dataclass(frozen=True)
class _Entry:
    """What all ranks of the pipeline know of a parameter."""

    stage: int
    name: str  # with the expert's number on its rank
    is_expert: bool
    shape: Shape  # of one rank's shard
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def kind(self) -> tuple[int, bool, torch.dtype]:
        """Parameters of one kind can travel together."""
        return self.stage, self.is_expert, self.dtype


class Exporter:
    """Streams a model's weights under their Hugging Face names, bucket by bucket, to all ranks at once.

    Every rank must iterate. For each bucket, the stage that owns it does one all-gather over the tensor-parallel ranks
    (for experts: over the expert-parallel ranks), and one broadcast follows along the pipeline. The memory of a bucket
    is never reused, so a consumer may keep the tensors.
    """

    def __init__(
        self,
        model_chunks: Iterable[nn.Module],
        table: NameTable,
        tp_group: dist.ProcessGroup,
        pp_group: dist.ProcessGroup,
        ep_group: dist.ProcessGroup,
        bucket_bytes: int = 512 * 2**20,
    ) -> None:
        self.table, self.tp_group, self.pp_group, self.ep_group = table, tp_group, pp_group, ep_group
        self._parameters = dict(global_parameters(model_chunks))
        self._device = next(iter(self._parameters.values())).device
        own = [
            _Entry(pp_group.rank(), name, table.rule(name).is_expert, tuple(parameter.shape), parameter.dtype)
            for name, parameter in self._parameters.items()
            if not self._is_tied_copy(name)
        ]
        stages: list[list[_Entry]] = [[] for _ in range(pp_group.size())]
        dist.all_gather_object(stages, own, group=pp_group)
        self._entries = [entry for stage in stages for entry in stage]
        self._buckets = self._fill_buckets(bucket_bytes)

    def _is_tied_copy(self, name: str) -> bool:
        return name == "output_layer.weight" and self.table.arch.share_embeddings_and_output_weights

    def _shard_group(self, entry: _Entry) -> dist.ProcessGroup:
        """The ranks that hold different shards under the entry's name."""
        return self.ep_group if entry.is_expert else self.tp_group

    def _rules(self, entry: _Entry) -> list[Rule]:
        """The entry's rule; for experts, the rule of each expert-parallel rank."""
        if not entry.is_expert:
            return [self.table.rule(entry.name)]
        ranks = self.ep_group.size()
        return [self.table.rule(entry.name, rank * self.table.experts_per_rank(ranks)) for rank in range(ranks)]

    def _fill_buckets(self, bucket_bytes: int) -> list[list[_Entry]]:
        buckets: list[list[_Entry]] = []
        size = 0
        # Keep the model's order, so that a consumer gets one complete layer before the next. With experts the kind
        # changes twice in each layer, so a bucket is then a part of a layer.
        for entry in self._entries:
            entry_bytes = entry.numel * entry.dtype.itemsize * self._shard_group(entry).size()
            if not buckets or buckets[-1][-1].kind != entry.kind or size + entry_bytes > bucket_bytes:
                buckets.append([])
                size = 0
            buckets[-1].append(entry)
            size += entry_bytes
        return buckets

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) on every rank; the order is the same on all."""
        for bucket in self._buckets:
            shards = self._transport(bucket)  # [tp or ep, numel]
            offset = 0
            for entry in bucket:
                yield from self._assemble(entry, shards[:, offset : offset + entry.numel].unflatten(1, entry.shape))
                offset += entry.numel

    @torch.no_grad()
    def _transport(self, bucket: list[_Entry]) -> Tensor:
        stage, group = bucket[0].stage, self._shard_group(bucket[0])
        numel = sum(entry.numel for entry in bucket)
        shards = torch.empty(group.size(), numel, dtype=bucket[0].dtype, device=self._device)
        if stage == self.pp_group.rank():
            flat = torch.cat([self._parameters[entry.name].reshape(-1) for entry in bucket])
            dist.all_gather_into_tensor(shards.view(-1), flat, group=group)
        if self.pp_group.size() > 1:
            dist.broadcast(shards, src=dist.get_global_rank(self.pp_group, stage), group=self.pp_group)
        return shards

    def _assemble(self, entry: _Entry, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
        rules = self._rules(entry)
        if entry.is_expert:
            for rule, shard in zip(rules, shards, strict=True):  # each rank's shard is another expert
                yield from zip(rule.hf, rule.split(shard), strict=True)
            return
        (rule,) = rules
        parts = [rule.split(shard) for shard in shards]  # [tp][hf tensor]
        for i, (name, shape) in enumerate(rule.hf.items()):
            if rule.dim is None:
                yield name, parts[0][i]
            else:
                whole = torch.cat([rank[i] for rank in parts], dim=rule.dim)
                yield name, whole.narrow(rule.dim, 0, shape[rule.dim])  # without the vocabulary's padding

    @torch.no_grad()
    def checksums(self) -> dict[str, int]:
        """Checksum of every Hugging Face tensor, computed on the shards before any transport; equal on all ranks."""
        names = [name for entry in self._entries for rule in self._rules(entry) for name in rule.hf]
        position = {name: i for i, name in enumerate(names)}
        sums = torch.zeros(2, len(names), dtype=torch.int64, device=self._device)  # of dense tensors, of experts
        tp_rank, ep_rank = self.tp_group.rank(), self.ep_group.rank()
        for entry in self._entries:
            rule = self._rules(entry)[ep_rank if entry.is_expert else 0]
            replicated = rule.dim is None and not entry.is_expert
            if entry.stage != self.pp_group.rank() or (replicated and tp_rank > 0):
                continue
            for (name, shape), part in zip(rule.hf.items(), rule.split(self._parameters[entry.name]), strict=True):
                offset = 0 if rule.dim is None else tp_rank * part.shape[rule.dim]
                if rule.is_vocab:
                    part = part[: max(0, shape[0] - offset)]
                sums[int(entry.is_expert), position[name]] = checksum(part, rule.dim, offset)
        dist.all_reduce(sums[0], group=self.tp_group)
        dist.all_reduce(sums[1], group=self.ep_group)
        total = sums.sum(0)
        dist.all_reduce(total, group=self.pp_group)
        return dict(zip(names, total.tolist(), strict=True))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ELEMENTS_AT_ONCE = 2**22  # of the int64 copy that a checksum makes


def checksum(tensor: Tensor, dim: int | None = None, offset: int = 0) -> Tensor:
    """Checksum of the elements' bit patterns and places: Σ bits · row weight · column weight modulo 2^64, an int64.

    The weights are odd, so that it detects any one changed element. They differ, so that it detects exchanged elements.
    A shard that starts at ``offset`` along ``dim`` of a whole tensor gives its part of the checksum of the whole.
    """
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).reshape(tensor.shape[0], -1)
    rows, columns = (
        torch.arange(size, dtype=torch.int64, device=tensor.device) + (offset if dim == axis else 0)
        for axis, size in enumerate(bits.shape)
    )
    row_weights, column_weights = rows * 0x9E3779B97F4A + 1, columns * 0xC2B2AE3D27D4 + 1  # even factors: odd weights
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, bits.shape[1]))
    for part, weights in zip(bits.split(step), row_weights.split(step), strict=True):
        total += ((part.long() * column_weights).sum(1) * weights).sum()
    return total
