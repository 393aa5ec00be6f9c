"""The engine that writes the student's answers, and how it gets the student's weights."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_opsd.config import Config
    from megatron_opsd.rollout.engine import Engine


def build_engine(config: "Config", max_model_len: int) -> "Engine":
    """The engine named by ``rollout.engine``. All ranks call this together. Refit before the first token."""
    if config.rollout.engine == "server":
        from megatron_opsd.rollout.server import ServedVLLM

        return ServedVLLM(config, max_model_len)
    from megatron_opsd.rollout.colocated import ColocatedVLLM

    return ColocatedVLLM(config, max_model_len)
