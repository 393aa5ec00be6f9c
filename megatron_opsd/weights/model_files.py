"""What a Hugging Face directory holds beside its weights: configuration, tokenizer, chat templates, documents."""

import json
import shutil
from pathlib import Path

import torch

from megatron_opsd.errors import UserError
from megatron_opsd.files import parse_json, read_text

# Of all programs that put a model's weights, or an optimizer's state, beside one another.
WEIGHTS = {
    ".bin",
    ".ckpt",
    ".distcp",
    ".ggml",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or is the index of files that do."""
    return file.suffix.lower() in WEIGHTS or file.name.endswith(".index.json")


def copy_model_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy all of a model's directory but weights and what is hidden, and write ``dtype`` into its config.json.

    What is no file (a link to nowhere, a pipe) is left out. A folder below it that holds weights (onnx/, original/, a
    training's checkpoints) is left out whole. What a link leads to is copied, and the modes are those of new files.

    Raises:
        UserError: something cannot be copied; names it.
    """
    _copy(source, target, target.resolve())
    _set_dtype(target / "config.json", dtype)


def _copy(source: Path, target: Path, left_out: Path) -> None:
    """``left_out``: the copy itself, where it is below the directory that it is a copy of."""
    place = source
    try:
        target.mkdir(exist_ok=True)
        for place in sorted(source.iterdir()):
            if place.name.startswith(".") or is_weights(place):
                continue
            if place.is_file():
                shutil.copyfile(place, target / place.name)
            elif (
                place.is_dir()
                and not _is_above(place, left_out)
                and not _is_above(place, source)
                and not _holds_weights(place)
            ):
                _copy(place, target / place.name, left_out)
    except OSError as error:
        raise UserError(f"{place}: cannot be copied to {target} ({error.strerror or error})") from None


def _is_above(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _holds_weights(folder: Path) -> bool:
    return any(is_weights(file) for file in folder.rglob("*"))


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = parse_json(read_text(config_file), str(config_file))
    for key in config.keys() & {"dtype", "torch_dtype"} or {"dtype"}:  # the names in transformers 5 and 4
        config[key] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
