"""Downloads against a real server on this machine that counts, cuts, lies and refuses."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading

import pytest
from reward_lora import hub
from reward_lora.files import WeightFileError
from reward_lora.hub import RemoteFile, fetch, fetch_repository

CONTENT = bytes(range(256)) * 12_000  # three megabytes: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LARGE = "/owner/name/resolve/main/folder/big%20file.bin"


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it was asked for; ``cut`` bytes are sent before each connection breaks."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.cut, self.etag, self.content = 0, SHA256, CONTENT

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        if self.path == LARGE:  # the hub sends large files to a storage elsewhere
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{self.server.etag}"')
            self.send_header("Location", self.server.url.replace("127.0.0.1", "localhost") + "/storage")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/api/models/owner/name?blobs=true":
            siblings = [
                {"rfilename": "folder/big file.bin", "size": len(CONTENT), "lfs": {"sha256": SHA256}},
                {"rfilename": "config.json", "size": 2},
                {"rfilename": "../outside.json", "size": 2},
                {"rfilename": "README.md", "size": 2},
            ]
            self.answer(json.dumps({"siblings": siblings}).encode())
        elif self.path == "/owner/gated/resolve/main/x.bin":
            self.send_error(401)
        elif self.path.endswith((".json", ".md")):
            self.answer(b"{}")
        elif self.path in ("/storage", "/plain.bin"):
            self.answer(self.server.content)
        else:
            self.send_error(404)

    def answer(self, content):
        total, start = len(content), 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(found[1])
            if start >= total:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.cut] if self.server.cut else content[start:])


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def plain(server):
    return RemoteFile(server.url + "/plain.bin", sha256=SHA256)


ON_HUB = RemoteFile("hf:owner/name/folder/big file.bin")


def test_a_file_arrives_with_progress_and_is_not_asked_for_again(server, plain, tmp_path):
    seen = []
    target = tmp_path / "new" / "plain.bin"
    assert fetch(plain, target, progress=lambda *numbers: seen.append(numbers)) == target
    assert target.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    fetch(plain, target)
    assert len(server.asked) == 1
    assert [path.name for path in target.parent.iterdir()] == ["plain.bin"]


def test_the_hub_through_its_mirror_is_held_to_the_announced_checksum(server, tmp_path):
    assert ON_HUB.url == server.url + LARGE
    assert fetch(ON_HUB, tmp_path / "a.bin").read_bytes() == CONTENT
    assert [(path, token) for path, _, token in server.asked] == [(LARGE, "Bearer secret"), ("/storage", None)]
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(WeightFileError, match=f"sha256 is .*{SHA256} was published.*put the right file at"):
        fetch(ON_HUB, tmp_path / "b.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_without_a_mirror_the_hub_itself_is_asked(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert ON_HUB.url == "https://huggingface.co/owner/name/resolve/main/folder/big%20file.bin"


def test_a_cut_connection_goes_on_where_it_was_cut(server, plain, tmp_path):
    server.cut = 1_000_000
    assert fetch(plain, tmp_path / "plain.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted, _ in server.asked] == [
        None,
        "bytes=1000000-",
        "bytes=2000000-",
        "bytes=3000000-",
    ]


def test_cancelled_and_resumed(server, plain, tmp_path):
    class Cancelled(Exception):
        pass

    def cancel(done, total):
        if done > total / 2:
            raise Cancelled

    target = tmp_path / "plain.bin"
    with pytest.raises(Cancelled):
        fetch(plain, target, progress=cancel)
    half = (tmp_path / "plain.bin.partial").stat().st_size
    assert len(CONTENT) / 2 < half < len(CONTENT)
    assert fetch(plain, target).read_bytes() == CONTENT
    assert server.asked[-1][1] == f"bytes={half}-"


def test_a_part_that_nothing_can_verify_is_not_kept(server, tmp_path):
    """A file without a published checksum might have changed since."""
    (tmp_path / "plain.bin.partial").write_bytes(b"old" * 100)
    assert fetch(RemoteFile(server.url + "/plain.bin"), tmp_path / "plain.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_not_kept(server, plain, tmp_path):
    (tmp_path / "plain.bin.partial").write_bytes(CONTENT + b"more")
    assert fetch(plain, tmp_path / "plain.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    wrong = RemoteFile(server.url + "/plain.bin", md5="0" * 32)
    with pytest.raises(WeightFileError, match=r"/plain.bin: md5 is [0-9a-f]{32}, 0{32} was published.*x\.bin"):
        fetch(wrong, tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_one_sentence_with_address_and_target(server, tmp_path, monkeypatch):
    target = tmp_path / "x.bin"
    with pytest.raises(WeightFileError, match=rf"{server.url}/nothing does not exist \(HTTP 404\).*{target}"):
        fetch(RemoteFile(server.url + "/nothing"), target)
    with pytest.raises(WeightFileError, match=rf"accept the terms on {server.url}/owner/gated and log in.*{target}"):
        fetch(RemoteFile("hf:owner/gated/x.bin"), target)
    server.cut = -len(CONTENT)
    with pytest.raises(WeightFileError, match=f"the connection was lost after 0 of {len(CONTENT)} bytes.*{target}"):
        fetch(RemoteFile(server.url + "/plain.bin"), target)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightFileError, match=rf"cannot be fetched \(HF_HUB_OFFLINE is set\).*{target}"):
        fetch(ON_HUB, target)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WeightFileError, match=rf"nobody.invalid/x.bin cannot be fetched.*put it at {target}"):
        fetch(RemoteFile("https://nobody.invalid/x.bin"), target)
    (tmp_path / "file").touch()
    with pytest.raises(WeightFileError, match="cannot be written"):
        fetch(RemoteFile(server.url + "/plain.bin"), tmp_path / "file" / "x.bin")


def test_no_room_on_the_disk_is_said_before_it_is_filled(server, plain, tmp_path, monkeypatch):
    usage = hub.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(WeightFileError, match="does not fit.* GB free at .*; make room and try again"):
        fetch(plain, tmp_path / "plain.bin")


def test_a_repository_with_its_folders_and_one_progress(server, tmp_path):
    seen = []
    fetch_repository(
        "owner/name", tmp_path / "name", patterns=["*.json", "folder/*"], progress=lambda *numbers: seen.append(numbers)
    )
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"name/folder/big file.bin", "name/config.json"}
    assert seen[-1] == (len(CONTENT) + 2, len(CONTENT) + 2)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with pytest.raises(WeightFileError, match=r"owner/name holds no \*\.gguf; check its name"):
        fetch_repository("owner/name", tmp_path, patterns=["*.gguf"])
    with pytest.raises(WeightFileError, match=r"api/models/owner/none.*HTTP 404"):
        fetch_repository("owner/none", tmp_path)


@pytest.mark.parametrize("address", ["ftp://x/y", "hf:owner/name", "hf:owner/name/../x", "weights.pt"])
def test_an_address_is_checked(address):
    with pytest.raises(ValueError, match="an address"):
        RemoteFile(address)


def test_two_at_once_fetch_once(server, plain, tmp_path):
    target = tmp_path / "plain.bin"
    threads = [threading.Thread(target=fetch, args=(plain, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1
