"""Weight files: read without running anything from them, written whole or not at all."""

from __future__ import annotations

import json
import operator
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .garbage import garbage_freed

MAX_HEADER = 16 << 20
"""Bytes. A header of the largest models takes 1 MB; reading one may take thirty times its size."""


class WeightFileError(ValueError):
    """A file of weights, or what belongs to it, that cannot be used: one sentence with which, why and what to do."""


def existing(path: Path) -> Path:
    """The path, or :class:`WeightFileError` if no file is there."""
    if not path.is_file():
        raise WeightFileError(f"{path} is missing; download it again or correct the path")
    return path


def unreadable(path: Path, error: OSError) -> WeightFileError:
    """The error for a file that the system does not let us read."""
    return WeightFileError(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")


def not_importable(error: ModuleNotFoundError) -> str:
    """What an import lacks, in words; transformers raises the same error when a package is there but broken."""
    if error.name:
        return f"needs the Python package {error.name}, which is not installed"
    reason = " ".join(str(error.__cause__ or error).split())
    return f"needs a Python package that is there but cannot be imported ({reason})"


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of a safetensors file.

    Raises:
        WeightFileError: The file is missing, truncated, or not safetensors. A pickle is never unpickled.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        _check_safetensors(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightFileError(f"{path} is damaged ({error}); download it again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _check_safetensors(path: Path) -> None:
    """Raise unless the header is sound and every tensor it announces lies inside the file."""
    size = existing(path).stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > MAX_HEADER:
            if start[:1] == b"\x80" or start[:2] == b"PK":  # a header's length may begin so as well
                raise WeightFileError(
                    f"{path} is a pickle, not safetensors, and a pickle can run code, so it is not opened; "
                    "get the safetensors file from the publisher"
                )
            raise WeightFileError(f"{path} is not a safetensors file ({size} bytes); download it again")
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_named_once)
        ends = (operator.index(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__")
        end = max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        if len(header) == length:
            raise WeightFileError(f"{path} has a damaged header; download it again") from None
        end = 0
    if size < 8 + length + end:
        needed = f"of {8 + length + end} " if end else ""
        raise WeightFileError(f"{path} is truncated ({size} {needed}bytes are there); download it again")


def _named_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name is given twice")
    return named


def read_pickle(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a PyTorch file that holds nothing but tensors, mapped from disk where its format allows.

    Raises:
        WeightFileError: The file is missing, damaged, or holds anything that could run code.
    """
    path = Path(path)
    existing(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # only torch's zip format can be mapped
        if zipped:
            _check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise WeightFileError(
            f"{path} holds more than tensors and could run code, or is damaged, so it is not loaded; "
            "get the publisher's original file or a safetensors version"
        ) from None
    except WeightFileError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception:  # garbage makes torch's parser raise almost anything
        raise WeightFileError(f"{path} is damaged or not a PyTorch file; download it again") from None
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(k, str) and _is_whole(v) for k, v in content.items()):
        raise WeightFileError(f"{path} does not hold one tensor a name; it is not a file of weights")
    return content


def _check_zip(path: Path) -> None:
    """Raise unless nothing in it is compressed, as torch writes: what unpacks to no more than the file cannot flood."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise WeightFileError(
            f"{path} would unpack to more than its size, which no PyTorch file does, so it is not loaded; "
            "get the publisher's original file"
        )


def _is_whole(value: object) -> bool:
    """Whether it is a tensor whose every number is stored, not a large view of a few."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write atomically: the old file, or the whole new one, survives a crash at any moment."""
    from safetensors.torch import save_file

    tensors = {key: tensors[key].contiguous() for key in sorted(tensors)}

    @garbage_freed()
    def write(target: Path) -> None:
        save_file(tensors, target, metadata=dict(metadata) or None)  # it garbles a file of neither
        _sort_header(target)

    return write_atomically(path, write)


def _sort_header(path: Path) -> None:
    """Equal content, equal bytes: the library writes the metadata's keys in a random order."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.pop("__metadata__", None):
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
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask allows; some writers leave 0600
        write(partial)
        partial.chmod(mode)
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
