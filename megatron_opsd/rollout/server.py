"""vLLM in servers of its own, beside the training processes or on other nodes; ``opsd serve`` starts one.

Rank 0 speaks to the servers, for all ranks. A server that fails is lost until the next refit, which takes it back once
it answers; its unfinished requests go to the others. vLLM puts the label of the weights on every response, so that none
of a server that restarted in between is taken for good.
"""

import asyncio
import logging
import os
import resource
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.errors import AbandonedError, UserError
from megatron_opsd.rollout.channel import Channel, make_channel
from megatron_opsd.rollout.engine import NoServerLeftError, Sampling
from megatron_opsd.rollout.serve import KEY_VARIABLE
from megatron_opsd.rollout.vllm_setup import sampling_arguments
from megatron_opsd.types import Rollout

log = logging.getLogger(__name__)

PROBE_SECONDS = 30.0  # a server that does not say in this time that it is well is not; vLLM answers beside its work
CONTROL_SECONDS = 300.0  # for one bucket of weights, or one step on the way to them
POLL_SECONDS = 1.0
WATCH = -1  # the index of what is no prompt

T = TypeVar("T")


class ServerError(Exception):
    """What one server did, as the end of a sentence that its URL begins."""


@dataclass
class _Server:
    url: str
    channel: Channel | None = None  # None: lost, or not yet taken in
    lost: str = ""  # what it did
    in_flight: int = 0

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class ServedVLLM:
    """An :class:`Engine` of the servers ``rollout.servers``. They sleep and wake for themselves: those are no-ops here.

    Raises:
        UserError: at the start, a server that does not answer or was started for shorter sequences.
        NoServerLeftError: later, from ``generate`` and ``update_weights`` on all ranks.
    """

    def __init__(self, config: Config, max_model_len: int) -> None:
        self._servers = [_Server(url.rstrip("/")) for url in config.rollout.servers]
        self._most_in_flight = config.rollout.max_num_seqs
        self._bucket_bytes = int(config.rollout.refit_bucket_mib * 2**20)
        self._run = secrets.token_hex(8)  # other runs' weights have other labels
        self._label = ""
        self._version = -1
        self._is_client = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo")
        if self._is_client:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request in flight is a connection
            self._loop = asyncio.new_event_loop()
            self._session = self._loop.run_until_complete(_open_session())
        try:
            self._together(lambda: self._check_all(max_model_len))
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        give_up: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        assert self._version >= 0, "refit before the first token"
        if not self._is_client:
            while not any(self._agree(give_up(), done=False)):  # rank 0 asks about every POLL_SECONDS
                pass
        return self._together(lambda: self._generate(prompts, sampling, seeds, give_up))

    def _agree(self, give_up: bool, done: bool) -> tuple[bool, bool]:
        """Whether any rank gives up, and whether rank 0 is done. All ranks call this together."""
        flags = torch.tensor([give_up, done], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags[0]), bool(flags[1])

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # until the whole set has arrived
        self._together(self._begin_update)
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in named_tensors:  # a collective: to its end, whoever is left to send to
            if self._is_client:
                bucket.append((name, tensor))
                size += tensor.nbytes
                if size >= self._bucket_bytes:
                    self._loop.run_until_complete(self._send(bucket))
                    bucket, size = [], 0
        if bucket:
            self._loop.run_until_complete(self._send(bucket))
        self._together(lambda: self._end_update(f"{self._run}/{version}"))
        self._version = version

    def sleep(self) -> None: ...

    def wake_up_weights(self) -> None: ...

    def wake_up_kv_cache(self) -> None: ...

    def close(self) -> None:
        if self._is_client:
            for server in self._servers:
                server.close()
            self._loop.run_until_complete(self._session.close())
            self._loop.close()

    def _together(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Rank 0 does the work; every rank gets what it returns, or raises what it raises."""
        outcome: list[Any] = [None, None]
        if self._is_client:
            try:
                outcome[0] = self._loop.run_until_complete(work())
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # Rank 0 only from here on.

    async def _check_all(self, max_model_len: int) -> None:
        await asyncio.gather(*(self._check(server, max_model_len) for server in self._servers))

    async def _check(self, server: _Server, max_model_len: int) -> None:
        """Raise UserError unless the server is there, takes the key and has room for the run's sequences."""
        remedy = "start it with `opsd serve FILE.toml`, with this run's file and settings"
        try:
            await self._call(server, "GET", "/health", timeout=PROBE_SECONDS)
            (model,) = (await self._call(server, "GET", "/v1/models"))["data"]
            await self._call(server, "GET", "/weight_info")
        except (ServerError, LookupError, RuntimeError) as failure:
            raise UserError(f"rollout.servers: {server.url} {failure}; {remedy}") from None
        if model["max_model_len"] < max_model_len:
            raise UserError(
                f"rollout.servers: {server.url} takes sequences of {model['max_model_len']} tokens, this run has "
                f"{max_model_len}; {remedy}"
            )

    async def _call(
        self, server: _Server, method: str, path: str, body: Any = None, timeout: float | None = CONTROL_SECONDS
    ) -> Any:
        """One request; the parsed answer.

        Raises:
            ServerError: it cannot be reached, breaks off, fails or takes longer than ``timeout`` seconds.
        """
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=PROBE_SECONDS)
        try:
            async with self._session.request(method, server.url + path, json=body, timeout=limits) as response:
                text = await response.text()
        except TimeoutError:
            raise ServerError(f"did not answer {path} in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"did not answer {path} ({error or type(error).__name__})") from None
        if response.status == 401:
            raise UserError(f"{server.url} refuses the key; set {KEY_VARIABLE} to the one it was started with")
        if response.status >= 500:
            raise ServerError(f"failed at {path} with status {response.status}: {text[:300]}")
        if response.status >= 400:
            raise RuntimeError(f"answers {path} with status {response.status}: {text[:300]}")
        return await response.json() if text else None

    def _lose(self, server: _Server, failure: Exception, unfinished: int = 0) -> None:
        server.close()
        if not server.lost:
            left, more = len(self._living()), f", with its {unfinished} unfinished responses" if unfinished else ""
            log.warning("lost the rollout server %s: it %s; %d others go on%s", server.url, failure, left, more)
        server.lost = str(failure)

    def _check_left(self) -> None:
        if all(server.channel is None for server in self._servers):
            what = "; ".join(f"{server.url} {server.lost}" for server in self._servers)
            raise NoServerLeftError(f"no rollout server is left: {what}")

    async def _on_each(self, servers: Iterable[_Server], step: Callable[[_Server], Awaitable[None]]) -> None:
        """Do a step with each server at the same time; who fails is lost."""

        async def one(server: _Server) -> None:
            try:
                await step(server)
            except ServerError as failure:
                self._lose(server, failure)

        await asyncio.gather(*(one(server) for server in servers))

    def _living(self) -> list[_Server]:
        return [server for server in self._servers if server.channel is not None]

    async def _begin_update(self) -> None:
        await self._on_each(self._servers, self._prepare)
        self._label = f"{self._run}/incomplete"
        self._check_left()

    async def _prepare(self, server: _Server) -> None:
        """Make a server ready to receive; one that is new, was lost or has restarted joins first."""
        if server.channel is not None:
            answer = await self._call(server, "GET", "/weight_info", timeout=PROBE_SECONDS)
            if answer["weight_version"] != self._label:
                server.close()
        if server.channel is None:
            await self._join(server)
        await self._call(server, "POST", "/pause")  # aborts what an abandoned step has left there
        await self._call(server, "POST", "/update_weight_version", {"new_version": f"{self._run}/incomplete"})
        await self._call_between_updates(server, "/start_weight_update")

    async def _join(self, server: _Server) -> None:
        await self._call(server, "GET", "/health", timeout=PROBE_SECONDS)
        workers = (await self._call(server, "GET", "/get_world_size"))["world_size"]
        await self._call_between_updates(server, "/shutdown_weight_transfer_engine")  # an earlier run's
        address = urlsplit(server.url)
        try:
            server.channel = make_channel(str(address.hostname), address.port or 80, workers)
        except OSError as error:
            raise ServerError(f"cannot be reached ({error})") from None
        init = {"init_info": server.channel.init_info}
        await self._both(server, "/init_weight_transfer_engine", init, server.channel.open)
        if server.lost:
            log.warning("the rollout server %s is back", server.url)
            server.lost = ""

    async def _call_between_updates(self, server: _Server, path: str) -> None:
        """POST to ``path``; an update that a killed run or a refused tensor has left open is closed first."""
        try:
            await self._call(server, "POST", path)
        except ServerError:
            await self._call(server, "POST", "/finish_weight_update")
            await self._call(server, "POST", path)

    async def _send(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        tensors = [tensor for _, tensor in bucket]
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }

        async def one(server: _Server) -> None:
            assert server.channel is not None
            channel = server.channel
            await self._both(server, "/update_weights", {"update_info": info}, lambda: channel.send(tensors))

        await self._on_each(self._living(), one)

    async def _both(self, server: _Server, path: str, body: Any, work: Callable[[], None]) -> None:
        """POST to ``path`` while a thread does this side's part. Where one fails, the channel's end ends the other."""
        request = asyncio.ensure_future(self._call(server, "POST", path, body))
        part = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.wait((request, part), return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in (request, part)):
            server.close()
        _, problem = await asyncio.gather(request, part, return_exceptions=True)
        await request
        if isinstance(problem, OSError):
            raise ServerError(f"broke the transfer of weights off ({problem})")
        await part

    async def _end_update(self, label: str) -> None:
        async def one(server: _Server) -> None:
            await self._call(server, "POST", "/finish_weight_update", {"weight_version": label})
            if not (await self._call(server, "POST", "/reset_prefix_cache"))["success"]:
                raise ServerError("kept its prefix cache, of older weights")
            await self._call(server, "POST", "/resume")

        await self._on_each(self._living(), one)
        self._label = label
        self._check_left()

    async def _generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], give_up: Callable[[], bool]
    ) -> list[Rollout]:
        work = asyncio.create_task(self._write_all(prompts, sampling, seeds))
        while not work.done():
            await asyncio.wait((work,), timeout=POLL_SECONDS)
            leave, _ = self._agree(give_up(), work.done())
            if leave and not work.done():
                work.cancel()
                await asyncio.wait((work,))
                raise AbandonedError("was given up while its rollouts were written")
        return work.result()

    async def _write_all(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Spread the prompts over the living servers; those of a server that fails go to the others."""
        rollouts: dict[int, Rollout] = {}
        waiting = deque(range(len(prompts)))
        running: dict[asyncio.Task[Any], tuple[_Server, int]] = {}
        dropped: list[asyncio.Task[Any]] = []
        for server in self._living():
            server.in_flight = 0
            running[asyncio.create_task(self._watch(server))] = server, WATCH
        try:
            while len(rollouts) < len(prompts):
                self._check_left()
                while waiting and (server := self._least_busy()).in_flight < self._most_in_flight:
                    index = waiting.popleft()
                    server.in_flight += 1
                    task = asyncio.create_task(self._write(server, prompts[index], sampling, seeds[index]))
                    running[task] = server, index
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task not in running:
                        continue  # of a server that was lost just now
                    server, index = running[task]
                    failure = task.exception()
                    if isinstance(failure, ServerError):
                        own = {task: index for task, (owner, index) in running.items() if owner is server}
                        unfinished = [index for index in own.values() if index != WATCH]
                        for task in own:
                            task.cancel()
                            del running[task]
                        dropped += own
                        waiting.extend(unfinished)
                        self._lose(server, failure, len(unfinished))
                    else:
                        rollouts[index] = task.result()
                        server.in_flight -= 1
                        del running[task]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *dropped, return_exceptions=True)
        return [rollouts[i] for i in range(len(prompts))]

    def _least_busy(self) -> _Server:
        return min(self._living(), key=lambda server: server.in_flight)

    async def _watch(self, server: _Server) -> None:
        """Ask again and again whether the server is well; a machine that is gone breaks no connection."""
        while True:
            await asyncio.sleep(PROBE_SECONDS / 3)
            await self._call(server, "GET", "/health", timeout=PROBE_SECONDS)

    async def _write(self, server: _Server, prompt: list[int], sampling: Sampling, seed: int) -> Rollout:
        body = {"token_ids": prompt, "sampling_params": sampling_arguments(sampling, seed)}
        answer = await self._call(server, "POST", "/inference/v1/generate", body, timeout=None)  # long tails
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerError(f"ended a response with finish_reason {choice['finish_reason']!r}")
        labels = {span["version"] for span in choice["weight_versions"] or ()}
        if labels != {self._label}:
            raise ServerError(f"holds weights {sorted(labels)} instead of {self._label!r}: it has restarted")
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Rollout(choice["token_ids"], logprobs, choice["finish_reason"], self._version)


async def _open_session() -> aiohttp.ClientSession:
    key = os.environ.get(KEY_VARIABLE)
    # A connection for each request: an idle one may close just as it is used again, which would look like a failure.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {key}"} if key else {})
