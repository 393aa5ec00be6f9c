"""The tests' own rollout engine, for tests that are not about vLLM. transformers writes one response after another."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_opsd.config import Config
from megatron_opsd.errors import StepAbortedError
from megatron_opsd.rollout.engine import AlwaysAwake, Sampling
from megatron_opsd.types import Rollout


class TransformersEngine(AlwaysAwake):
    """An :class:`Engine` that starts in a second. Its responses depend only on prompt, seed and weights."""

    def __init__(self, config: Config, max_model_len: int) -> None:
        architecture = AutoConfig.from_pretrained(config.model.path)
        self._model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32).eval()
        self._model.generation_config = GenerationConfig.from_pretrained(config.model.path)
        self._version = -1
        self._max_model_len = max_model_len

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        assert self._version >= 0, "refit before the first token"
        rank, world_size = dist.get_rank(), dist.get_world_size()
        own: list[Rollout] | None = []
        for prompt, seed in list(zip(prompts, seeds, strict=True))[rank::world_size]:
            if should_abort():
                own = None
                break
            own.append(self._write(prompt, sampling, seed))
        parts: list[list[Rollout] | None] = [None] * world_size
        dist.all_gather_object(parts, own)
        if any(part is None for part in parts):
            raise StepAbortedError("given up while responses were written")
        return [(parts[i % world_size] or [])[i // world_size] for i in range(len(prompts))]

    @torch.no_grad()
    def _write(self, prompt: list[int], sampling: Sampling, seed: int) -> Rollout:
        assert len(prompt) + sampling.max_tokens <= self._max_model_len
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": max(0, sampling.top_k)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = self._model.generate(
                torch.tensor([prompt]),
                max_new_tokens=sampling.max_tokens,
                do_sample=sampling.temperature > 0,
                **(sampled if sampling.temperature > 0 else {}),
                return_dict_in_generate=True,
                output_logits=True,
            )
        token_ids = out.sequences[0, len(prompt) :]
        logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
        stopped = int(token_ids[-1]) == self._model.generation_config.eos_token_id
        return Rollout(token_ids.tolist(), logprobs.tolist(), "stop" if stopped else "length", self._version)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._version = -1
        weights = {name: tensor.clone() for name, tensor in named_tensors}
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, missing  # tied to the embedding
        self._version = version

    def close(self) -> None: ...
