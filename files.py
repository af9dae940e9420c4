"""Weight files: read without running anything from them, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


class WeightFileError(ValueError):
    """A weight file that cannot be used; the message says which, why, and what to do."""


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of a safetensors file.

    Raises:
        WeightFileError: The file is missing, truncated, or not safetensors. A pickle is never unpickled.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise WeightFileError(f"{path.name} is not a whole safetensors file: {_diagnosis(path, error)}") from None


def _diagnosis(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it holds a Python pickle, which can run code when opened; ask its author for a safetensors file"
    size = int.from_bytes(start, "little")
    if len(start) == 8 and size < 100_000_000:
        return f"it is damaged or cut short ({path.stat().st_size:,} bytes); download or copy it again"
    return f"its header cannot be read ({error}); check that it is the right file"


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write atomically: the old file, or the whole new one, survives a crash at any moment."""
    from safetensors.torch import save_file

    tensors = {key: tensors[key].contiguous() for key in sorted(tensors)}

    def write(target: Path) -> None:
        save_file(tensors, target, metadata=dict(metadata))
        _sort_header(target)

    return write_atomically(path, write)


def _sort_header(path: Path) -> None:
    """Equal content, equal bytes: the library writes the metadata's keys in a random order."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"the header of {path.name} does not fit its place")
        file.seek(8)
        file.write(text.ljust(length))


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically."""
    return write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary neighbour, flush it to the disk, and rename it over ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows has no directories to flush
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return path


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
