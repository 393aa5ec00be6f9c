"""The frozen replica of the student, with the same layout on the same ranks. It sees the reference solution."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opsd.data.batch import Microbatch
from megatron_opsd.model.gpt import HiddenStateGPT, forward
from megatron_opsd.weights.export import Exporter


class Teacher:
    """Scores the student's responses in a pipeline pass of its own and keeps hidden states only, never logits."""

    def __init__(self, model: HiddenStateGPT, placement: Literal["resident", "offload"]) -> None:
        self.model = model.eval().requires_grad_(False)
        self._offloaded: dict[str, Tensor] = {}
        self._device = next(model.parameters()).device
        self._placement = placement

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Final hidden states [n, h] at the positions that predict each micro-batch's response tokens.

        On the last pipeline stage a list as long as ``microbatches``; elsewhere an empty one.
        """
        b, length = microbatches[0].teacher.tokens.shape  # for a pipeline, in which they all have one shape
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=b,
            forward_only=True,
        )

    def _forward_step(self, work: Iterator[Microbatch], model: HiddenStateGPT) -> tuple[Tensor, partial]:
        microbatch = next(work)
        return forward(model, microbatch.teacher), partial(self._select, microbatch)

    def _select(self, microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        selected = self.model.head_input(hidden).flatten(0, 1)[microbatch.teacher.index]  # [n, h]
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), selected

    def head_weight(self) -> Tensor | None:
        """This rank's rows of the LM head [v/tp, h]; None but on the last stage."""
        return self.model.head_weight() if self.model.post_process else None

    def identity(self, exporter: Exporter) -> str:
        """Hash of the weights, the same for every layout."""
        lines = sorted(f"{name} {value}" for name, value in exporter.checksums().items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def offload(self) -> None:
        """Move the weights to pinned host memory (teacher.placement = "offload" on a GPU).

        The LM head stays, for the student's pass needs it. The host's copy is made once: the weights never change.
        """
        if self._placement == "resident" or self._device.type == "cpu":
            return
        for name, parameter in self.model.named_parameters():
            if parameter is self.head_weight():
                continue
            if name not in self._offloaded:
                self._offloaded[name] = parameter.data.cpu().pin_memory()
            parameter.data = self._offloaded[name]

    def load(self) -> None:
        """Move them back."""
        for name, weight in self._offloaded.items():
            self.model.get_parameter(name).data = weight.to(self._device, non_blocking=True)
