"""`opsd serve` and the settings of engine `server`: mistakes cost one line, and the gate is shut where it should be."""

import asyncio
import socket
import threading
from pathlib import Path

import pytest
import torch

from megatron_opsd.cli import main
from megatron_opsd.config_file import dump_toml, load_config
from megatron_opsd.rollout.channel import TCPChannel, as_bytes, receive_into
from megatron_opsd.rollout.serve import Gate, as_flags, is_loopback

from .test_errors import ARITHMETIC, config  # noqa: F401  (a fixture)

SERVED = ["--rollout.engine", "server", "--rollout.servers"]


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ("[]", ["rollout.engine = 'server' needs rollout.servers", "opsd serve"]),
        ('["127.0.0.1:8000"]', ["rollout.servers = '127.0.0.1:8000'", "such as http://127.0.0.1:8000"]),
        ('["http://node7"]', ["rollout.servers = 'http://node7'", "such as http://127.0.0.1:8000"]),
        ('["http://node7:8000/v1"]', ["rollout.servers = 'http://node7:8000/v1'"]),
        ('["http://node7:port"]', ["rollout.servers = 'http://node7:port'"]),
        ('["http://a:1", "http://b:1", "http://a:1"]', ["rollout.servers = 'http://a:1'", "twice", "remove one"]),
        ("[8000]", ["rollout.servers.0 = 8000", "string"]),
        ("http://node7:8000", ["--rollout.servers = 'http://node7:8000'", "list"]),
    ],
)
def test_servers_are_checked_without_asking_them(
    config: list[str],  # noqa: F811
    servers: str,
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", *config, *SERVED, servers])
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in expected), line


def test_a_servers_layout_is_its_own(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Four heads over four processes of a server, beside a run of two ranks."""
    layout = ["--rollout.tensor_model_parallel_size", "4", "--world-size", "2"]
    main(["check", *config, *SERVED, '["http://node7:8000", "https://[::1]:8001/"]', *layout])
    assert capsys.readouterr().out.endswith("no mistakes found\n")


def test_servers_read_back(config: list[str], tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "run.toml"
    settings = {"rollout.engine": "server", "rollout.servers": '["http://node7:8000"]'}
    resolved = load_config(config[0], settings)
    file.write_text(dump_toml(resolved))
    assert load_config(str(file), {}) == resolved


def test_other_hosts_need_a_key(
    config: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPSD_API_KEY", "")
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(ARITHMETIC / "opsd.toml"), "--model.path", config[2], "--host", "0.0.0.0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opsd: --host 0.0.0.0: other machines could reach this server")
    assert "OPSD_API_KEY" in line


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.7", "node7")))


def test_a_port_in_use(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with pytest.raises(SystemExit, match="2"):
            main(["serve", *config, "--port", port])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use)" in line


def test_flags() -> None:
    arguments = {"max_num_seqs": 4, "enforce_eager": True, "enable_chunked_prefill": False, "seed": None}
    assert as_flags(arguments) == ["--max-num-seqs", "4", "--enforce-eager", "--no-enable-chunked-prefill"]


def ask(gate: Gate, path: str, kind: str = "http", **headers: str) -> int:
    """The status of the gate's refusal; 200 where it lets through."""
    statuses = []

    async def send(message: dict) -> None:
        statuses.append(message.get("status"))

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(gate(scope, None, send))
    return statuses[0] if statuses else 200


def test_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: object, receive: object, send: object) -> None: ...

    monkeypatch.delenv("OPSD_API_KEY", raising=False)
    gate = Gate(app)  # on 127.0.0.1
    assert ask(gate, "/update_weights") == 200
    assert [ask(gate, path) for path in ("/collective_rpc", "/update_weights/", "/", "//pause")] == [404] * 4
    assert ask(gate, "/pause", kind="websocket") == 404
    monkeypatch.setenv("OPSD_API_KEY", "secret")
    gate = Gate(app)
    assert ask(gate, "/health") == 200
    assert ask(gate, "/update_weights", authorization="Bearer secret") == 200
    for authorization in ("", "secret", "Bearer ", "Bearer secret2", "Bearer \u00fc"):
        assert ask(gate, "/update_weights", authorization=authorization) == 401
    assert ask(gate, "/collective_rpc", authorization="Bearer secret") == 404


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_serves_none_but_its_server(dtype: torch.dtype) -> None:
    """A stranger that connects first gets nothing, and the server every tensor as it is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = TCPChannel("127.0.0.1", server.getsockname()[1], workers=1)
    where = channel.init_info["address"], channel.init_info["port"]
    tensors = [torch.randn(3, 5).to(dtype), torch.randn(4, 2).to(dtype).t(), torch.empty(0, dtype=dtype)]
    with socket.create_connection(where) as stranger, socket.create_connection(where) as own:
        opening = threading.Thread(target=channel.open)
        opening.start()
        stranger.sendall(bytes(32))
        own.sendall(bytes.fromhex(channel.init_info["token"]))
        opening.join(timeout=20)
        assert stranger.recv(1) == b""
        channel.send(tensors)
        for tensor in tensors:
            received = torch.empty(tensor.shape, dtype=dtype)
            receive_into(own, as_bytes(received))
            assert torch.equal(received, tensor)
        channel.close()
        with pytest.raises(ConnectionResetError):
            receive_into(own, as_bytes(torch.empty(1)))
