"""What the parts of the objective hand to one another. Everything but the logits is [n]-sized."""

from typing import NamedTuple

import torch
from torch import Tensor


class DivergenceOutput(NamedTuple):
    """Per token, [n], float32 (float64 from float64 logits). Only ``loss`` may carry a gradient."""

    loss: Tensor  # nats, after the clip
    unclipped: Tensor  # nats, >= 0
    clip_count: Tensor  # entries above the clip (`entry`: f > c, `saturate`: f⁺ > c); `token`: 1 if the token is
    entropy_student: Tensor  # nats, at spec.temperature, like the next
    entropy_teacher: Tensor
    agree: Tensor  # 1 where both put the same token first (of equals, the lowest id), else 0
    student_logprobs: Tensor | None = None  # of token_ids at temperature 1, as vLLM reports them, like the next
    teacher_logprobs: Tensor | None = None  # NaN for an id outside the vocabulary


class Logits(NamedTuple):
    """Both sides' logits for this rank's real tokens: [n, width] each, padding cut off."""

    student: Tensor
    teacher: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in."""
        return torch.promote_types(torch.float32, torch.promote_types(self.student.dtype, self.teacher.dtype))


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
    """What the gradient needs besides the logits."""

    normalizers: Normalizers
    dlogp_sum: Tensor  # [n] G = Σ g over the whole vocabulary
    capped: Tensor  # [n] tokens whose loss a `token` clip holds constant
