"""Which divergence, at what temperature, clipped how."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
ClipMode = Literal["entry", "token", "saturate"]


@dataclass(frozen=True)
class Divergence:
    """A divergence between student p and teacher q, both softmax(logits / temperature).

    kind         ``forward_kl`` KL(q || p), ``reverse_kl`` KL(p || q), or ``jsd``, the Jensen-Shannon divergence
                 beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Lin 1991; in nats).
    beta         the teacher's share of the mixture, strictly between 0 and 1; only ``jsd`` reads it. Its
                 divergence vanishes at both ends, so these are not the KLs.
    temperature  divides both sides' logits.
    clip         a bound in nats, or None for no clip.
    clip_mode    ``entry`` caps each vocabulary entry's term (OPSD, arXiv 2601.18734), ``token`` caps each token's
                 divergence, ``saturate`` bends each entry's non-negative term to c log(1 + f/c).

    Raises ValueError, in one line, for a value outside these.
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: float | None = None
    clip_mode: ClipMode = "entry"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie strictly between 0 and 1, not {self.beta} (the ends are the KL kinds)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be None or positive and finite, not {self.clip}")
        if self.clip_mode not in get_args(ClipMode):
            raise ValueError(f"clip_mode must be one of {', '.join(get_args(ClipMode))}, not {self.clip_mode!r}")
