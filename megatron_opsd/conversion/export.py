"""A Megatron model of any layout, streamed out as whole Hugging Face tensors on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_opsd.conversion.load import global_parameters
from megatron_opsd.conversion.mapping import NameTable, Rule, Shape


@dataclass(frozen=True)
class _Entry:
    """A parameter as every rank of the pipeline knows it."""

    stage: int
    name: str
    shape: Shape  # of one tensor-parallel shard
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class Exporter:
    """Streams a model's weights under their Hugging Face names, bucket by bucket, to all ranks at once.

    Every rank of the tensor- and pipeline-parallel groups must iterate: a bucket is one all-gather on the stage that
    owns it and one broadcast along the pipeline. Buckets are never re-used, so a consumer may keep what it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        table: NameTable,
        tp_group: dist.ProcessGroup,
        pp_group: dist.ProcessGroup,
        bucket_bytes: int = 512 * 2**20,
    ) -> None:
        self.table, self.tp_group, self.pp_group = table, tp_group, pp_group
        self._parameters = dict(global_parameters(model))
        self._device = next(iter(self._parameters.values())).device
        own = [
            _Entry(pp_group.rank(), name, tuple(parameter.shape), parameter.dtype)
            for name, parameter in self._parameters.items()
            if not self._is_tied_copy(name)
        ]
        stages: list[list[_Entry]] = [[] for _ in range(pp_group.size())]
        dist.all_gather_object(stages, own, group=pp_group)
        self._entries = [entry for stage in stages for entry in stage]
        self._buckets = self._fill_buckets(bucket_bytes)

    def _is_tied_copy(self, name: str) -> bool:
        return name == "output_layer.weight" and self.table.arch.share_embeddings_and_output_weights

    def _fill_buckets(self, bucket_bytes: int) -> list[list[_Entry]]:
        buckets: list[list[_Entry]] = []
        size = 0
        for entry in self._entries:
            entry_bytes = entry.numel * entry.dtype.itemsize * self.tp_group.size()
            last = buckets[-1][-1] if buckets else None
            alike = last is not None and (last.stage, last.dtype) == (entry.stage, entry.dtype)
            if not alike or size + entry_bytes > bucket_bytes:
                buckets.append([])
                size = 0
            buckets[-1].append(entry)
            size += entry_bytes
        return buckets

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) on every rank; the order is the same on all."""
        for bucket in self._buckets:
            shards = self._transport(bucket)  # [tp, numel]
            offset = 0
            for entry in bucket:
                ranks = shards[:, offset : offset + entry.numel].unflatten(1, entry.shape)
                yield from self._assemble(self.table.rule(entry.name), ranks)
                offset += entry.numel

    @torch.no_grad()
    def _transport(self, bucket: list[_Entry]) -> Tensor:
        numel = sum(entry.numel for entry in bucket)
        shards = torch.empty(self.tp_group.size(), numel, dtype=bucket[0].dtype, device=self._device)
        stage = bucket[0].stage
        if stage == self.pp_group.rank():
            flat = torch.cat([self._parameters[entry.name].reshape(-1) for entry in bucket])
            dist.all_gather_into_tensor(shards.view(-1), flat, group=self.tp_group)
        if self.pp_group.size() > 1:
            dist.broadcast(shards, src=dist.get_global_rank(self.pp_group, stage), group=self.pp_group)
        return shards

    def _assemble(self, rule: Rule, ranks: Tensor) -> Iterator[tuple[str, Tensor]]:
        parts = [rule.split(shard) for shard in ranks]  # [tp][hf tensor]
        for i, (name, shape) in enumerate(rule.hf.items()):
            if rule.dim is None:
                yield name, parts[0][i]
            else:
                whole = torch.cat([rank[i] for rank in parts], dim=rule.dim)
                yield name, whole.narrow(rule.dim, 0, shape[rule.dim])  # without the vocabulary's padding

    @torch.no_grad()
    def checksums(self) -> dict[str, int]:
        """Checksum of every Hugging Face tensor, computed on the shards before any transport; equal on all ranks."""
        names = [name for entry in self._entries for name in self.table.rule(entry.name).hf]
        position = {name: i for i, name in enumerate(names)}
        sums = torch.zeros(len(names), dtype=torch.int64, device=self._device)
        for entry in self._entries:
            rule = self.table.rule(entry.name)
            if entry.stage != self.pp_group.rank() or (rule.dim is None and self.tp_group.rank() > 0):
                continue
            for (name, shape), part in zip(rule.hf.items(), rule.split(self._parameters[entry.name]), strict=True):
                offset = 0 if rule.dim is None else self.tp_group.rank() * part.shape[rule.dim]
                if rule.is_vocab:
                    part = part[: max(0, shape[0] - offset)]
                sums[position[name]] = checksum(part, rule.dim, offset)
        for group in (self.tp_group, self.pp_group):
            dist.all_reduce(sums, group=group)
        return dict(zip(names, sums.tolist(), strict=True))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ELEMENTS_AT_ONCE = 2**22  # of the int64 copy that a checksum makes


def checksum(tensor: Tensor, dim: int | None = None, offset: int = 0) -> Tensor:
    """Checksum of the elements' bit patterns and places: Σ bits · row weight · column weight modulo 2^64, an int64.

    The weights are odd, so that any one changed element shows, and differ, so that an exchange of elements does. A
    shard that starts at ``offset`` along ``dim`` of a whole tensor gives its part of the whole one's checksum.
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
