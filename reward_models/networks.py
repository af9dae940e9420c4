"""Networks from published weights: built without a random start, filled by name, refused if one does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..files import WeightFileError, existing, read_pickle, read_safetensors

Network = TypeVar("Network", bound=nn.Module)
RECOMPUTED = (".position_ids", ".inv_freq")
"""Buffers that older files hold and newer classes make themselves."""


class without_start(TorchFunctionMode):  # noqa: N801 - used like a function
    """What is about to be overwritten is not filled with random numbers first."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if function is Tensor.normal_:  # newer torch draws a truncated normal until every number lies in its bounds
            return args[0].zero_()
        if name in ("uniform_", "normal_", "erfinv_") or name.startswith(("trunc_normal_", "kaiming_", "xavier_")):
            return args[0] if args else next(iter(kwargs.values()))
        return function(*args, **(kwargs or {}))


def build(make: Callable[[], Network], tensors: Mapping[str, Tensor], source: object, dtype: torch.dtype) -> Network:
    """A frozen network with exactly these weights.

    Args:
        make: Calls the class.
        tensors: By the network's own names; memory-mapped ones stay so where ``dtype`` is theirs.
        source: Where they are from, for the error.
        dtype: Of the network.

    Raises:
        WeightFileError: A weight is missing, too many, or of another shape.
    """
    with without_start():
        network = make()
    expected = network.state_dict()
    tensors = {key: value for key, value in tensors.items() if key in expected or not key.endswith(RECOMPUTED)}
    for key, value in expected.items():
        if key not in tensors:
            raise WeightFileError(f"{source} holds no {key}; it is of another model or damaged, get the published file")
        if tensors[key].shape != value.shape:
            raise WeightFileError(
                f"{source}: {key} is {list(tensors[key].shape)}, {list(value.shape)} was expected; it is of another "
                "model"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise WeightFileError(f"{source} holds {unknown[0]}, which has no place; it is of another model")
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return nn.Module.to(network, dtype).eval().requires_grad_(False)


def build_renamed(
    make: Callable[[], Network],
    tensors: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    source: object,
    dtype: torch.dtype,
) -> Network:
    """As :func:`build`, for networks whose parts have other names in some versions of their library.

    Args:
        make: Calls the class.
        tensors: By published names.
        renamed: From a part of a published name to what it may be called now.
        source: Where they are from, for the error.
        dtype: Of the network.
    """
    with without_start():
        network = make()
    known, named = network.state_dict().keys(), {}
    for name, tensor in tensors.items():
        now = next((name.replace(old, new) for old, new in renamed.items() if old in name), name)
        named[now if now in known else name] = tensor
    return build(lambda: network, named, source, dtype)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file that holds nothing else. Never runs code from it.

    Raises:
        WeightFileError: It is missing, damaged, or holds more than tensors.
    """
    return read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model's folder.

    Raises:
        WeightFileError: It is missing or no JSON object.
    """
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        WeightFileError: It is missing or no JSON object.
    """
    try:
        config = json.loads(existing(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise WeightFileError(f"{path} is not the configuration of a model; download it again")
    return config


def tokenizer_of(folder: Path, length: int) -> Callable[[str], Tensor]:
    """The tokenizer in a folder in the layout of transformers: a text to ``[1, length]`` ids, cut or padded.

    Raises:
        WeightFileError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises almost anything for a damaged file
        raise WeightFileError(
            f"{folder} holds no usable tokenizer ({type(error).__name__}); download it again"
        ) from None

    def tokenize(text: str) -> Tensor:
        return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    return tokenize


def linear_chain(tensors: Mapping[str, Tensor], source: object, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Linear layers one after the other, in the order of the numbers in their names (``layers.0.weight``).

    Raises:
        WeightFileError: They are something else, or do not lead from ``width`` numbers to one.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(?:.*\.)?(\d+)\.(weight|bias)", key)
        if not found:
            raise WeightFileError(f"{source} holds {key}, which is no linear layer; it is of another model")
        layers.setdefault(int(found[1]), {})[found[2]] = value
    ordered = [layers[number] for number in sorted(layers)]
    widths = [width, *(len(layer.get("bias", ())) for layer in ordered)]
    if widths[-1] != 1 or 0 in widths:
        raise WeightFileError(f"{source} is no chain of linear layers that ends in one number; it is of another model")
    named = {f"{i}.{kind}": value for i, layer in enumerate(ordered) for kind, value in layer.items()}
    return build(lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))), named, source, dtype)
