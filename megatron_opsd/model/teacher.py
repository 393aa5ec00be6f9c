"""The teachers: the student's architecture, the same layout on the same ranks. They see what the student does not.

============  ==================================================================================
``frozen``    the model the run starts from
``live``      the student itself: no second copy, the newest weights
``ema``       an exponential moving average of the student
============  ==================================================================================
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opsd.data.batch import Microbatch
from megatron_opsd.model.gpt import ModelChunks, forward
from megatron_opsd.weights.export import Exporter


class Teacher(Protocol):
    """Scores the student's responses in a pipeline pass of its own and keeps hidden states only, never logits."""

    model_chunks: ModelChunks

    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Final hidden states [n, h] at the positions that predict each micro-batch's response tokens.

        On the last pipeline stage a list as long as ``microbatches``; elsewhere an empty one.
        """
        ...

    def head_weight(self) -> Tensor | None:
        """This rank's rows of the LM head [v/tp, h]; None but on the last stage."""
        ...

    def after_update(self, student: ModelChunks) -> None:
        """The student's weights have changed."""
        ...

    def average(self) -> ModelChunks | None:
        """The weights, in float32, that a checkpoint must hold to make this teacher again; None for none."""
        ...

    def publish(self) -> None:
        """Score with what ``average`` holds from now on."""
        ...

    def offload(self) -> None:
        """Give the device's memory back, but for the LM head, which the student's pass needs."""
        ...

    def load(self) -> None:
        """Take it again."""
        ...


class _Scorer:
    """What all teachers share."""

    def __init__(self, model_chunks: ModelChunks) -> None:
        self.model_chunks = model_chunks

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        sequences = microbatches[0].teacher
        assert sequences is not None
        self.model_chunks.eval()
        b, length = sequences.tokens.shape  # for a pipeline, in which they all have one shape
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(microbatches) for _ in self.model_chunks],
            model=list(self.model_chunks),
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=b,
            forward_only=True,
        )

    def _forward_step(self, work: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, partial]:
        sequences = next(work).teacher
        assert sequences is not None
        return forward(model, sequences), partial(self._select, sequences.index)

    def _select(self, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        selected = self.model_chunks.last.head_input(hidden).flatten(0, 1)[index]  # [n, h]
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), selected

    def head_weight(self) -> Tensor | None:
        return self.model_chunks.head_weight()

    def after_update(self, student: ModelChunks) -> None: ...

    def average(self) -> ModelChunks | None: ...

    def publish(self) -> None: ...

    def offload(self) -> None: ...

    def load(self) -> None: ...


class LiveTeacher(_Scorer):
    """The student itself. A step's scores are taken before its update, so both sides have the same weights."""


class FrozenTeacher(_Scorer):
    """A replica of the model that the run starts from.

    placement: "offload" keeps the weights in pinned host memory while it does not score (on a GPU).
    """

    def __init__(self, model_chunks: ModelChunks, placement: Literal["resident", "offload"]) -> None:
        super().__init__(model_chunks.eval().requires_grad_(False))
        self._device = next(model_chunks.parameters()).device
        self._offloads = placement == "offload" and self._device.type != "cpu"
        self._host: dict[str, Tensor] = {}

    def identity(self, exporter: Exporter) -> str:
        """Hash of the weights, the same for every layout."""
        lines = sorted(f"{name} {value}" for name, value in exporter.checksums().items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def offload(self) -> None:
        """The host's copy is made once; what changes the weights later changes it in place."""
        if not self._offloads:
            return
        for name, parameter in self.model_chunks.named_parameters():
            if parameter is self.head_weight():
                continue
            if name not in self._host:
                self._host[name] = parameter.data.cpu().pin_memory()
            parameter.data = self._host[name]

    def load(self) -> None:
        for name, weight in self._host.items():
            self.model_chunks.get_parameter(name).data = weight.to(self._device, non_blocking=True)


class EmaTeacher(FrozenTeacher):
    """θ_T <- decay θ_T + (1 - decay) θ_S after each update, in float32: in bfloat16 it would stand still.

    The float32 average is a model of its own, never run, where the weights are bfloat16; it stays in host memory where
    the teacher is offloaded. ``build_average`` makes a model like the teacher's in float32.
    """

    def __init__(
        self,
        model_chunks: ModelChunks,
        placement: Literal["resident", "offload"],
        decay: float,
        build_average: Callable[[], ModelChunks],
    ) -> None:
        super().__init__(model_chunks, placement)
        self._decay = decay
        self._average = model_chunks
        if model_chunks.config.params_dtype != torch.float32:
            self.offload()
            self._average = build_average().requires_grad_(False)
            if self._offloads:
                self._average.cpu()
            self._copy(model_chunks, self._average)

    @torch.no_grad()
    def after_update(self, student: ModelChunks) -> None:
        """Call while the teacher is offloaded, where it is at all."""
        for average, weight in _pairs(self._average, student):
            average.lerp_(weight.to(average), 1 - self._decay)
        self.publish()

    def average(self) -> ModelChunks | None:
        return self._average

    def publish(self) -> None:
        if self._average is not self.model_chunks:
            self._copy(self._average, self.model_chunks)

    @torch.no_grad()
    def _copy(self, source: ModelChunks, target: ModelChunks) -> None:
        for to, weight in _pairs(target, source):
            to.copy_(weight)


def _pairs(one: ModelChunks, other: ModelChunks) -> Iterator[tuple[Tensor, Tensor]]:
    parameters: dict[str, Any] = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        yield parameter.data, parameters[name].data
