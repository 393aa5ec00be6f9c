"""The files with a model's weights, and their index: safetensors and Megatron's. Nothing reads the weights."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import Bad, Change, Inputs

WEIGHTS, INDEX = "{folder}/model/model.safetensors: ", "{folder}/model/model.safetensors.index.json: "
TO_MEGATRON = ("convert", "hf-to-megatron", "--hf", "{folder}/model", "--megatron", "{folder}/out")
TO_HF = ("convert", "megatron-to-hf", "--megatron", "{folder}/megatron", "--hf", "{folder}/out")
NORM = "model.norm.weight"


def weights(what: str, says: Sequence[str], change: Change, command: Sequence[str] = ("check",)) -> Bad:
    return Bad(what, says, change, command=command)


def contents(what: str, says: Sequence[str], data: str | bytes, name: str = "model/model.safetensors") -> Bad:
    return weights(what, says, lambda inputs: inputs.write(name, data))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """The file is written again with other tensors."""

    def of(inputs: Inputs) -> None:
        file = inputs.model / "model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file)

    return of


def cast(dtype: torch.dtype, names: str = "proj") -> Change:
    return tensors(lambda held: held.update({name: x.to(dtype) for name, x in held.items() if names in name}))


def index(change: Callable[[dict[str, Any]], object] = lambda weight_map: None) -> Change:
    """The weights are in two files; ``change``: of what the index says."""

    def of(inputs: Inputs) -> None:
        held = load_file(inputs.model / "model.safetensors")
        (inputs.model / "model.safetensors").unlink()
        save_file({NORM: held.pop(NORM)}, inputs.model / "b.safetensors")
        save_file(held, inputs.model / "a.safetensors")
        weight_map: dict[str, Any] = dict.fromkeys(held, "a.safetensors") | {NORM: "b.safetensors"}
        change(weight_map)
        inputs.write("model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))

    return of


def then(first: Change, second: Callable[[Path], object]) -> Change:
    """``second``: what is done to the model's folder afterwards."""
    return lambda inputs: (first(inputs), second(inputs.model))


def instead(name: str) -> Change:
    """The weights have another name."""
    return lambda inputs: (inputs.model / "model.safetensors").rename(inputs.model / name)


def header(tensor: object) -> bytes:
    text = json.dumps({"a": tensor}).encode()
    return len(text).to_bytes(8, "little") + text


FILES = [
    contents("empty", [WEIGHTS, "not a readable safetensors file", "download it again"], b""),
    contents("seven bytes", [WEIGHTS, "not a readable"], b"\1" * 7),
    contents("a header beyond the file", [WEIGHTS, "not a readable"], (2**40).to_bytes(8, "little") + b"{}"),
    contents("a header that is no JSON", [WEIGHTS, "not a readable"], (9).to_bytes(8, "little") + b"{" * 9),
    contents("a web page", [WEIGHTS, "not a readable"], "<!DOCTYPE html><html>404</html>"),
    contents("an unknown dtype", [WEIGHTS, "not a readable"], header({"dtype": "X", "shape": [], "data_offsets": []})),
    contents(
        "a shape beyond its bytes",
        [WEIGHTS, "not a readable"],
        header({"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}) + bytes(4),
    ),
    contents(
        "a git-lfs pointer",
        [WEIGHTS, "git-lfs pointer", "git lfs pull"],
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2629480\n",
    ),
    weights("cut", [WEIGHTS, "not a readable"], lambda i: os.truncate(i.model / "model.safetensors", 1_000_000)),
    weights(
        "a folder of that name",
        [WEIGHTS, "is a folder"],
        lambda i: ((i.model / "model.safetensors").unlink(), (i.model / "model.safetensors").mkdir()),
    ),
    weights("a dangling link", ["{folder}/model: holds neither"], then(instead("x"), lambda m: link(m, "gone"))),
    weights(
        "none", ["{folder}/model: holds neither", "safetensors"], lambda i: (i.model / "model.safetensors").unlink()
    ),
    weights("pickles", ["pytorch_model.bin", "save_pretrained"], instead("pytorch_model.bin")),
    weights("llama.cpp's", ["model.gguf", "save_pretrained"], instead("model.gguf")),
    weights("an adapter", ["adapter_model.safetensors", "a whole model"], instead("adapter_model.safetensors")),
    weights("a shard without index", ["model-00001-of-00001", "index"], instead("model-00001-of-00001.safetensors")),
]

TENSORS = [
    weights("one is missing", [f"the tensor {NORM} is missing"], tensors(lambda held: held.pop(NORM))),
    weights("one too many", ["1 tensors", "first extra"], tensors(lambda held: held.update(extra=torch.ones(1)))),
    weights(
        "a wrong shape",
        [WEIGHTS + NORM, "[64]; config.json calls for [128]"],
        tensors(lambda held: held.update({NORM: torch.ones(64)})),
    ),
    weights("int8", [WEIGHTS, "q_proj.weight has the dtype I8", "not quantised"], cast(torch.int8, "q_proj")),
    weights("uint8", [WEIGHTS, "q_proj.weight has the dtype U8"], cast(torch.uint8, "q_proj")),
    weights("fp8 e4m3", [WEIGHTS, "q_proj.weight has the dtype F8_E4M3"], cast(torch.float8_e4m3fn, "q_proj")),
    weights("fp8 e5m2", [WEIGHTS, "q_proj.weight has the dtype F8_E5M2"], cast(torch.float8_e5m2, "q_proj")),
    weights("double", [WEIGHTS, f"{NORM} has the dtype F64"], cast(torch.float64, NORM)),
    weights("int64", [WEIGHTS, f"{NORM} has the dtype I64"], cast(torch.int64, NORM)),
    weights("bool", [WEIGHTS, f"{NORM} has the dtype BOOL"], cast(torch.bool, NORM)),
    Bad(
        "int8 with --dtype",
        ["has the dtype I8"],
        cast(torch.int8),
        command=(*TO_MEGATRON, "--dtype", "bf16", "--verify"),
    ),
    weights("two dtypes", ["F16, F32", "choose one of them with --dtype"], cast(torch.float16, NORM), TO_MEGATRON),
    weights(
        "another head in a tied model",
        [WEIGHTS, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings = false"],
        tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1})),
    ),
    weights(
        "a head of another shape in a tied model",
        [WEIGHTS, "lm_head.weight has the shape [1, 128]"],
        tensors(lambda held: held.update({"lm_head.weight": torch.ones(1, 128)})),
    ),
    weights(
        "a head of another dtype in a tied model",
        [WEIGHTS, "lm_head.weight has the dtype I8"],
        tensors(lambda held: held.update({"lm_head.weight": torch.ones(512, 128, dtype=torch.int8)})),
    ),
    weights(
        "no head in an untied model",
        ["the tensor lm_head.weight is missing", "set tie_word_embeddings = true"],
        lambda inputs: inputs.config(tie_word_embeddings=False),
    ),
]

IN_INDEX = "model/model.safetensors.index.json"
INDEXES = [
    contents("index: cut", [INDEX, "not valid JSON"], "{", IN_INDEX),
    contents("index: empty", [INDEX, "is empty"], "", IN_INDEX),
    contents("index: a list", [INDEX, "must be a JSON object"], "[]", IN_INDEX),
    contents("index: no map", [INDEX, "the key weight_map is missing"], "{}", IN_INDEX),
    contents("index: an empty map", [INDEX, "weight_map = "], '{"weight_map": {}}', IN_INDEX),
    contents("index: a list as map", [INDEX, "weight_map = []"], '{"weight_map": []}', IN_INDEX),
    contents("index: UTF-16", [INDEX, "is UTF-16"], "{}".encode("utf-16"), IN_INDEX),
    contents("index: nested too deeply", [INDEX, "nested too deeply"], '{"a":' * 99_999, IN_INDEX),
    weights("index: a number as file", [INDEX, f"weight_map.{NORM} = 1"], index(lambda m: m.update({NORM: 1}))),
    weights("index: a path", [INDEX, "'../b.safetensors'"], index(lambda m: m.update({NORM: "../b.safetensors"}))),
    weights("index: an absolute path", [INDEX, "'/etc/passwd'"], index(lambda m: m.update({NORM: "/etc/passwd"}))),
    weights("index: other files", [INDEX, "'b.bin'"], index(lambda m: m.update({NORM: "b.bin"}))),
    weights(
        "index: a zero byte", [INDEX, "must be a .safetensors"], index(lambda m: m.update({NORM: "\0.safetensors"}))
    ),
    weights(
        "index: a file that is not there",
        ["{folder}/model/b.safetensors: no such file", "1 of the 2 files"],
        then(index(), lambda model: (model / "b.safetensors").unlink()),
    ),
    weights(
        "index: a ghost",
        [INDEX, "extra is in b.safetensors, which has no such tensor"],
        index(lambda m: m.update(extra="b.safetensors")),
    ),
    weights(
        "index: a tensor of another file",
        [INDEX, f"{NORM} is in a.safetensors, which has no such tensor"],
        index(lambda m: m.update({NORM: "a.safetensors"})),
    ),
    weights(
        "index: a tensor that it does not name",
        ["{folder}/model/a.safetensors: holds model.embed_tokens.weight, which"],
        index(lambda m: m.pop("model.embed_tokens.weight")),
    ),
    weights(
        "index: a cut file",
        ["{folder}/model/a.safetensors: not a readable safetensors file"],
        then(index(), lambda model: os.truncate(model / "a.safetensors", 1_000_000)),
    ),
    weights(
        "index: two models",
        ["{folder}/model: holds model.safetensors and another model", "remove one"],
        then(index(), lambda model: save_file({"a": torch.ones(1)}, model / "model.safetensors")),
    ),
]


def megatron(what: str, says: Sequence[str], files: dict[str, str]) -> Bad:
    """Files of a distributed checkpoint."""

    def change(inputs: Inputs) -> None:
        for name, text in files.items():
            inputs.write(f"megatron/{name}", text)

    return Bad(f"megatron: {what}", says, change, command=TO_HF)


def link(model: Path, to: str) -> None:
    (model / "x").unlink()
    (model / "model.safetensors").symlink_to(to)


METADATA = "{folder}/megatron/metadata.json: "
MEGATRON = [
    megatron("nothing", ["{folder}/megatron: no such directory"], {}),
    megatron("no metadata.json", [METADATA, "no such file", "not a complete distributed checkpoint"], {"a": ""}),
    megatron("cut", [METADATA, "not valid JSON"], {"metadata.json": "{"}),
    megatron("empty", [METADATA, "is empty"], {"metadata.json": ""}),
    megatron("a list", [METADATA, "must be a JSON object"], {"metadata.json": "[]"}),
    megatron("no format", [METADATA, "the key sharded_backend is missing"], {"metadata.json": "{}"}),
    megatron("a number as format", [METADATA, "sharded_backend = 1"], {"metadata.json": '{"sharded_backend": 1}'}),
    megatron("another format", ["'zarr'", "only 'torch_dist'"], {"metadata.json": '{"sharded_backend": "zarr"}'}),
    Bad("megatron: a file", ["run.toml: is a file"], command=[*TO_HF[:3], "{folder}/run.toml", *TO_HF[4:]]),
]

FOLDERS = [
    Bad("one folder twice", ["{folder}/model is in {folder}/model"], command=[*TO_MEGATRON[:5], "{folder}/model"]),
    Bad("a folder in the other", ["{folder}/model/out is in"], command=[*TO_MEGATRON[:5], "{folder}/model/out"]),
    Bad("a folder around the other", ["{folder}: exists already"], command=[*TO_MEGATRON[:5], "{folder}"]),
    Bad("the root", ["/: exists already"], command=[*TO_MEGATRON[:5], "/"]),
    Bad("a name too long", ["cannot be written"], command=[*TO_MEGATRON[:5], "{folder}/" + "a" * 300]),
    Bad("below a file", ["out: cannot be written"], command=[*TO_MEGATRON[:5], "{folder}/run.toml/out"]),
    Bad(
        "no such model",
        ["{folder}/none: no such directory"],
        command=[*TO_MEGATRON[:3], "{folder}/none", *TO_MEGATRON[4:]],
    ),
    Bad("a file as the model", ["is a file"], command=[*TO_MEGATRON[:3], "{folder}/run.toml", *TO_MEGATRON[4:]]),
]

ROWS = [*FILES, *TENSORS, *INDEXES, *MEGATRON, *FOLDERS]
