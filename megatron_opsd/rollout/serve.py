"""``opsd serve``: one vLLM server that takes the trainer's weights and writes its rollouts."""

import hmac
import ipaddress
import json
import os
import socket
import sys
from typing import Any

import torch

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.rollout.vllm_setup import engine_arguments, prepare_environment

KEY_VARIABLE = "OPSD_API_KEY"

# What the trainer uses. Weight transfer needs vLLM's development mode, which opens many more: even calls of any method.
OPEN_PATHS = {
    "/health",
    "/v1/models",
    "/get_world_size",
    "/weight_info",
    "/inference/v1/generate",
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
}


def serve(config: Config, max_model_len: int, host: str, port: int) -> None:
    """Replace this process by the server, so that signals reach vLLM.

    Raises:
        UserError: other machines can reach ``host``, and there is no key; or the port is in use.
    """
    if not is_loopback(host) and not os.environ.get(KEY_VARIABLE):
        raise UserError(
            f"--host {host}: other machines could reach this server and change its weights; set the environment "
            f"variable {KEY_VARIABLE} to a secret here and where the run trains, or serve on 127.0.0.1"
        )
    _check_port(host, port)
    prepare_environment()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # only this mode has the paths for weights
    arguments = {
        **engine_arguments(config, max_model_len),
        "host": host,
        "port": port,
        "weight_transfer_config": json.dumps({"backend": "opsd_nccl" if torch.cuda.is_available() else "opsd_tcp"}),
        "worker_extension_cls": "megatron_opsd.rollout.weight_transfer.RegisterEngines",
        "middleware": "megatron_opsd.rollout.serve.Gate",
        "enable_scale_out": True,  # token ids in, token ids out
        "disable_uvicorn_access_log": True,
    }
    # Not `vllm serve`: it needs a distribution named vllm, and the one for CPU has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *as_flags(arguments)]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise UserError(f"--port = {port}: must be between 1 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended holds no port
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); name another") from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Keyword arguments as flags of vLLM's command line; None leaves vLLM's default."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


class Gate:
    """ASGI middleware that admits only the paths that the trainer uses and, if the server has a key, only with the key.

    vLLM's own --api-key does not protect the paths for weights.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE)
        self._wanted = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or scope["path"] not in OPEN_PATHS:
            await _refuse(send, 404)
        elif scope["path"] != "/health" and not self._has_key(scope):
            await _refuse(send, 401)
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._wanted is None or hmac.compare_digest(given, self._wanted)


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
