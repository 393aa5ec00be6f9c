"""Plans: the recipes fit where they say, the numbers are those of real models, remedies hold what they promise."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from megatron_opsd.cli import main
from megatron_opsd.config import (
    Config,
    DataConfig,
    OpsdConfig,
    OptimConfig,
    ParallelConfig,
    PromptsConfig,
    SftConfig,
    TeacherConfig,
)
from megatron_opsd.config_file import load_config
from megatron_opsd.data.prompts import ANSWER_TOKENS, build_prompts, max_model_len
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import gpt as model_module
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model
from megatron_opsd.model.optimizer import build_optimizer
from megatron_opsd.model.student import Student
from megatron_opsd.plan.formulas import GIB, boundary, layer_saved, longest_sequences
from megatron_opsd.plan.planner import Cluster, Plan, make_plan
from megatron_opsd.plan.remedies import find_remedies
from megatron_opsd.plan.shards import rank_bytes, stage_parameters
from megatron_opsd.reliability import checkpoint
from megatron_opsd.types import Phase
from megatron_opsd.weights.architecture import Architecture, published_architecture, read_architecture
from megatron_opsd.weights.mapping import NameTable
from megatron_opsd.weights.published import PUBLISHED

from ..distributed.harness import run_distributed
from ..distributed.tiny import write_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").glob("qwen3_*.toml"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``opsd plan`` hides this machine's GPUs from its process, which here goes on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def command(recipe: Path, name: str) -> list[str]:
    """Arguments of the ``opsd`` command that a recipe's head comment names."""
    match = re.search(rf"opsd ({name} \S+ --.*)", recipe.read_text())
    assert match, recipe
    return [str(ROOT / word) if word.endswith(".toml") else word for word in match[1].split()]


def config_of(path: str, **sections: dict) -> Config:
    raw = {"model": {"path": path, "recompute": "full"}, "data": {"path": "unread"}}
    return Config.model_validate(raw | sections)


def test_there_is_a_recipe_for_each_size_and_each_method() -> None:
    assert len(RECIPES) == 11


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_where_it_says(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(recipe, "plan"))
    tables = capsys.readouterr().out
    assert "It fits" in tables
    assert "not needed" not in tables
    assert max(map(len, tables.splitlines())) <= 120
    main([*command(recipe, "plan"), "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["unneeded"] == []
    for number, stage in enumerate(plan["stages"]):
        totals = [f"{stage['totals'][phase] / GIB:,.1f}" for phase in Phase]
        row = [str(number), str(stage["layers"]), f"{stage['parameters'] / 1e9:.3f}", "B", *totals]
        assert row in [line.split()[:-1] for line in tables.splitlines()]


def write_headers(model: Path) -> None:
    """A file with the headers of all tensors, whose bytes nobody has written: it takes no room on the disk."""
    header, end = {}, 0
    for name, shape in NameTable(read_architecture(model)).hf_tensors().items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_passes_check(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model's config.json and headers, any tokenizer and data; without the model, one line that says so."""
    monkeypatch.chdir(tmp_path)
    config = load_config(str(recipe), {})
    with pytest.raises(SystemExit, match="2"):
        main(command(recipe, "check"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"opsd: {config.model.path}: no such directory; model.path")

    model, data = tmp_path / config.model.path, tmp_path / config.data.path
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ROOT / "examples" / "arithmetic" / "base", model, ignore=weights)
    (model / "config.json").write_text(json.dumps(PUBLISHED[model.name]))
    write_headers(model)
    data.parent.mkdir()
    data.write_text(json.dumps({"problem": "Compute 1+1.", "solution": r"\boxed{2}"}))
    main(command(recipe, "check"))
    assert capsys.readouterr().out.endswith("no mistakes found\n")
    # The arithmetic tokenizer has a token for each character: no real one makes longer prompts.
    assert max_model_len(config, build_prompts(config)) <= longest_sequences(config).rollout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_ranks_hold_the_whole_model(recipe: Path) -> None:
    """Elements over all ranks of one replica: the published number, and the vocabulary's padding."""
    config = load_config(str(recipe), {})
    arch, layout = published_architecture(config.model.path), config.parallel
    tp, pp, ep = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    table, elements = NameTable(arch), 0
    for stage in range(pp):
        for parameter in stage_parameters(arch, config.model, layout, tp * pp * ep, stage):  # type: ignore[arg-type]
            rule = table.rule(parameter.name)
            elements += parameter.numel * (ep if rule.is_expert else tp if rule.dim == 0 or rule.dim == 1 else 1)
    padding = arch.padded_vocab_size(tp) - arch.vocab_size
    tables = 1 if arch.share_embeddings_and_output_weights else 2
    published = {
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-32B": 32_762_123_264,
        "Qwen3-30B-A3B": 30_532_122_624,
        "Qwen3-235B-A22B": 235_093_634_560,
    }
    assert elements - padding * tables * arch.hidden_size == published[Path(config.model.path).name]


def test_first_stage_of_32b() -> None:
    arch = published_architecture("Qwen3-32B")
    layout = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True)
    config = config_of("Qwen3-32B", parallel=layout)
    parameters = stage_parameters(arch, config.model, layout, 64, 0)  # type: ignore[arg-type]
    assert parameters[0].numel == 19072 * 5120  # 151,936 rows, padded to a multiple of 128 on each rank
    kept = rank_bytes(parameters, 2, True, dp_size=2, expert_dp_size=2, last=False, teacher="frozen")
    sizes = [kept.weights, kept.gradients, kept.optimizer, kept.teacher]
    assert [round(size / GIB, 2) for size in sizes] == [2.0, 4.0, 6.0, 2.0]


@pytest.mark.parametrize(
    ("model", "parallel_sizes", "rollout_size", "cluster"),
    [
        ("Qwen3-32B", (8, 1, 1), 8, Cluster(4, 8, 80)),  # one setting is enough
        ("Qwen3-8B", (1, 1, 1), 1, Cluster(1, 8, 80)),  # several are
        ("Qwen3-32B", (4, 1, 1), 2, Cluster(1, 8, 80)),  # more machines
        ("Qwen3-32B", (8, 2, 1), 1, Cluster(4, 8, 80)),  # vLLM's weights leave no room for its cache
    ],
)
def test_first_remedy_fits(
    model: str,
    parallel_sizes: tuple[int, int, int],
    rollout_size: int,
    cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a user would: read the remedies, add the first one's options to the command."""
    tp, pp, ep = parallel_sizes
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{model}"\nrecompute = "full"\n[data]\npath = "unread"\n'
        f"[parallel]\ntensor_model_parallel_size = {tp}\npipeline_model_parallel_size = {pp}\n"
        f"expert_model_parallel_size = {ep}\nsequence_parallel = {str(tp > 1).lower()}\n"
        f"[rollout]\ntensor_model_parallel_size = {rollout_size}\n"
    )
    size = ["--gpus-per-node", str(cluster.gpus_per_node), "--gpu-memory-gib", str(cluster.gpu_memory_gib)]
    plan = ["plan", str(file), "--nodes", str(cluster.nodes), *size]
    with pytest.raises(SystemExit, match="1"):
        main(plan)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("It does not fit: ") for line in lines)
    first = lines[lines.index("What makes it fit, cheapest first:") + 1]
    options = first.split(": -")[0].split()
    main([*plan, *options])  # a later --nodes wins
    assert "It fits" in capsys.readouterr().out
    assert f"then {_remain(capsys, [*plan, *options]):.1f} GiB remain" in first


def _remain(capsys: pytest.CaptureFixture[str], plan: list[str]) -> float:
    main([*plan, "--json"])
    return -json.loads(capsys.readouterr().out)["shortfall"] / GIB


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(use_distributed_optimizer=False)])
def test_no_remedy_contradicts_itself(optim: OptimConfig) -> None:
    """Parts of a combination may be refused (sequence without tensor parallelism): they are no remedies, nor errors."""
    assert find_remedies(config_of("Qwen3-32B", optim=optim), Cluster(1, 8, 80))


def test_remedies_are_plans() -> None:
    config = config_of("Qwen3-32B", parallel=ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True))
    cluster = Cluster(4, 8, 60)
    plan = make_plan(config, cluster)
    for remedy in find_remedies(config, cluster):
        assert remedy.saves == plan.shortfall - remedy.plan.shortfall > 0


def test_offloaded_teacher_leaves_the_device() -> None:
    """Its head stays, and all of it is there while it scores."""
    config = config_of("Qwen3-32B", parallel=ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True))
    offload = config.model_copy(update={"teacher": config.teacher.model_copy(update={"placement": "offload"})})
    resident, offloaded = (make_plan(x, Cluster(1, 8, 80)).stages[0].phases for x in (config, offload))
    head = 19072 * 5120 * 2
    for phase in Phase:
        expected = resident[phase]["teacher weights"] if phase == "teacher" else head
        assert offloaded[phase]["teacher weights"] == expected


def test_what_each_teacher_costs() -> None:
    """A live one nothing, an average four bytes a parameter besides; fine-tuning has neither teacher nor vLLM."""
    layout = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    plans = {
        kind: make_plan(config_of("Qwen3-32B", parallel=layout, teacher=TeacherConfig(kind=kind)), Cluster(1, 8, 80))
        for kind in ("frozen", "live", "ema")
    }
    phases = {kind: plan.stages[0].phases for kind, plan in plans.items()}
    weights = phases["frozen"]["student"]["teacher weights"]
    for phase in Phase:
        assert phases["ema"][phase]["teacher weights"] == weights
        assert phases["ema"][phase]["teacher's average"] == 2 * weights
        assert "teacher weights" not in phases["live"][phase]
    assert plans["frozen"].checkpoint == plans["live"].checkpoint
    assert plans["ema"].checkpoint / plans["frozen"].checkpoint == 18 / 14
    tuned = make_plan(config_of("Qwen3-32B", parallel=layout, method=SftConfig()), Cluster(1, 8, 80)).stages[0].phases
    assert not any("teacher" in name or "vLLM" in name for phase in Phase for name in tuned[phase])
    small_share = {"method": SftConfig(), "rollout": {"gpu_memory_utilization": 0.01}}
    assert make_plan(config_of("Qwen3-32B", parallel=layout, **small_share), Cluster(1, 8, 80)).fits


def test_what_is_learned_from_decides_the_lengths() -> None:
    prompts, data = PromptsConfig(), DataConfig(path="unread", max_solution_tokens=9000)
    lengths = {
        name: longest_sequences(config_of("Qwen3-32B", method=method, data=data))
        for name, method in {
            "opsd": OpsdConfig(),
            "answer": OpsdConfig(context="answer"),
            "nothing": OpsdConfig(context="nothing"),
            "sft": SftConfig(),
        }.items()
    }
    longer_template = len(prompts.answer_template) - len(prompts.student_template)
    assert lengths["answer"].teacher == lengths["answer"].student + longer_template + ANSWER_TOKENS
    assert lengths["opsd"].teacher > lengths["answer"].teacher + 9000 - ANSWER_TOKENS
    assert lengths["nothing"].teacher == lengths["nothing"].student
    assert (lengths["sft"].teacher, lengths["sft"].student) == (0, lengths["nothing"].student + 9000 - 1024)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.path", "no/such-model"], ["no/such-model: holds no config.json", "Qwen3-32B"]),
        (["--parallel.tensor_model_parallel_size", "16"], ["num_key_value_heads = 8"]),
        (["--nodes", "0"], ["--nodes = 0: must be greater than 0"]),
        (["--node", "2"], ["--node: unknown option; the nearest valid one is --nodes"]),
    ],
)
def test_mistakes_cost_one_line(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "examples" / "qwen3_32b.toml"
    with pytest.raises(SystemExit, match="2"):
        main([*command(recipe, "plan"), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in expected), line


def test_a_thousand_ranks() -> None:
    """Within a minute and 4 GB, as promised; no vLLM is imported."""
    code = (
        "import resource, sys; from megatron_opsd.cli import main; main(sys.argv[1:]);"
        "assert 'vllm' not in sys.modules; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    recipe = command(ROOT / "examples" / "qwen3_235b_a22b.toml", "plan")
    arguments = [*recipe, "--nodes", "128", "--train.global_batch_size", "512", "--json"]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["batch"]["data_parallel_size"] * 32 == 1024
    assert seconds < 60
    assert int(done.stderr.splitlines()[-1]) * 1024 < 4e9


# What follows compares the plan with real models: Megatron's modules, DDP and optimizer on four ranks.


def tiny(path: Path, tp: int = 1, dtype: str = "bfloat16", recompute: str = "none", distributed: bool = True) -> Config:
    return config_of(
        str(path),
        model={"path": str(path), "dtype": dtype, "recompute": recompute},
        parallel={"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1},
        optim={"use_distributed_optimizer": distributed},
    )


def test_bytes_of_real_models(tmp_path: Path) -> None:
    qwen2, qwen3, moe = (
        write_model(tmp_path / family, family, tied=family == "qwen2") for family in ("qwen2", "qwen3", "qwen3_moe")
    )
    activations = [
        tiny(*layout, recompute=recompute)
        for layout in ((qwen3, 2), (qwen2, 1, "float32"), (moe, 2))
        for recompute in ("none", "full")
    ]
    states = [
        tiny(qwen3, 2),
        tiny(moe, 2),
        tiny(qwen2, dtype="float32"),
        tiny(qwen3, 2, distributed=False),
        tiny(qwen3, dtype="float32", distributed=False),
    ]
    plans = [make_plan(config, Cluster(1, 4, 80)) for config in states]  # here: a rank has only one set of groups
    run_distributed(_measure_on_four_ranks, 4, activations, list(zip(states, plans, strict=True)))


def _measure_on_four_ranks(activations: list[Config], states: list[tuple[Config, Plan]]) -> None:
    for config in activations:
        check_activations(config)
    for config, plan in states:
        check_training_states(config, plan)
    check_checkpoint(*states[0])


def build(config: Config) -> tuple[parallel.Layout, Architecture, ModelChunks]:
    layout = parallel.initialize(config.parallel, 0)
    arch = read_architecture(config.model.path)
    return layout, arch, build_model(arch, config.model, config.parallel, layout.pg_collection)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages behind tensors."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def check_training_states(config: Config, plan: Plan) -> None:
    """Parameters, gradient buffers and optimizer states after a step, to the byte; the largest rank's counts."""
    layout, arch, model = build(config)
    teacher = sum(p.nbytes for p in model.parameters())
    student = Student(model, layout, config, arch.vocab_size, divergence(config))
    optimizer = build_optimizer(student, config.optim)
    student.ddp_chunks[0].zero_grad_buffer()
    optimizer.step()
    weights = storages(list(model.parameters()))
    buffers = [*student.ddp_chunks[0].buffers, *student.ddp_chunks[0].expert_parallel_buffers]
    gradients = storages([buffer.grad_data for buffer in buffers])
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [
        tensor
        for part in chained
        for group in part.optimizer.param_groups
        for p in group["params"]
        for tensor in (p, part.optimizer.state[p]["exp_avg"], part.optimizer.state[p]["exp_avg_sq"])
        if tensor.untyped_storage().data_ptr() not in weights
    ]
    measured = torch.tensor([sum(weights.values()), sum(gradients.values()), sum(t.nbytes for t in states), teacher])
    torch.distributed.all_reduce(measured, torch.distributed.ReduceOp.MAX)
    planned = plan.stages[0].phases["optimizer"]
    names = ("student weights", "gradients", "optimizer states", "teacher weights")
    assert measured.tolist() == [planned[name] for name in names]


@contextmanager
def fused_norms(keep: list[Tensor]) -> Iterator[None]:
    """Norms that keep their input and not what torch's steps on a CPU keep, as the kernels on a GPU do."""
    norm = torch.nn.RMSNorm.forward

    def forward(self: torch.nn.RMSNorm, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # not in the forward pass that recomputation repeats
            keep.append(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return norm(self, x)

    model_module.RMSNorm.forward = forward
    yield
    del model_module.RMSNorm.forward


def saved_bytes(model: ModelChunks, tokens: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, parameters aside."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with fused_norms(saved), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    own = storages(list(model.parameters()))
    return sum(size for address, size in storages(saved).items() if address not in own)


def check_activations(config: Config) -> None:
    """A layer's saved tensors: the difference that two more layers make."""
    layout, arch, _ = build(config)
    kept = layer_saved if config.model.recompute == "none" else boundary
    sizes = []
    for layers in (1, 3):
        smaller = replace(arch, num_layers=layers)
        model = build_model(smaller, config.model, config.parallel, layout.pg_collection)
        sizes.append(saved_bytes(model.last, torch.arange(64)[None]))
    planned = kept(arch, config.parallel, config.model.dtype, 64)
    assert (sizes[1] - sizes[0]) / 2 == planned, (config.model, config.parallel, sizes, planned)


def check_checkpoint(config: Config, plan: Plan) -> None:
    """The whole tensors that a checkpoint would be made of."""
    layout, arch, model = build(config)
    optimizer = build_optimizer(Student(model, layout, config, arch.vocab_size, divergence(config)), config.optim)
    optimizer.step()
    tensors: dict[str, int] = {}

    def count(part: object) -> object:
        if isinstance(part, ShardedTensor):
            tensors[part.key] = prod(part.global_shape) * part.dtype.itemsize
        return part

    state = checkpoint._state(model, optimizer, None, loading=False)
    apply_factories(state)  # gate and up, which are saved apart
    dict_list_map_outplace(count, state)
    if layout.rank == 0:  # where the data-parallel ranks' optimizer states are gathered
        assert sum(tensors.values()) == plan.checkpoint
