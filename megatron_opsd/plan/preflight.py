"""Finds a user's mistakes before any process group is created and any weight is read. Needs no GPU."""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from megatron_opsd.config import Config
from megatron_opsd.data.prompts import (
    SEAM_TOKENS,
    PromptBuilder,
    build_prompts,
    context_tokens,
    max_model_len,
)
from megatron_opsd.errors import UserError
from megatron_opsd.plan import contents
from megatron_opsd.reliability import resume
from megatron_opsd.reliability.run_dir import RunDir
from megatron_opsd.reliability.written import WrittenFile
from megatron_opsd.types import Example
from megatron_opsd.weights.architecture import Architecture, read_architecture

VLLM_REMEDY = "the rollout engine: pip install 'megatron-opsd[cpu]' or 'megatron-opsd[gpu]'"
KV_BYTES = {"bfloat16": 2, "float32": 4}
_PROCESS_COUNTS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check(config: Config, world_size: int | None, train: bool = True, starts_here: bool = False) -> list[str]:
    """Check everything that can be checked without starting anything. Returns warnings, one line each.

    world_size: ranks of the run; None if not known yet.
    train: False for an evaluation, which has no training data, batch or layout.
    starts_here: the run starts on this machine now. Else it may be for a machine that has GPUs.

    Raises:
        UserError: one line that names the file or field, the value and the remedy.
    """
    path = config.model.path
    arch = read_architecture(path)
    needs_engine = config.needs_engine or not train
    colocated = needs_engine and config.rollout.engine == "colocated"
    if colocated:
        check_installed("vllm", VLLM_REMEDY)
        check_rollout_parallel(config, arch, world_size)
    elif needs_engine:
        check_servers(config)
    if train:
        check_transformer_engine()
        check_parallel(config, arch, world_size)
        check_batch(config, world_size)
        check_guards(config, arch)
    prompts = build_prompts(config)
    contents.check_tokenizer(prompts, arch, path)
    check_lengths(config, arch, prompts, train)
    if colocated and (starts_here or "kv_cache_gib" in config.rollout.model_fields_set):
        check_kv_cache(config, arch, max_model_len(config, prompts, train))
    run_dir = RunDir(config.logging.run_dir)
    run_dir.check()
    if train:
        check_places(config, run_dir)
        resume.check(config)
        if config.method.writes_in_sight and not config.method.writes_rollouts:
            WrittenFile(config).check()
    warnings = contents.check_rows(config, prompts, train)
    warnings += contents.check_turns(prompts, arch, path)
    if train and config.method.teacher_sees != "nothing":
        warnings += contents.check_openings(prompts)
    if train and config.optim.warmup_steps >= config.train.steps:
        warnings.append(
            f"optim.warmup_steps = {config.optim.warmup_steps} is not below train.steps = {config.train.steps}: the "
            "learning rate does not reach optim.lr"
        )
    contents.check_weights(path, arch)
    return warnings


def check_places(config: Config, run_dir: RunDir) -> None:
    """Refuse a run that would write into the model that it starts from."""
    model = Path(config.model.path).resolve()
    if run_dir.path.resolve() == model or model.is_relative_to(run_dir.hf.resolve()):
        raise UserError(
            f"logging.run_dir = {config.logging.run_dir!r}: the run would write into model.path = "
            f"{config.model.path!r}; choose another folder"
        )


def check_server(config: Config) -> None:
    """Check what ``opsd serve`` needs: the model and its lengths, but no data.

    Raises:
        UserError: as :func:`check`.
    """
    arch = read_architecture(config.model.path)
    check_installed("vllm", VLLM_REMEDY)
    check_rollout_parallel(config, arch, world_size=None)
    prompts = build_prompts(config)
    contents.check_tokenizer(prompts, arch, config.model.path)
    check_lengths(config, arch, prompts, train=False)
    check_kv_cache(config, arch, max_model_len(config, prompts))


def check_processes(environment: Mapping[str, str]) -> None:
    """Refuse processes that were started together and do not know of each other: each would train alone."""
    if "RANK" not in environment:
        if not environment.get("MASTER_PORT", "0").isdecimal():
            raise UserError(f"MASTER_PORT = {environment['MASTER_PORT']!r}: is no port; correct or unset it")
        for name in _PROCESS_COUNTS:
            if environment.get(name, "1") != "1":
                raise UserError(
                    f"{name} = {environment[name]}, but RANK is not set: these processes would train side by side; "
                    "start them with torchrun, one a node, or set --nproc; for a single process unset the variable"
                )
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not environment.get(name, "").isdecimal():
            found = repr(environment[name]) if name in environment else "missing"
            raise UserError(f"{name} is {found}, although RANK is set; start the processes with torchrun")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise UserError(
            f"RANK = {environment['RANK']} is not below WORLD_SIZE = {environment['WORLD_SIZE']}; start the processes "
            "with torchrun"
        )
    if "MASTER_ADDR" not in environment:
        raise UserError("MASTER_ADDR is missing, although RANK is set; start the processes with torchrun")


def check_devices(environment: Mapping[str, str]) -> None:
    """Refuse more ranks on this machine than it has GPUs."""
    import torch

    ranks, gpus = int(environment.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and ranks > gpus:
        raise UserError(
            f"torchrun started {ranks} processes on a machine that shows {gpus} GPUs; start as many as there are GPUs "
            "(--nproc-per-node, or CUDA_VISIBLE_DEVICES)"
        )


def check_servers(config: Config) -> None:
    """Check that there are servers. The run itself checks at its start whether they answer."""
    if not config.rollout.servers:
        raise UserError(
            "rollout.engine = 'server' needs rollout.servers, such as [\"http://127.0.0.1:8000\"]; start each with "
            "`opsd serve FILE.toml`"
        )


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that is installed but cannot be loaded: a run would silently use slower layers.

    Without a GPU nothing is refused, because local layers are used anyway.
    """
    if not _has_gpu() or importlib.util.find_spec("transformer_engine") is None:
        return
    try:  # the names that Megatron imports
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast  # noqa: F401 # pyright: ignore
    except Exception as error:  # another package may raise anything: missing libraries, failed assertions
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformer-engine is installed but cannot be loaded ({reason}); install the build that fits this torch "
            "(docs/environment.md), or pip uninstall it to train with local layers"
        ) from error


def check_installed(package: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; it is {remedy}")


def _check_divides(field: str, size: int, what: str, value: int) -> None:
    if value % size:
        raise UserError(f"{field} = {size} does not divide {what} = {value}")


def check_parallel(config: Config, arch: Architecture, world_size: int | None) -> None:
    """Check the layout against the model and the world size."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    field = "parallel.tensor_model_parallel_size"
    _check_divides(field, tp, "the model's num_attention_heads", arch.num_attention_heads)
    _check_divides(field, tp, "the model's num_key_value_heads", arch.num_query_groups)
    if arch.moe is None:
        _check_divides(field, tp, "the model's intermediate_size", arch.ffn_hidden_size)
    if pp > arch.num_layers:
        raise UserError(f"parallel.pipeline_model_parallel_size = {pp} exceeds the model's {arch.num_layers} layers")
    if world_size is not None and world_size % (tp * pp):
        raise UserError(
            f"parallel: tensor {tp} x pipeline {pp} = {tp * pp} ranks does not divide the world size {world_size}; "
            "change the sizes or torchrun's --nproc-per-node"
        )
    check_expert_parallel(config, arch, world_size)


def check_expert_parallel(config: Config, arch: Architecture, world_size: int | None) -> None:
    """Check the experts' layout against the model and the world size."""
    layout, field = config.parallel, "parallel.expert_model_parallel_size"
    ep = layout.expert_model_parallel_size
    if arch.moe is None:
        if ep > 1:
            raise UserError(f"{field} = {ep}: {config.model.path} has no experts; set it to 1")
        return
    _check_divides(field, ep, "the model's num_experts", arch.moe.num_moe_experts)
    if world_size is not None:
        stage = world_size // layout.pipeline_model_parallel_size
        _check_divides(field, ep, "the ranks of a pipeline stage", stage)
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise UserError(
            "parallel.sequence_parallel = false: a model with experts needs it where "
            f"parallel.tensor_model_parallel_size = {layout.tensor_model_parallel_size} > 1; set it to true"
        )


def check_rollout_parallel(config: Config, arch: Architecture, world_size: int | None) -> None:
    """Check vLLM's layout against the model and the world size."""
    tp, field = config.rollout.tensor_model_parallel_size, "rollout.tensor_model_parallel_size"
    _check_divides(field, tp, "the model's num_attention_heads", arch.num_attention_heads)
    if arch.moe is not None:
        _check_divides(field, tp, "the model's moe_intermediate_size", arch.moe.moe_ffn_hidden_size)
    if world_size is not None:
        _check_divides(field, tp, "the world size", world_size)


def check_batch(config: Config, world_size: int | None) -> None:
    """Check the batch sizes against each other and the data-parallel size."""
    if config.train.packing:
        check_installed("nemo", "train.packing's planner: pip install 'megatron-opsd[nemo]', or set it to false")
    if world_size is not None:
        model = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
        dp, size, micro = world_size // model, config.train.global_batch_size, config.train.micro_batch_size
        if size % (dp * micro):
            raise UserError(
                f"train.global_batch_size = {size} is not a multiple of train.micro_batch_size = {micro} "
                f"x {dp} data-parallel ranks"
            )


def check_guards(config: Config, arch: Architecture) -> None:
    """Check a guard against the vocabulary."""
    lowest, most = config.guards.min_entropy, math.log(arch.vocab_size)
    if lowest is not None and lowest >= most:
        raise UserError(
            f"guards.min_entropy = {lowest:g}: no distribution over this vocabulary has {most:.4g}; lower it"
        )


def check_lengths(config: Config, arch: Architecture, prompts: PromptBuilder, train: bool) -> None:
    """Check the longest sequences against the model's positions."""
    nothing, data = Example(0, "", "", ""), config.data
    longest = {"student": max_model_len(config, prompts, train) if config.needs_engine or not train else 0}
    beside = data.max_problem_tokens + config.longest_response + SEAM_TOKENS
    if train:
        longest["student"] = max(longest["student"], len(prompts.student(nothing)) + beside)
    if train and config.teacher_kind:
        ask = {"nothing": prompts.student, "answer": prompts.teacher_with_answer, "solution": prompts.teacher}
        longest["teacher"] = len(ask[config.method.teacher_sees](nothing)) + context_tokens(config) + beside
    for side, length in longest.items():
        if length > arch.max_position_embeddings:
            raise UserError(
                f"the {side}'s longest sequence, {length} tokens, exceeds the model's max_position_embeddings = "
                f"{arch.max_position_embeddings}; lower data.max_problem_tokens, data.max_solution_tokens or "
                "rollout.max_response_tokens"
            )


def check_kv_cache(config: Config, arch: Architecture, length: int) -> None:
    """Check on CPU that the KV cache holds at least one sequence and fits in memory. On a GPU vLLM checks itself."""
    if _has_gpu():
        return
    groups = max(1, arch.num_query_groups // config.rollout.tensor_model_parallel_size)
    token = 2 * arch.num_layers * groups * arch.kv_channels * KV_BYTES[config.model.dtype]
    gib, needed = config.rollout.kv_cache_gib, token * length / 2**30
    if needed > gib:
        raise UserError(
            f"rollout.kv_cache_gib = {gib} is too little for one sequence of {length} tokens, which needs "
            f"{needed:.3g} GiB; raise it or lower rollout.max_response_tokens"
        )
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(local) if local.isdecimal() else 1
    available = psutil.virtual_memory().available / 2**30
    if gib * ranks > available:
        raise UserError(
            f"rollout.kv_cache_gib = {gib} x {ranks} ranks on this machine exceeds its {available:.1f} GiB of "
            "free memory; lower it"
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
