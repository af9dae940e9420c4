"""Downloads: published weights fetched with resume, progress and checksum, and offline a sentence of what to do."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from .files import WeightFileError

Progress = Callable[[int, int], None]
"""Bytes done, bytes in total (0 if unknown). It may raise to cancel; a later fetch goes on from there."""

CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file.

    Attributes:
        address: ``hf:owner/name/path/in/repository``, or an https URL.
        sha256: Of its content; empty if the publisher announces none.
        md5: The same, where nothing better is published.
        size: Bytes; 0 if unknown.
    """

    address: str
    sha256: str = ""
    md5: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        if self.is_on_hub:
            parts = self.address.removeprefix("hf:").split("/")
            if len(parts) < 3 or not all(part not in ("", ".", "..") for part in parts):
                raise ValueError(f"an address on the hub is hf:owner/name/path/of/file, got {self.address!r}")
        elif not self.address.startswith(("https://", "http://")):
            raise ValueError(f"an address is hf:owner/name/file or an https URL, got {self.address!r}")

    @property
    def is_on_hub(self) -> bool:
        return self.address.startswith("hf:")

    @property
    def url(self) -> str:
        """Where it lies; ``HF_ENDPOINT`` replaces the hub by a mirror."""
        if not self.is_on_hub:
            return self.address
        owner, name, path = self.address.removeprefix("hf:").split("/", 2)
        return f"{_endpoint()}/{owner}/{name}/resolve/main/{quote(path)}"


def fetch(file: RemoteFile, target: Path | str, *, progress: Progress | None = None) -> Path:
    """Download a file, unless it is there already.

    What has arrived stays in a neighbour ``<target>.partial`` until all of it is there and its checksum is right; a
    later call goes on from there. A file on the hub that carries no checksum here is held to the one the hub announces.

    Args:
        file: What to fetch.
        target: Where to write it.
        progress: Told often; may raise to cancel.

    Raises:
        WeightFileError: Offline, refused, cut off, a wrong checksum, or no room on the disk.
    """
    from filelock import FileLock

    target = Path(target)
    if target.is_file():
        return target
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # the ranks of one training run fetch once
            if not target.is_file():
                _fetch(file, target, progress or (lambda done, total: None))
    except urllib.error.HTTPError as error:
        raise WeightFileError(f"{file.url} {_refusal(file, error)}, or put the file at {target}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _unreachable(file.url, error, target) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(file, target) from None
        raise WeightFileError(
            f"{target} cannot be written ({error.strerror or error}); make its folder writable, or put the file of "
            f"{file.url} there"
        ) from None
    finally:
        with suppress(OSError):
            lock.unlink()
    return target


def fetch_repository(
    repository: str, folder: Path | str, *, patterns: Iterable[str] = ("*",), progress: Progress | None = None
) -> Path:
    """Download the files of a repository on the hub that match one of the patterns (``*.json``, ``vae/*``).

    Args:
        repository: ``owner/name``.
        folder: Gets the files, with the folders of the repository.
        patterns: As in :mod:`fnmatch`, over whole paths.
        progress: Told the bytes of all files together.

    Raises:
        WeightFileError: As :func:`fetch`; or nothing matches.
    """
    url, folder, patterns = f"{_endpoint()}/api/models/{repository}?blobs=true", Path(folder), tuple(patterns)
    listing = RemoteFile(f"hf:{repository}/{patterns[0]}")
    try:
        with _open(url) as answer:
            listed = json.load(answer)["siblings"]
    except urllib.error.HTTPError as error:
        raise WeightFileError(f"{url} {_refusal(listing, error)}, or put its files into {folder}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error, folder) from None
    except (ValueError, KeyError, TypeError):
        raise WeightFileError(
            f"{url} did not answer as the hub does; correct HF_ENDPOINT, or put the files into {folder}"
        ) from None
    files = []
    for entry in listed:
        name = entry["rfilename"]
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and ".." not in PurePosixPath(name).parts:
            sha256 = (entry.get("lfs") or {}).get("sha256", "")
            files.append((name, RemoteFile(f"hf:{repository}/{name}", sha256=sha256, size=entry.get("size") or 0)))
    if not files:
        raise WeightFileError(f"{_endpoint()}/{repository} holds no {' or '.join(patterns)}; check its name")
    total, before = sum(file.size for _, file in files), 0
    for name, file in files:

        def step(done: int, _: int, before: int = before) -> None:
            progress(before + done, total)

        fetch(file, folder / name, progress=step if progress else None)
        before += file.size
    return folder


def _fetch(file: RemoteFile, target: Path, progress: Progress) -> None:
    """Into the partial neighbour, as often as each connection brings more than the one before; then rename."""
    partial = target.with_name(f"{target.name}.partial")
    furthest = 0
    while True:
        start = partial.stat().st_size if partial.is_file() else 0
        try:
            answer = _open(file.url, start)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                partial.unlink()  # not a part of this file
                continue
            raise
        with answer:
            expected, resumed = _announced(file, answer), answer.status == http.HTTPStatus.PARTIAL_CONTENT
            if resumed and not (expected or file.md5):  # nothing could tell a part of an older file
                partial.unlink()
                continue
            start = start if resumed else 0
            total = start + int(answer.headers.get("Content-Length") or 0) if "Content-Length" in answer.headers else 0
            if total - start > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = _receive(answer, partial, start, total, progress)
        if done == total or not total:
            break
        if done <= furthest:
            raise ConnectionError(f"the connection was lost after {done} of {total} bytes")
        furthest = done
    _check(file, partial, expected, target)
    os.replace(partial, target)


def _receive(answer: http.client.HTTPResponse, partial: Path, start: int, total: int, progress: Progress) -> int:
    done = start
    with partial.open("r+b" if start else "wb") as output:
        output.seek(start)
        progress(done, total)
        while True:
            try:
                block = answer.read(CHUNK)
            except (http.client.IncompleteRead, TimeoutError, ConnectionError):
                break  # what has come is kept; the caller sees that it is not all
            if not block:
                break
            output.write(block)
            done += len(block)
            progress(done, total)
        output.flush()
        os.fsync(output.fileno())
    return done


def _check(file: RemoteFile, partial: Path, sha256: str, target: Path) -> None:
    kind, expected = ("sha256", sha256) if sha256 else ("md5", file.md5)
    if not expected:
        return
    with partial.open("rb") as content:
        digest = hashlib.new(kind, usedforsecurity=False)
        while block := content.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        partial.unlink()
        raise WeightFileError(
            f"{file.url}: {kind} is {digest.hexdigest()}, {expected} was published; what came was deleted, try again "
            f"or put the right file at {target}"
        )


def _announced(file: RemoteFile, answer: http.client.HTTPResponse) -> str:
    """The sha256 to hold the file to: ours, or the one the hub announces for large files."""
    etag = getattr(answer, "linked_etag", "") if file.is_on_hub else ""
    return file.sha256 or (etag if re.fullmatch("[0-9a-f]{64}", etag) else "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps what the hub says before it points to its storage; a token never goes to another host."""

    def redirect_request(self, request, file, code, message, headers, url):
        new = super().redirect_request(request, file, code, message, headers, url)
        if new is not None:
            new.linked_etag = headers.get("X-Linked-Etag") or getattr(request, "linked_etag", None)
            token = request.unredirected_hdrs.get("Authorization")
            if token and urlsplit(url)[:2] == urlsplit(request.full_url)[:2]:
                new.add_unredirected_header("Authorization", token)
        return new

    def http_response(self, request, response):
        response.linked_etag = (
            response.headers.get("X-Linked-Etag") or getattr(request, "linked_etag", None) or ""
        ).strip('"')
        return response

    https_response = http_response


def _open(url: str, start: int = 0) -> http.client.HTTPResponse:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise urllib.error.URLError("HF_HUB_OFFLINE is set")
    request = urllib.request.Request(url, headers={"User-Agent": "reward-lora"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    if url.startswith(_endpoint() + "/"):
        from huggingface_hub import get_token

        if token := get_token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _refusal(file: RemoteFile, error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403) and file.is_on_hub:
        page = "/".join(file.url.split("/")[:5])
        return (
            f"may not be read (HTTP {error.code}): accept the terms on {page} and log in with `hf auth login` "
            "or HF_TOKEN"
        )
    if error.code == http.HTTPStatus.NOT_FOUND:
        return "does not exist (HTTP 404); check the address"
    return f"was refused (HTTP {error.code}); try again later"


def _unreachable(url: str, error: Exception, target: Path) -> WeightFileError:
    reason = getattr(error, "reason", None) or error
    reason = getattr(reason, "strerror", None) or reason
    return WeightFileError(
        f"{url} cannot be fetched ({reason}); connect to the internet or set HF_ENDPOINT to a mirror and try again "
        f"(what has come is kept), or put it at {target} yourself"
    )


def _no_room(file: RemoteFile, target: Path) -> WeightFileError:
    free = shutil.disk_usage(target.parent).free / 1e9
    size = f"{file.size / 1e9:.1f} GB" if file.size else "it"
    return WeightFileError(
        f"{file.url} does not fit: {size} does not go into the {free:.1f} GB free at {target.parent}; make room and "
        "try again (what has come is kept)"
    )
