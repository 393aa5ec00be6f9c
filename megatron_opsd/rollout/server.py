"""vLLM in separate servers, on the training nodes or on others; ``opsd serve`` starts one.

Rank 0 talks to the servers for all ranks. If a server fails, its unfinished responses go to the others, and the next
refit takes it back if it answers. vLLM puts the label of its weights on every response, so that responses of a server
that restarted in between are detected.
"""

import asyncio
import resource
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opsd import events
from megatron_opsd.config import Config
from megatron_opsd.errors import StepAbortedError
from megatron_opsd.rollout.client import ServerClient, ServerError, open_session
from megatron_opsd.rollout.engine import AlwaysAwake, NoServerLeftError, Sampling
from megatron_opsd.types import Rollout

POLL_SECONDS = 1.0
WATCH = -1  # instead of a prompt's index: the task that watches a server

T = TypeVar("T")


class ServedVLLM(AlwaysAwake):
    """An :class:`Engine` made of the servers ``rollout.servers``. They have their own memory, so nothing has to sleep.

    Raises:
        UserError: at the start, if a server does not answer or was started for shorter sequences.
        NoServerLeftError: later, from ``generate`` and ``update_weights``, on all ranks.
    """

    def __init__(self, config: Config, max_model_len: int) -> None:
        self._most_in_flight = config.rollout.max_num_seqs
        self._bucket_bytes = int(config.rollout.refit_bucket_mib * 2**20)
        self._run = secrets.token_hex(8)  # distinguishes the labels of this run's weights from other runs'
        self._label = ""
        self._version = -1
        self._group: Any = dist.new_group(backend="gloo")
        self._is_client = dist.get_rank() == 0
        self._servers: list[ServerClient] = []
        if self._is_client:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request in flight is a connection
            self._loop = asyncio.new_event_loop()
            self._session = self._loop.run_until_complete(open_session())
            self._servers = [ServerClient(url, self._session) for url in config.rollout.servers]
        try:
            self._together(lambda: self._check(max_model_len))
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        should_abort: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        assert self._version >= 0, "refit before the first token"
        if not self._is_client:
            while not any(self._agree(should_abort(), done=False)):  # rank 0 joins every POLL_SECONDS
                pass
        return self._together(lambda: self._generate(prompts, sampling, seeds, should_abort))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._version = -1  # until the whole set has arrived
        self._together(self._begin_update)
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in named_tensors:  # a collective: iterate to the end even if no server is left
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

    def close(self) -> None:
        if self._is_client:
            for server in self._servers:
                server.close()
            self._loop.run_until_complete(self._session.close())
            self._loop.close()

    def _together(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Rank 0 does the work; every rank returns its result or raises its exception."""
        outcome: list[Any] = [None, None]
        if self._is_client:
            try:
                outcome[0] = self._loop.run_until_complete(work())
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _agree(self, should_abort: bool, done: bool) -> tuple[bool, bool]:
        """Whether any rank wants to abort, and whether rank 0 is done. All ranks call this together."""
        flags = torch.tensor([should_abort, done], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags[0]), bool(flags[1])

    # Only rank 0 calls the methods below.

    async def _check(self, max_model_len: int) -> None:
        await asyncio.gather(*(server.check(max_model_len) for server in self._servers))

    async def _begin_update(self) -> None:
        before, self._label = self._label, f"{self._run}/incomplete"
        await self._each(self._servers, lambda server: server.begin_update(before, self._label))
        self._check_left()

    async def _send(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        names, tensors = zip(*bucket, strict=True)
        await self._each(self._living(), lambda server: server.receive(names, tensors))

    async def _end_update(self, label: str) -> None:
        self._label = label
        await self._each(self._living(), lambda server: server.end_update(label))
        self._check_left()

    async def _each(self, servers: Iterable[ServerClient], step: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Do a step with all of ``servers`` at once; a server that fails is lost."""

        async def one(server: ServerClient) -> None:
            try:
                await step(server)
            except ServerError as failure:
                self._lose(server, failure)

        await asyncio.gather(*(one(server) for server in servers))

    def _living(self) -> list[ServerClient]:
        return [server for server in self._servers if server.healthy]

    def _lose(self, server: ServerClient, failure: ServerError, unfinished: int = 0) -> None:
        server.close()
        if not server.lost:
            others = f"{len(self._living())} others go on"
            others += f", with its {unfinished} unfinished responses" if unfinished else ""
            events.record("warning", text=f"lost the rollout server {server.url}: it {failure}; {others}")
        server.lost = str(failure)

    def _check_left(self) -> None:
        if not self._living():
            what = "; ".join(f"{server.url} {server.lost}" for server in self._servers)
            raise NoServerLeftError(f"no rollout server is left: {what}")

    async def _generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], should_abort: Callable[[], bool]
    ) -> list[Rollout]:
        work = asyncio.create_task(self._write_all(prompts, sampling, seeds))
        while not work.done():
            await asyncio.wait((work,), timeout=POLL_SECONDS)
            leave, done = self._agree(should_abort(), work.done())
            if leave and not done:
                work.cancel()
                await asyncio.wait((work,))
                raise StepAbortedError("given up while responses were written")
        return work.result()

    async def _write_all(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Distribute the prompts over the healthy servers. If one fails, the others get its prompts."""
        rollouts: dict[int, Rollout] = {}
        self.finished = 0
        waiting = deque(range(len(prompts)))
        running: dict[asyncio.Task[Any], tuple[ServerClient, int]] = {}
        dropped: list[asyncio.Task[Any]] = []
        for server in self._living():
            server.in_flight = 0
            running[asyncio.create_task(server.watch())] = server, WATCH
        try:
            while len(rollouts) < len(prompts):
                self._check_left()
                while waiting and (server := self._least_busy()).in_flight < self._most_in_flight:
                    index = waiting.popleft()
                    work = server.write(prompts[index], sampling, seeds[index], self._label, self._version)
                    running[asyncio.create_task(work)] = server, index
                    server.in_flight += 1
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task not in running:
                        continue  # its server was lost just now
                    server, index = running[task]
                    failure = task.exception()
                    if isinstance(failure, ServerError):
                        own = {task: index for task, (owner, index) in running.items() if owner is server}
                        for task in own:
                            task.cancel()
                            del running[task]
                        dropped += own
                        unfinished = [index for index in own.values() if index != WATCH]
                        waiting.extend(unfinished)
                        self._lose(server, failure, len(unfinished))
                    else:
                        rollouts[index] = task.result()
                        self.finished = len(rollouts)
                        server.in_flight -= 1
                        del running[task]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *dropped, return_exceptions=True)
        return [rollouts[i] for i in range(len(prompts))]

    def _least_busy(self) -> ServerClient:
        return min(self._living(), key=lambda server: server.in_flight)
