"""Colocated and server engines pass one suite and write the same rollouts; then what servers alone can do: die."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.config_file import load_config
from megatron_opsd.errors import StepAbortedError, UserError
from megatron_opsd.model import parallel
from megatron_opsd.reliability.run_dir import read_jsonl
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import Engine, NoServerLeftError, Sampling, sample_seed
from megatron_opsd.types import Rollout
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable

from . import runs
from .command_line import ARITHMETIC, ROOT, write_problems
from .harness import run_distributed
from .runs import tokens
from .test_runs import numbers, write_arithmetic_model

KEY = "a key of the tests"
LENGTH = 240  # max_model_len
PROMPTS = [[i + 1, i + 2, 3, 4] for i in range(8)] + [[6, 7, 8] * 50]  # the last fills a block of the prefix cache
GREEDY = Sampling(16, temperature=0.0)
SAMPLED = Sampling(16, temperature=2.0, top_p=0.95, top_k=50)
LONG = Sampling(200, temperature=2.0)  # long enough to die in the middle of it
SEEDS = [sample_seed(0, 1, i) for i in range(len(PROMPTS))]  # of 63 bits


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass(frozen=True)
class Server:
    """``opsd serve`` in a process group of its own, which any process can end and start again."""

    folder: Path
    port: int
    flags: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "megatron_opsd", "serve", str(ARITHMETIC / "opsd.toml"), *self.flags]
        lengths = ["--data.max_problem_tokens", "160", "--rollout.kv_cache_gib", "0.1"]
        # A rank that starts a server has settings for a vLLM of its own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OPSD_API_KEY": KEY}
        with self._file("log").open("a") as log:
            process = subprocess.Popen(
                [*command, "--port", str(self.port), *lengths],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._file("pid").write_text(str(process.pid))

    def wait(self, timeout: float = 200) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            with contextlib.suppress(ChildProcessError):  # another process has started it
                assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self._file("log").read_text()
            time.sleep(0.5)
        raise TimeoutError(self._file("log").read_text())

    def kill(self) -> None:
        """As if its machine had lost its power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def pid(self) -> int:
        return int(self._file("pid").read_text())

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.port}.{kind}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    write_problems(path / "data", rows=64)
    return path


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[Server]]:
    """Two that run, until a test kills them."""
    pair = [Server(folder, free_port()), Server(folder, free_port())]
    try:
        for server in pair:
            server.start()
        for server in pair:
            server.wait()
        yield pair
    finally:
        for server in pair:
            server.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSD_API_KEY", KEY)


def configure(urls: list[str], **overrides: str) -> Config:
    served = {"rollout.engine": "server", "rollout.servers": json.dumps(urls)} if urls else {}
    common = {
        "model.path": str(ARITHMETIC / "base"),
        "parallel.tensor_model_parallel_size": "1",
        "rollout.kv_cache_gib": "0.1",
        "rollout.refit_bucket_mib": "0.2",
    }
    return load_config(str(ARITHMETIC / "opsd.toml"), common | served | overrides)


def weights(model: str, scale: float = 1.0) -> Iterator[tuple[str, torch.Tensor]]:
    reader = HFReader(model)
    for name in NameTable(read_architecture(model)).hf_tensors():
        yield name, reader.read(name) * scale


def start(config: Config) -> Engine:
    parallel.initialize(config.parallel, seed=0)
    return build_engine(config, LENGTH)


def token_ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


def behaviours(urls: list[str], out: Path) -> None:
    """What every engine does, on two ranks."""
    config = configure(urls)
    model, engine = config.model.path, start(config)
    with pytest.raises(AssertionError, match="refit before"):
        engine.generate(PROMPTS, GREEDY, SEEDS)

    engine.update_weights(weights(model), version=5)
    greedy, sampled = (engine.generate(PROMPTS, sampling, SEEDS) for sampling in (GREEDY, SAMPLED))
    assert {rollout.weight_version for rollout in greedy + sampled} == {5}
    assert len({tuple(ids) for ids in token_ids(sampled)}) > len(PROMPTS) / 2
    backwards = engine.generate(PROMPTS[::-1], SAMPLED, SEEDS[::-1])
    assert token_ids(backwards[::-1]) == token_ids(sampled)
    assert engine.generate(PROMPTS[:1], SAMPLED, SEEDS[:1])[0].token_ids == sampled[0].token_ids
    everyone: list[list[Rollout]] = [[], []]
    dist.all_gather_object(everyone, sampled)
    assert everyone[0] == everyone[1]

    # Other weights, other answers, also to a prompt whose blocks are cached; and back.
    engine.update_weights(weights(model, scale=0.5), version=6)
    changed = engine.generate(PROMPTS, GREEDY, SEEDS)
    assert {rollout.weight_version for rollout in changed} == {6}
    assert all(ours != theirs for ours, theirs in zip(token_ids(changed), token_ids(greedy), strict=True))
    engine.update_weights(weights(model), version=7)
    assert token_ids(engine.generate(PROMPTS, GREEDY, SEEDS)) == token_ids(greedy)

    # A refit that breaks off in the middle of a layer writes nothing and spoils nothing.
    with pytest.raises(ValueError, match="broken off"):
        engine.update_weights(break_off(weights(model, scale=0.5)), version=8)
    with pytest.raises(AssertionError, match="refit before"):
        engine.generate(PROMPTS, GREEDY, SEEDS)
    engine.update_weights(weights(model), version=9)
    assert token_ids(engine.generate(PROMPTS, SAMPLED, SEEDS)) == token_ids(sampled)

    # Given up by one rank, by all; the next one starts without remains.
    seeds = [sample_seed(0, 2, i) for i in range(64)]
    with pytest.raises(StepAbortedError):
        engine.generate([PROMPTS[0]] * 64, LONG, seeds, lambda: dist.get_rank() == 1)
    assert token_ids(engine.generate(PROMPTS, SAMPLED, SEEDS)) == token_ids(sampled)
    if dist.get_rank() == 0:
        records = [(r.token_ids, r.logprobs, r.finish_reason) for r in greedy + sampled + changed]
        out.write_text(json.dumps(records))
    engine.close()


def break_off(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if "layers.1.self_attn.k_proj" in name:
            raise ValueError("broken off")
        yield name, tensor


@pytest.mark.parametrize("engine", ["colocated", "server"])
def test_suite(engine: str, folder: Path, request: pytest.FixtureRequest) -> None:
    servers = request.getfixturevalue("servers") if engine == "server" else []
    run_distributed(behaviours, 2, [server.url for server in servers], folder / f"{engine}.json")


def test_both_engines_write_the_same(folder: Path) -> None:
    colocated, server = (json.loads((folder / f"{engine}.json").read_text()) for engine in ("colocated", "server"))
    assert len(colocated) == 3 * len(PROMPTS)
    for (ids, logprobs, reason), (other_ids, other_logprobs, other_reason) in zip(colocated, server, strict=True):
        assert (ids, reason) == (other_ids, other_reason)
        assert logprobs == pytest.approx(other_logprobs, abs=1e-5)


def status(url: str, body: object = None, key: str = "") -> int:
    """HTTP status of a GET, or with a body of a POST."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_key_guards_every_path_and_most_are_shut(servers: list[Server]) -> None:
    url = servers[0].url
    assert status(f"{url}/weight_info", key=KEY) == 200
    for path, body in (
        ("/weight_info", None),
        ("/v1/models", None),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
        ("/init_weight_transfer_engine", {"init_info": {}}),
        ("/update_weights", {"update_info": {}}),
        ("/pause", {}),
    ):
        assert [status(url + path, body, key) for key in ("", "another key")] == [401, 401], path
    for path, body in (("/collective_rpc", {"method": "shutdown"}), ("/v1/completions", {}), ("/docs", None)):
        assert status(url + path, body, KEY) == 404, path
    process = Path(f"/proc/{servers[0].pid}/cmdline").read_bytes()
    assert b"vllm" in process  # the server itself: signals reach it
    assert KEY.encode() not in process
    assert KEY not in servers[0]._file("log").read_text()


def refusals(url: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    parallel.initialize(configure([url]).parallel, seed=0)
    for urls, length, message in (
        ([url, nobody], LENGTH, f"{nobody} did not answer /health .*; start it with `opsd serve"),
        ([url], 4096, f"{url} takes sequences of 258 tokens, this run has 4096; start it with"),
    ):
        with pytest.raises(UserError, match=message):
            build_engine(configure(urls), length)
    os.environ["OPSD_API_KEY"] = "another key"
    with pytest.raises(UserError, match=f"{url} refuses the key; set OPSD_API_KEY to the one"):
        build_engine(configure([url]), LENGTH)


def test_a_server_that_cannot_be_used_costs_one_line(servers: list[Server]) -> None:
    run_distributed(refusals, 1, servers[0].url)


def test_a_run_with_servers_equals_a_colocated_one(servers: list[Server], folder: Path) -> None:
    common = {
        "data.path": str(folder / "data" / "train.jsonl"),
        "evaluate.data.path": str(folder / "data" / "test.jsonl"),
        "evaluate.interval": "2",
        "evaluate.limit": "16",
        "train.steps": "2",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "4",
        "optim.warmup_steps": "0",
        "checkpoint.save_interval": "0",
        "checkpoint.export_hf": "false",
        "logging.rollouts_interval": "1",
        "logging.tensorboard": "false",
        "rollout.kv_cache_gib": "0.1",
    }
    urls = json.dumps([server.url for server in servers])
    engines = {"colocated": {}, "server": {"rollout.engine": "server", "rollout.servers": urls}}
    for name, engine in engines.items():
        runs.train(folder / "runs" / name, 2, common | engine)
    wanted, served = folder / "runs" / "colocated", folder / "runs" / "server"
    assert [tokens(served, step) for step in (1, 2)] == [tokens(wanted, step) for step in (1, 2)]
    for line, other in zip(numbers(served), numbers(wanted), strict=True):
        assert line == pytest.approx(other, rel=1e-6)
    assert KEY not in (served / "config.toml").read_text()


def failures(first: Server, second: Server) -> None:
    """On two ranks; rank 0 kills and starts the servers, and is the one that warns."""
    config = configure([first.url, second.url])
    model, engine = config.model.path, start(config)
    is_client, file = dist.get_rank() == 0, first.folder / f"events_{dist.get_rank()}.jsonl"
    events.write_to(file, [])
    prompts, seeds = PROMPTS[:8] * 8, [sample_seed(0, 3, i) for i in range(64)]
    seen = 0

    def write() -> list[list[int]]:
        return token_ids(engine.generate(prompts, LONG, seeds))

    def warned(*patterns: str) -> None:
        """Check the warnings since the last call: one for each pattern."""
        nonlocal seen
        new = read_jsonl(file)[seen:]
        seen += len(new)
        assert [event["event"] for event in new] == ["warning"] * (len(patterns) if is_client else 0), new
        for event, pattern in zip(new, patterns, strict=is_client):
            assert re.match(pattern, event["text"]), event

    def outside(action: Callable[[], None]) -> None:
        if is_client:
            action()
        dist.barrier()

    def restart() -> None:
        first.kill()
        first.start()
        first.wait()

    engine.update_weights(weights(model), version=1)
    wanted = write()
    warned()

    # One comes back between refit and rollouts, unnoticed and with random weights.
    outside(restart)
    assert write() == wanted
    holds = rf"lost the rollout server {first.url}: it holds weights \['default'\].* as if it had restarted; "
    warned(holds + "1 others go on, with its")

    # It gets work again after the next refit,
    engine.update_weights(weights(model, scale=0.9), version=2)
    warned(f"the rollout server {first.url} is back$")
    changed = write()
    assert changed != wanted

    # and alone, when the other one dies in the middle.
    if is_client:
        killer = threading.Timer(0.5, second.kill)
        killer.start()
    assert write() == changed
    warned(f"lost the rollout server {second.url}: it did not answer /inference.*1 others go on, with its")
    engine.update_weights(weights(model), version=3)
    assert write() == wanted
    warned()  # once, not at each step

    outside(first.kill)
    for act in (write, lambda: engine.update_weights(weights(model), version=4)):
        message = f"no rollout server is left: {first.url} .*; {second.url} "
        with pytest.raises(NoServerLeftError, match=message) as raised:
            act()
        assert "\n" not in str(raised.value)
    assert len(read_jsonl(file)) - seen <= 1
    engine.close()


def test_servers_die_and_come_back(servers: list[Server]) -> None:
    run_distributed(failures, 2, *servers, timeout=400)


def experts(url: str, model: str, out: Path) -> None:
    config = configure([url], **{"model.path": model})
    engine = start(config)
    for version, scale in enumerate((0.5, 1.0)):
        engine.update_weights(weights(model, scale), version)
        rollouts = engine.generate(PROMPTS, GREEDY, SEEDS)
    out.write_text(json.dumps([(rollout.token_ids, rollout.logprobs) for rollout in rollouts]))
    engine.close()


def test_experts_on_two_processes_of_one_server(folder: Path) -> None:
    """The second refit of packed experts, over tensor-parallel workers; the reference is transformers."""
    path = write_arithmetic_model(folder / "experts", "qwen3_moe")
    server = Server(folder, free_port(), ("--model.path", str(path), "--rollout.tensor_model_parallel_size", "2"))
    try:
        server.start()
        server.wait()
        run_distributed(experts, 1, server.url, str(path), folder / "experts.json")
    finally:
        server.kill()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, (ids, logprobs) in zip(PROMPTS, json.loads((folder / "experts.json").read_text()), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert expected.argmax(-1).tolist() == ids
        assert logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
