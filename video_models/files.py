"""Reading weight files: memory-mapped, checked before use, never executing what they contain."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import WeightFileError, existing, read_pickle, read_safetensors, unreadable
from .pages import FilePages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype called ``float32``, ``bfloat16`` or ``float16``; None for ``auto``.

    Raises:
        ValueError: For any other name.
    """
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or :class:`WeightFileError`."""
    try:
        content = json.loads(existing(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"{path} is not valid JSON ({error}); download it again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not isinstance(content, dict):
        raise WeightFileError(f"{path} must hold a JSON object, got {type(content).__name__}; download it again")
    return content


def find_weights(folder: Path, stem: str) -> Path | None:
    """The weights called ``stem`` in a folder: that file, sharded or whole safetensors, or a pickle, in this order."""
    for suffix in ("", ".safetensors.index.json", ".safetensors", ".pth", ".bin.index.json", ".bin"):
        path = folder / (stem + suffix)
        if path.is_file():
            return path
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of one file by name, mapped from disk: memory is used when a tensor is.

    Args:
        path: A ``.safetensors`` file, a pickle that holds nothing but tensors, or the ``.index.json`` that names
            the shards of either.

    Raises:
        WeightFileError: The file is missing, truncated, not what its name says, or would run code.
    """
    if path.name.endswith(".index.json"):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_file_name(name) for name in shards.values()):
            raise WeightFileError(f"{path} has no weight_map of file names in its own folder; download it again")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(shards.values())):
            tensors.update(read_weights(path.parent / shard))
        return tensors
    tensors = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    return _checked(path, tensors)


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_float32: Collection[str] = (),
) -> None:
    """Put tensors into a module that was built on the meta device, each converted once and never copied twice.

    A tensor that has been converted or has gone to a GPU leaves no pages of its file in memory.

    Args:
        module: Parameters and persistent buffers on the meta device; other buffers must be real already.
        tensors: One for every name of ``module.state_dict()``, of the same shape; in float8 perhaps, with scales
            as :func:`split_scales` knows them.
        source: Where they come from, for messages.
        dtype, device: What floating-point tensors become.
        keep_float32: Parts of dotted names whose tensors stay float32 when ``dtype`` has 16 bits.

    Raises:
        WeightFileError: A name is missing or unexpected, a shape differs, or a weight is quantised to integers.
    """
    tensors, scales = split_scales(tensors)
    expected = module.state_dict()
    packed = [n for n in expected if n in tensors and expected[n].is_floating_point() > tensors[n].is_floating_point()]
    if packed:
        kind = str(tensors[packed[0]].dtype).removeprefix("torch.")
        raise WeightFileError(
            f"{source} is quantised ({packed[0]} is {kind}); take a file of 16 or 32 bits, or of plain or scaled float8"
        )
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    kind = type(module).__name__
    if missing or unexpected:
        problems = [
            f"{word} {_first_few(names)}" for word, names in (("lacks", missing), ("has unknown", unexpected)) if names
        ]
        if len(missing) > len(expected) // 2:
            reason = "it is probably another kind of model"
        elif unexpected:
            reason = "it is probably another variant of the model, or its config is another model's"
        else:
            reason = "it is probably an incomplete download, or its config is another model's"
        raise WeightFileError(f"{source} does not fit {kind}: it {' and '.join(problems)}; {reason}")
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        raise WeightFileError(
            f"{source} does not fit {kind}: {len(wrong)} shapes differ, for example {name} is "
            f"{list(tensors[name].shape)} where the config says {list(expected[name].shape)}; "
            "the config and the weights belong to different models"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        keep_float32 = ()
    pages, converted = FilePages(), {}  # by identity: a tied weight comes under two names
    for name, tensor in tensors.items():
        if id(tensor) not in converted:
            wanted = torch.float32 if not set(keep_float32).isdisjoint(name.split(".")) else dtype
            converted[id(tensor)] = _convert(tensor, scales.get(name), wanted, device)
            if converted[id(tensor)] is not tensor:
                pages.release(tensor)
    state = {name: converted[id(tensor)] for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    module.to(device)  # the buffers that no file holds
    unset = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if unset:
        raise WeightFileError(f"{source} leaves {_first_few(unset)} of {kind} without a value")


def _convert(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device)
    if scale is None:
        return tensor.to(device, dtype)
    scale = scale.to(device, torch.float32).reshape(-1, *(1,) * (tensor.ndim - 1))  # one, or one a row
    return (tensor.to(device, torch.float32) * scale).to(dtype)


def split_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the factor of each that ComfyUI's 8-bit files keep beside it.

    Both spellings of ``comfy/ops.py``: ``scale_weight`` with a mark ``scaled_fp8``, and ``weight_scale`` with
    ``comfy_quant``; what scales the layer's input in 8-bit arithmetic is left out.
    """
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{module}.weight"] = tensor
        elif last not in ("scale_input", "input_scale", "scaled_fp8", "comfy_quant"):
            weights[name] = tensor
    return weights, scales


def count_numbered(tensors: Mapping[str, Tensor], before: str) -> int:
    """How many numbers, counted from 0, follow ``before`` in the names: blocks of a kind, for example."""
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    return max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1) + 1


def parameter_count(tensors: Mapping[str, Tensor]) -> int:
    """Number of values in all tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def fingerprint(paths: Iterable[Path]) -> str:
    """A short hash of files' names, sizes, first and last 64 KiB: cheap, and different for different weights."""
    digest, chunk = hashlib.sha256(), 1 << 16
    for path in sorted(paths):
        size = existing(path).stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(chunk))
            file.seek(max(0, size - chunk))
            digest.update(file.read(chunk))
    return digest.hexdigest()[:16]


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith((".safetensors", ".bin")) and Path(name).name == name


def _first_few(names: Collection[str]) -> str:
    listed = ", ".join(list(names)[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        raise WeightFileError(f"{path} holds no tensors; download it again")
    return tensors
