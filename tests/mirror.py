"""A folder served as the Hugging Face Hub serves a repository."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Mirror(http.server.ThreadingHTTPServer):
    """Keeps what it was asked for.

    Args:
        folder: What the repository holds.
        repository: ``owner/name``.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repository: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), functools.partial(_Handler, directory=folder))
        self.repository, self.asked = repository, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path != f"/api/models/{self.server.repository}?blobs=true":
            self.path = self.path.removeprefix(f"/{self.server.repository}/resolve/main")
            super().do_GET()
            return
        root = Path(self.directory)
        files = [path for path in root.rglob("*") if path.is_file()]
        listing = [{"rfilename": p.relative_to(root).as_posix(), "size": p.stat().st_size} for p in files]
        content = json.dumps({"siblings": listing}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def mirror(folder: Path, repository: str, port: int = 0) -> Iterator[Mirror]:
    """Serve for the length of a block; ``HF_ENDPOINT`` must name its ``url``."""
    with Mirror(folder, repository, port) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
