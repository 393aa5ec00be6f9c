"""Weights from the trainer into a vLLM server: the weight-transfer engines that vLLM's workers load.

Imported only inside vLLM's workers; the trainer's end is ``channel.py``. The names, shapes and types of a bucket come
over HTTP. Its contents come separately: as raw bytes over TCP on CPU, through NCCL on GPU. Nothing is ever unpickled.
"""

import contextlib
import socket
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_opsd.compat.vllm_internals import after_reload, before_reload
from megatron_opsd.rollout.channel import TIMEOUT_SECONDS, as_bytes, receive_into


@dataclass
class TCPInitInfo(WeightTransferInitInfo):
    address: str
    port: int
    token: str  # proves to the trainer that this is its server


@dataclass
class TCPUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class TCPEngine(WeightTransferEngine[TCPInitInfo, TCPUpdateInfo]):
    """For CPU: each worker reads the whole tensors from its own connection."""

    init_info_cls = TCPInitInfo
    update_info_cls = TCPUpdateInfo
    _connection: socket.socket | None = None

    def init_transfer_engine(self, init_info: TCPInitInfo) -> None:
        self.shutdown()
        self._connection = socket.create_connection((init_info.address, init_info.port), timeout=TIMEOUT_SECONDS)
        self._connection.sendall(bytes.fromhex(init_info.token))

    def start_weight_update(self) -> None:
        before_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class waits for an accelerator

    def receive_weights(self, update_info: TCPUpdateInfo) -> None:
        assert self._connection is not None, "init_transfer_engine before weights"
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            # New memory for each tensor: vLLM keeps it until its layer is complete.
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            receive_into(self._connection, as_bytes(tensor))
            self.model.load_weights([(name, tensor)])  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        after_reload(self.model)

    def shutdown(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class NCCLEngine(NCCLWeightTransferEngine):
    """vLLM's engine, except that an interrupted update leaves nothing behind for the next one."""

    def start_weight_update(self) -> None:
        before_reload(self.model, self.model_config)
        super().start_weight_update()


class RegisterEngines:
    """vLLM's ``worker_extension_cls``: every worker imports this module before it makes its engine."""


for _name, _engine in (("opsd_tcp", TCPEngine), ("opsd_nccl", NCCLEngine)):
    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(_name, _engine)
