"""The trainer's end of the weight transfer to one vLLM server; ``weight_transfer.py`` is the server's end.

Each server has its own channel, so that a server that dies does not affect the others.
"""

import base64
import contextlib
import hmac
import secrets
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

TIMEOUT_SECONDS = 120.0  # a peer that sends or takes no byte for so long counts as gone


class Channel(Protocol):
    """``open`` and ``send`` block until the server has done its part, which a simultaneous HTTP request starts.

    They run in a thread; ``close`` from another thread ends them.
    """

    init_info: dict[str, Any]  # for the server's /init_weight_transfer_engine

    def open(self) -> None: ...

    def send(self, tensors: Sequence[Tensor]) -> None: ...

    def close(self) -> None: ...


def make_channel(host: str, port: int, workers: int) -> Channel:
    """A channel to the ``workers`` processes of the server at ``host:port``."""
    return NCCLChannel(workers) if torch.cuda.is_available() else TCPChannel(host, port, workers)


class TCPChannel:
    """Raw bytes over one connection for each worker. A worker must send the token that it got over HTTP."""

    def __init__(self, host: str, port: int, workers: int) -> None:
        with socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as probe:
            address = probe.getsockname()[0]  # listen only on the interface that leads to the server
        self._listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self._listener.settimeout(TIMEOUT_SECONDS)
        self._token = secrets.token_bytes(32)
        self._workers = workers
        self._connections: list[socket.socket] = []
        self.init_info = {
            "address": address,
            "port": self._listener.getsockname()[1],
            "token": self._token.hex(),
        }

    def open(self) -> None:
        while len(self._connections) < self._workers:
            connection, _ = self._listener.accept()
            if self._is_ours(connection):
                self._connections.append(connection)
            else:
                connection.close()
        self._listener.close()

    def _is_ours(self, connection: socket.socket) -> bool:
        given = bytearray(len(self._token))
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            receive_into(connection, memoryview(given))
        connection.settimeout(TIMEOUT_SECONDS)
        return hmac.compare_digest(given, self._token)

    def send(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            contents = as_bytes(tensor.detach().contiguous())
            for connection in self._connections:
                connection.sendall(contents)

    def close(self) -> None:
        for connection in (*self._connections, self._listener):
            with contextlib.suppress(OSError):  # not connected any more
                connection.shutdown(socket.SHUT_RDWR)  # unlike close, this wakes a thread that waits on it
            connection.close()


class NCCLChannel:
    """A communicator of this rank and the server's workers, made from an id that is sent over HTTP."""

    def __init__(self, workers: int) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        self._size = workers + 1
        self._device = torch.cuda.current_device()  # open and send run in other threads, with other current devices
        self._group: Any = None
        self.init_info = {
            "nccl_unique_id_b64": base64.b64encode(self._id).decode(),
            "rank_offset": 1,
            "world_size": self._size,
        }

    def open(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        with torch.cuda.device(self._device):
            self._group = uid_init_process_group(self._id, rank=0, world_size=self._size, device=self._device)

    def send(self, tensors: Sequence[Tensor]) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            for tensor in tensors:
                self._group.broadcast(tensor.detach().contiguous(), src=0, stream=stream)
            stream.synchronize()

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()  # aborts a broadcast that waits for a dead server
            self._group = None


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read or to write."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer``.

    Raises:
        OSError: the peer is gone.
    """
    while buffer:
        received = connection.recv_into(buffer)
        if not received:
            raise ConnectionResetError("the trainer's connection closed in the middle of a tensor")
        buffer = buffer[received:]
