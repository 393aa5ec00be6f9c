"""Rank 0's client of one vLLM server: requests over HTTP, and a channel for the weights."""

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from torch import Tensor

from megatron_opsd import events
from megatron_opsd.errors import UserError
from megatron_opsd.rollout.channel import Channel, make_channel
from megatron_opsd.rollout.engine import Sampling
from megatron_opsd.rollout.serve import KEY_VARIABLE
from megatron_opsd.rollout.vllm_setup import sampling_arguments
from megatron_opsd.types import Rollout

PROBE_SECONDS = 30.0  # for /health; vLLM answers it also while it works, so a later answer means that it has failed
CONTROL_SECONDS = 300.0  # for one bucket of weights, or another step of a refit


class ServerError(Exception):
    """How one server failed. The message ends a sentence that begins with the server's URL."""


async def open_session() -> aiohttp.ClientSession:
    key = os.environ.get(KEY_VARIABLE)
    # A new connection for each request: an idle one may close just when it is reused, which would look like a failure.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {key}"} if key else {})


class ServerClient:
    """Every request raises :class:`ServerError` if the server fails."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.lost = ""  # how it failed; empty if it has not
        self._session = session
        self._channel: Channel | None = None

    @property
    def healthy(self) -> bool:
        """Whether it took part in the whole last refit and has not failed since."""
        return self._channel is not None

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def check(self, max_model_len: int) -> None:
        """Raise UserError unless the server answers, accepts the key and takes sequences as long as the run's."""
        remedy = "start it with `opsd serve FILE.toml`, with this run's file and settings"
        try:
            await self._call("GET", "/health", timeout=PROBE_SECONDS)
            (model,) = (await self._call("GET", "/v1/models"))["data"]
            await self._call("GET", "/weight_info")
        except (ServerError, RuntimeError) as failure:
            raise UserError(f"rollout.servers: {self.url} {failure}; {remedy}") from None
        if model["max_model_len"] < max_model_len:
            raise UserError(
                f"rollout.servers: {self.url} takes sequences of {model['max_model_len']} tokens, this run has "
                f"{max_model_len}; {remedy}"
            )

    async def watch(self) -> None:
        """Probe the server's health forever: a machine that is gone does not close its connections."""
        while True:
            await asyncio.sleep(PROBE_SECONDS / 3)
            await self._call("GET", "/health", timeout=PROBE_SECONDS)

    async def write(self, prompt: list[int], sampling: Sampling, seed: int, label: str, version: int) -> Rollout:
        """One rollout, written only by the weights ``label``."""
        body = {"token_ids": prompt, "sampling_params": sampling_arguments(sampling, seed)}
        answer = await self._call("POST", "/inference/v1/generate", body, timeout=None)  # long tails
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerError(f"ended a response with finish_reason {choice['finish_reason']!r}")
        labels = {span["version"] for span in choice["weight_versions"] or ()}
        if labels != {label}:
            raise ServerError(f"holds weights {sorted(labels)} instead of {label!r}, as if it had restarted")
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Rollout(choice["token_ids"], logprobs, choice["finish_reason"], version)

    async def begin_update(self, before: str, during: str) -> None:
        """Make the server ready to receive, labelled ``during``. If it does not hold ``before``, it joins first."""
        if self._channel is not None:
            answer = await self._call("GET", "/weight_info", timeout=PROBE_SECONDS)
            if answer["weight_version"] != before:
                self.close()
        if self._channel is None:
            await self._join()
        await self._call("POST", "/pause")  # aborts requests that an abandoned step has left
        await self._call("POST", "/update_weight_version", {"new_version": during})
        await self._call_between_updates("/start_weight_update")

    async def receive(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Send a bucket to the server."""
        info = {
            "names": names,
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        channel = self._channel
        assert channel is not None
        await self._both("/update_weights", {"update_info": info}, lambda: channel.send(tensors))

    async def end_update(self, label: str) -> None:
        """Resume with the new weights, labelled ``label``."""
        await self._call("POST", "/finish_weight_update", {"weight_version": label})
        if not (await self._call("POST", "/reset_prefix_cache"))["success"]:
            raise ServerError("kept its prefix cache, of older weights")
        await self._call("POST", "/resume")

    async def _join(self) -> None:
        await self._call("GET", "/health", timeout=PROBE_SECONDS)
        workers = (await self._call("GET", "/get_world_size"))["world_size"]
        await self._call_between_updates("/shutdown_weight_transfer_engine")  # an earlier run's
        address = urlsplit(self.url)
        try:
            self._channel = channel = make_channel(str(address.hostname), int(address.port or 0), workers)
        except OSError as error:
            raise ServerError(f"cannot be reached ({error})") from None
        await self._both("/init_weight_transfer_engine", {"init_info": channel.init_info}, channel.open)
        if self.lost:
            events.record("warning", text=f"the rollout server {self.url} is back")
            self.lost = ""

    async def _call_between_updates(self, path: str) -> None:
        """POST to ``path``. If it fails, first close an update that a killed run or a refused tensor has left open."""
        try:
            await self._call("POST", path)
        except ServerError:
            await self._call("POST", "/finish_weight_update")
            await self._call("POST", path)

    async def _both(self, path: str, body: Any, work: Callable[[], None]) -> None:
        """POST to ``path`` while a thread does this side's part. If one fails, closing the channel ends the other."""
        request = asyncio.ensure_future(self._call("POST", path, body))
        part = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.wait((request, part), return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in (request, part)):
            self.close()
        _, problem = await asyncio.gather(request, part, return_exceptions=True)
        await request
        if isinstance(problem, OSError):
            raise ServerError(f"broke the transfer of weights off ({problem})")
        await part

    async def _call(self, method: str, path: str, body: Any = None, timeout: float | None = CONTROL_SECONDS) -> Any:
        """Send one request and return the parsed answer."""
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=PROBE_SECONDS)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=limits) as response:
                text = await response.text()
        except TimeoutError:
            raise ServerError(f"did not answer {path} in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"did not answer {path} ({error or type(error).__name__})") from None
        if response.status == 401:
            raise UserError(f"{self.url} refuses the key; set {KEY_VARIABLE} to the one it was started with")
        if response.status >= 500:
            raise ServerError(f"failed at {path} with status {response.status}: {text[:300]!r}")
        if response.status >= 400:
            raise RuntimeError(f"{self.url} answers {path} with status {response.status}: {text[:300]!r}")
        return await response.json() if text else None
