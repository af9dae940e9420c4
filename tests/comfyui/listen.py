"""What a browser hears of a running graph: ComfyUI's websocket, as far as tests need it."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

TEXT, PREVIEWS = 3, (1, 4)


@dataclass
class Heard:
    """One message.

    Attributes:
        when: Seconds since listening began.
        kind: ``text`` (of a node), ``preview``, or the type of a JSON message, such as ``progress``.
        data: The text, the picture's file, or the message's data.
    """

    when: float
    kind: str
    data: object = field(repr=False)


class Listener:
    """Hears what a server tells one client, from ``with`` on; ``heard`` grows meanwhile.

    Args:
        port: Of the server.
        client: Its id; prompts queued with it are reported to it.
    """

    def __init__(self, port: int, client: str) -> None:
        self.heard: list[Heard] = []
        self._socket = socket.create_connection(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        while self._stream.readline() not in (b"\r\n", b""):
            pass
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while head := self._stream.read(2):
            opcode, length = head[0] & 15, head[1] & 127
            if length > 125:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            payload = self._stream.read(length)
            when = time.monotonic() - self._began
            if opcode == 1:
                message = json.loads(payload)
                self.heard.append(Heard(when, message["type"], message["data"]))
            elif opcode == 2:
                (kind, size), rest = struct.unpack(">II", payload[:8]), payload[8:]
                if kind == TEXT:
                    self.heard.append(Heard(when, "text", rest[size:].decode()))
                elif kind in PREVIEWS:  # the second kind says first what it is of
                    self.heard.append(Heard(when, "preview", rest[size:] if kind == PREVIEWS[1] else rest))

    def of(self, kind: str) -> list[Heard]:
        return [each for each in self.heard if each.kind == kind]
