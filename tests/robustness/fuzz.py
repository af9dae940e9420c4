"""Damaged files, by the hundred: whatever a user hands us is read, or refused in a sentence.

A valid file is spoiled: cut, flipped, repeated, and where it is JSON or YAML also with other values in it. Its reader
must then give something or raise a ``ValueError`` of its own words; it must not write outside of the file's folder,
unpickle, start a program, open a connection, or take more memory than files of that size can need.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MEMORY = 2 << 30
"""Bytes that reading a small file may take at most."""
RAW = (UnicodeDecodeError, json.JSONDecodeError)
"""``ValueError``s that speak of bytes, not to a user."""
WEIRD = (
    None,
    True,
    -1,
    0,
    0.5,
    1000,
    float("nan"),
    "",
    "../../outside",
    "x" * 300,
    [],
    [[]],
    [1, "a"],
    {},
    {"a": None},
)
DEEP = b"[" * 20_000


class Found(AssertionError):
    """What must not happen: one line."""


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        name: For tables.
        write: Fills a folder with valid files.
        spoil: Which of them are spoiled, as patterns below the folder.
        read: Reads the folder.
    """

    name: str
    write: Callable[[Path], object]
    spoil: Sequence[str]
    read: Callable[[Path], object]

    def files(self, folder: Path) -> list[Path]:
        return sorted({path for pattern in self.spoil for path in folder.glob(pattern) if path.is_file()})


def spoiled(content: bytes, structured: Any) -> st.SearchStrategy[bytes]:
    """Variants of a file; ``structured`` is what is in it, if it is JSON or YAML."""
    size = len(content)
    place, some = st.integers(0, max(0, size - 1)), st.binary(min_size=1, max_size=40)
    head = st.integers(0, min(size, 2000))  # where formats keep what matters
    where = st.one_of(place, head)
    variants = [
        where.map(lambda end: content[:end]),
        st.tuples(where, some).map(lambda c: content[: c[0]] + c[1] + content[c[0] + len(c[1]) :]),
        st.tuples(where, some).map(lambda c: content[: c[0]] + c[1] + content[c[0] :]),
        st.tuples(where, where).map(lambda c: content[: min(c)] + content[max(c) :]),
        st.tuples(where, where).map(lambda c: content[: max(c)] + content[min(c) :]),
        st.sampled_from([b"", b"\0" * 64, b"\xff\xfe", DEEP, b"\x80\x04cos\nsystem\n(S'true'\ntR.", content * 3]),
    ]
    if structured is not None:
        paths = list(_paths(structured))
        change = st.tuples(st.sampled_from(paths), st.sampled_from([*WEIRD, _gone]))
        variants += [st.lists(change, min_size=1, max_size=3).map(lambda c: _changed(structured, c))] * 6
    return st.one_of(variants)


_gone = object()


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, child in children:
        yield from _paths(child, (*path, key))


def _changed(value: Any, changes: Sequence[tuple[tuple, Any]]) -> bytes:
    value = json.loads(json.dumps(value))
    for path, new in changes:
        if not path:
            value = None if new is _gone else new
            continue
        try:
            inside = value
            for key in path[:-1]:
                inside = inside[key]
            if new is _gone:
                del inside[path[-1]]
            else:
                inside[path[-1]] = new
        except (LookupError, TypeError):  # an earlier change took it away
            continue
    return json.dumps(value).encode()


def _structured(path: Path, content: bytes) -> Any:
    if path.suffix == ".json":
        return json.loads(content)
    if path.suffix == ".yaml":
        return yaml.safe_load(content)
    return None


def fuzz(reader: Reader, folder: Path, examples: int, chance: int) -> Counter[str]:
    """How many spoiled files were read, and how many refused.

    Args:
        reader: To try.
        folder: Empty; is filled.
        examples: How many spoiled files.
        chance: Seed of all of them.

    Raises:
        Found: With the file's name, its exception, and where the spoiled file was kept.
    """
    reader.write(folder)
    found: Counter[str] = Counter()
    files = [(path, path.read_bytes()) for path in reader.files(folder)]
    if not files:
        raise ValueError(f"{reader.name}: no file matches {reader.spoil}")
    reader.read(folder)  # valid, it is read; and what is imported or loaded once is no cost of a damaged file
    variants = st.one_of(
        [st.tuples(st.just(path), spoiled(content, _structured(path, content))) for path, content in files]
    )

    @seed(chance)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(variants)
    def attempt(variant: tuple[Path, bytes]) -> None:
        path, content = variant
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            with watched(folder):
                found[_outcome(reader, folder)] += 1
        except Found as error:
            kept = folder.with_name(f"{folder.name}-spoiled-{path.name}")
            kept.write_bytes(content)
            raise Found(f"{reader.name}, {path.relative_to(folder)}: {error} (kept as {kept})") from error.__cause__
        finally:
            path.write_bytes(before)

    attempt()
    return found


def _outcome(reader: Reader, folder: Path) -> str:
    try:
        reader.read(folder)
    except ValueError as error:
        if isinstance(error, RAW) or len(str(error)) < 15:
            raise Found(f"no sentence for a user: {type(error).__name__}: {error}") from error
        return "refused"
    except Found:
        raise
    except Exception as error:
        raise Found(f"{type(error).__name__}: {str(error)[:200]}") from error
    return "read"


_watching: list[tuple[Path, list[str]]] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event == "open":
        path, mode, flags = arguments
        written = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = isinstance(path, int) or str(path).startswith((str(folder), "/dev/")) or "__pycache__" in str(path)
        if written and not inside:
            seen.append(f"wrote to {path!r}")
    elif event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect"):
        seen.append(f"{event} {arguments}")


_hooked: list[bool] = []


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raise :class:`Found` if what runs inside reaches outside of a folder, or takes too much memory."""
    import resource

    if not _hooked:
        sys.addaudithook(_audit)  # for good: there is no way to take one out
        _hooked.append(True)
    seen: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watching.append((folder, seen))
    try:
        yield
    finally:
        _watching.pop()
    if seen:
        raise Found(seen[0])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MEMORY:
        raise Found(f"took {grown >> 20} MiB")
