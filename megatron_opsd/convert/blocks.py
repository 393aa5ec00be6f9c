"""A whole model as a list of blocks: pieces of tensors in Megatron's checkpoint, with the Hugging Face rows that they
are made of. The same list is used for both directions, for the verification and for any number of ranks.

Checkpoints do not depend on the layout: tensors are whole, and those of all layers and all experts are stacked. A key
is the parameter's name in Transformer Engine's layers, without the numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_opsd.weights.mapping import NameTable, Rule, Shape
from megatron_opsd.weights.tables import FAMILIES, Row


@dataclass(frozen=True)
class Block:
    """Rows of one layer's (and expert's) part of a tensor.

    keys: names of the tensor in the checkpoint; if there are two, a model's layers ask for one or the other.
    shape: of the whole tensor, layers and experts first.
    offset, size: the block's place in it. The first ``lead`` axes count layers and experts.
    rule: how the block is made of the rows ``start:stop`` of each of the rule's Hugging Face tensors.
    """

    keys: tuple[str, ...]
    shape: Shape
    offset: Shape
    size: Shape
    lead: int
    rule: Rule
    start: int
    stop: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def extra_state(self) -> str | None:
        """The key of the object that Megatron's linear layers store with their weight. It is empty, but required.

        The first block of a weight has it.
        """
        module, _, parameter = self.keys[0].rpartition(".")
        if parameter != "weight" or ".linear_" not in module or any(self.offset[self.lead :]):
            return None
        index, of = (".".join(map(str, axes[: self.lead])) for axes in (self.offset, self.shape))
        return f"{module}._extra_state/shard_{index}_{of}"


def whole_model(table: NameTable, max_elements: float = math.inf) -> Iterator[Block]:
    """All blocks, layer by layer; the blocks of one Hugging Face tensor follow one another.

    max_elements: of a block. A tensor that is fused by query groups is one block of any size.
    """
    arch = table.arch
    rows = FAMILIES[arch.family]
    for row in rows:
        tied_head = row.megatron == "output_layer.weight" and arch.share_embeddings_and_output_weights
        if "{layer}" not in row.megatron and not tied_head:
            yield from _blocks(table, row, max_elements, {})
    for layer in range(arch.num_layers):
        for row in rows:
            if "{expert}" in row.megatron:
                for expert in range(arch.moe.num_moe_experts if arch.moe else 0):
                    yield from _blocks(table, row, max_elements, {"layer": layer, "expert": expert})
            elif "{layer}" in row.megatron:
                yield from _blocks(table, row, max_elements, {"layer": layer})


def _blocks(table: NameTable, row: Row, max_elements: float, numbers: dict[str, int]) -> Iterator[Block]:
    rule = table.rule(row.megatron.format(**numbers))
    counts = {"layer": table.arch.num_layers, "expert": table.experts_per_rank(1)}
    shapes = list(rule.hf.values())
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:]
    keys = _keys(row)
    shape = (*(counts[axis] for axis in numbers), rows, *columns)

    def block(part: Rule, first: int, size: int, start: int, stop: int | None) -> Block:
        offset = (*numbers.values(), first, *(0 for _ in columns))
        lengths = (*(1 for _ in numbers), size, *columns)
        return Block(keys, shape, offset, lengths, len(numbers), part, start, stop)

    if rule.group_rows is not None:
        yield block(rule, 0, rows, 0, None)
        return
    step = max(1, int(min(max_elements, rows * math.prod(columns)) // math.prod(columns)))
    first = 0
    for name, hf_shape in rule.hf.items():  # they follow one another, so each has its own blocks
        for start in range(0, hf_shape[0], step):
            stop = min(start + step, hf_shape[0])
            yield block(replace(rule, hf={name: hf_shape}), first + start, stop - start, start, stop)
        first += hf_shape[0]


def _keys(row: Row) -> tuple[str, ...]:
    if "{expert}" in row.megatron:
        return (row.megatron.replace("{layer}.", "").replace("local_experts.{expert}", "experts"),)
    key = (row.transformer_engine or row.megatron).replace("{layer}.", "")
    # For the norm before experts, Megatron's local layers write the name that Transformer Engine's layers only have
    # without experts.
    return (key, key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")) if "pre_mlp" in key else (key,)
