"""An HTTP server of a directory that counts what it sends, and fails where it is told to."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class TarServer:
    """Serves a directory with byte ranges and ETags.

    `fault(name, count)` decides the count-th GET of a file: "" (normal), "error" (503), "cut" (closed midway), "all"
    (ignores the range).

    Attributes:
        sent: bytes of bodies, by file name.
        gets: GET requests, by file name.
        queries: the queries of all requests.
    """

    def __init__(self, folder: Path, fault: Callable[[str, int], str], size: bool) -> None:
        self.sent: Counter[str] = Counter()
        self.gets: Counter[str] = Counter()
        self.queries: list[str] = []
        counting = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(handler) -> None:
                handler.answer(body=False)

            def do_GET(handler) -> None:
                handler.answer(body=True)

            def answer(handler, body: bool) -> None:
                path, _, query = handler.path.partition("?")
                file = folder / path.strip("/")
                with counting:
                    self.queries.append(query)
                    self.gets[file.name] += body
                    how = fault(file.name, self.gets[file.name]) if body else ""
                if how == "error":
                    return handler.send_error(503)
                if not file.is_file():
                    return handler.send_error(404)
                data = file.read_bytes()
                start, end = 0, len(data)
                if (wanted := handler.headers.get("Range")) and how != "all":
                    start, end = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
                    if start >= len(data):
                        return handler.send_error(416)
                    end = min(end + 1, len(data))
                    handler.send_response(206)
                    handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                else:
                    handler.send_response(200)
                handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
                if size:
                    handler.send_header("Content-Length", str(end - start))
                else:
                    handler.send_header("Connection", "close")
                handler.end_headers()
                if body:
                    sent = data[start : (start + end) // 2 if how == "cut" else end]
                    with counting:
                        self.sent[file.name] += len(sent)
                    handler.wfile.write(sent)
                if how == "cut":
                    handler.close_connection = True

            def log_message(handler, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(
    folder: Path, fault: Callable[[str, int], str] = lambda name, count: "", size: bool = True
) -> Iterator[TarServer]:
    """Serve a directory; `size`: say the sizes of files."""
    server = TarServer(folder, fault, size)
    try:
        yield server
    finally:
        server.close()
