"""What the parts of the objective hand to one another. Everything but the logits is [n]-sized."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_opsd.objective.clips import Clip
from megatron_opsd.objective.kinds import Kind
from megatron_opsd.objective.vocab_shard import VocabShard


class Logits(NamedTuple):
    """Both sides' logits for this rank's real tokens: [n, width] each, padding cut off."""

    student: Tensor
    teacher: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in."""
        return torch.promote_types(torch.float32, torch.promote_types(self.student.dtype, self.teacher.dtype))


class Tokens(NamedTuple):
    """What is known of the tokens of a batch, [n] each, all held constant."""

    weights: Tensor  # of each token's loss in the sum; a token of weight zero adds nothing, whatever its loss
    ids: Tensor | None = None  # global ids of the tokens that were sampled
    advantages: Tensor | None = None
    rollout_logprobs: Tensor | None = None  # natural logs at temperature 1, of the policy that sampled them

    def chunk(self, rows: slice) -> "Tokens":
        return Tokens(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]


class TokenLoss(Protocol):
    """A loss per token of logits that are spread over ranks by vocabulary.

    To add one: a class with these members. ``linear_loss`` makes the logits, some tokens at a time.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether ``measure`` wants the teacher's logits; else it gets None."""
        ...

    def measure(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens, shard: VocabShard, vocab_size: int
    ) -> tuple[Any, Any]:
        """Values per token over the whole vocabulary, and what ``write_gradient`` needs of them.

        student, teacher: [n, width] logits of this rank's real tokens, any floating dtype.
        Returns a NamedTuple of [n] tensors or None, ``loss`` first, equal on every rank; collectives inside.
        """
        ...

    def write_gradient(self, student: Tensor, teacher: Tensor | None, saved: Any, weights: Tensor, out: Tensor) -> None:
        """The gradient of Σ weights · loss to the student's logits into ``out`` [n, width], which may be those logits.

        No collectives. Zero where the weight is.
        """
        ...


class DivergenceTerms(Protocol):
    """What a backend needs to know of a ``Divergence``."""

    @property
    def temperature(self) -> float: ...
    @property
    def entry(self) -> Kind: ...
    @property
    def clipping(self) -> Clip: ...
    @property
    def kind(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def clip_mode(self) -> str: ...


class DivergenceOutput(NamedTuple):
    """Per token, [n], float32 (float64 from float64 logits). Only ``loss`` may carry a gradient."""

    loss: Tensor  # nats, after the clip
    unclipped: Tensor  # nats, >= 0
    clip_count: Tensor  # entries above the clip (`entry`: f > c, `saturate`: f⁺ > c); `token`: 1 if the token is
    entropy_student: Tensor  # nats, at the loss's temperature, like the next
    entropy_teacher: Tensor
    agree: Tensor  # 1 where both put the same token first, else 0
    student_logprobs: Tensor | None = None  # of token_ids at temperature 1, as vLLM reports them, like the next
    teacher_logprobs: Tensor | None = None  # NaN for an id outside the vocabulary


class PolicyOutput(NamedTuple):
    """Per token, [n], of a loss without a teacher."""

    loss: Tensor  # nats
    entropy_student: Tensor  # nats, at the loss's temperature
    student_logprobs: Tensor  # of the sampled tokens at temperature 1; NaN for an id outside the vocabulary


class LocalSums(NamedTuple):
    """What one rank knows of the normalizers before any collective."""

    maxima: Tensor  # [2, n] student, teacher; -inf where the rank holds padding only
    top_ids: Tensor  # [2, n] the maxima's first columns
    sums: Tensor  # [temperatures, 2, n] Σ exp((logit - maximum) / temperature)
    difference: Tensor  # [n] the teacher's less the student's at the first temperature, summed entry by entry


class Normalizers(NamedTuple):
    """What turns logits into probabilities, over the whole vocabulary."""

    maxima: Tensor  # [2, n] student, teacher; of the logits themselves
    sums: Tensor  # [2, n] Σ exp((logit - maximum) / temperature)
    log_ratio: Tensor  # [n] log(teacher's sum / student's sum)


class EntrySums(NamedTuple):
    """Σ over entries, [n] each."""

    unclipped: Tensor  # f⁺
    loss: Tensor  # the clipped f⁺; `token` clips act later, on the whole vocabulary's sum
    dlogp: Tensor  # g
    clip_count: Tensor  # how many entries lie above the clip
    log_student: Tensor  # p (logit - maximum) / temperature: the entropy is log(sum) less this
    log_teacher: Tensor


class SavedForBackward(NamedTuple):
    """What a divergence's gradient needs besides the logits."""

    normalizers: Normalizers
    dlogp_sum: Tensor  # [n] G = Σ g over the whole vocabulary
    capped: Tensor  # [n] tokens whose loss a `token` clip holds constant
    sampled: Tensor | None = None  # [2, n] of the sampled tokens log p, and log q - log p, at the loss's temperature
