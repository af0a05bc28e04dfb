"""An HTTP proxy in front of an S3 server that breaks answers on command and counts the faults."""

import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass

# What a fault does: cut the body after a share of it, reset the connection before or after the server has done
# the work, stay silent for `seconds`, or answer an S3 error in the server's place.
KINDS = ("cut", "reset", "lose", "stall", "error")


@dataclass
class Fault:
    """A fault for the next `times` requests whose head (request line and headers) matches `pattern`."""

    kind: str
    pattern: str = ""
    times: int = 1
    keep: float = 0.5
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 10.0


class FaultProxy(socketserver.ThreadingTCPServer):
    """Listens on loopback; `faults` are pending, `fired` counts past ones by kind, `seen` holds request lines."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, server_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_port = server_port
        self.faults: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.seen: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, head: str) -> Fault | None:
        with self.lock:
            self.seen.append(head.partition("\r\n")[0])
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, head, re.MULTILINE):
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(1 for line in self.seen if re.search(pattern, line))

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection early, which the faults cause."""


class _Handler(socketserver.BaseRequestHandler):
    server: FaultProxy
    request: socket.socket

    def handle(self) -> None:
        head, body = _read_request(self.request)
        if not head:
            return
        fault = self.server.next_fault(head.decode("latin-1"))
        if fault is not None and fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind in ("stall", "reset"):
            self._reset()
        elif fault is not None and fault.kind == "error":
            self.request.sendall(_error(fault, head))
        else:
            self._answer(fault, _forward(self.server.server_port, head, body))

    def _answer(self, fault: Fault | None, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        if fault is not None and fault.kind == "lose":
            self._reset()
            return
        if fault is not None:
            # A negative share counts bytes from the end, one above 1 from the start.
            keep = int(fault.keep if abs(fault.keep) >= 1 else len(body) * fault.keep)
            body = body[:keep]
        self.request.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)

    def _reset(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()


def _read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if re.search(rb"(?i)^expect: *100-continue", head, re.MULTILINE):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
    chunked = re.search(rb"(?i)^transfer-encoding: *chunked", head, re.MULTILINE)
    pieces, size = [body], len(body)
    while (size < int(length[1])) if length else (chunked and not b"".join(pieces[-2:]).endswith(b"0\r\n\r\n")):
        piece = connection.recv(1 << 20)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return head, b"".join(pieces)


def _forward(port: int, head: bytes, body: bytes) -> bytes:
    """Forward the unchanged request with its signature and return the complete answer."""
    head = re.sub(rb"(?im)^(connection|expect):[^\n]*\n", b"", head + b"\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as upstream:
        upstream.sendall(head + b"Connection: close\r\n\r\n" + body)
        pieces = []
        while piece := upstream.recv(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


def _error(fault: Fault, head: bytes) -> bytes:
    body = b"" if head.startswith(b"HEAD") else _xml(fault.code)
    line = f"HTTP/1.1 {fault.status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return line.encode() + b"Connection: close\r\n\r\n" + body


def _xml(code: str) -> bytes:
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>made by the fault proxy</Message></Error>'
    return text.encode()
