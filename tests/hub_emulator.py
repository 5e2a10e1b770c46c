"""A Hugging Face hub on loopback with data sets in a folder, which can be told to fail.

Enough of the API for what `dsl.tables` asks: the description of a data set (revision, files with sizes, the
configurations in its card) and range requests. `python tests/hub_emulator.py FOLDER` serves one until it is stopped;
then HF_ENDPOINT=... is all that a program needs.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHA = {None: "1" * 40, "main": "1" * 40, "refs/convert/parquet": "2" * 40}  # of the two branches
FOLDER = {"1" * 40: ".", "2" * 40: ".converted"}  # where their files lie in a data set's folder
# what can go wrong with a reply: a status, a connection that ends before or amid it, a body that stops coming
FAULTS = (429, 500, 504, 404, "closed", "reset", "truncated", "stalled")


class Hub:
    """Serves FOLDER/owner/name/...; `fault(path, span)` is asked before each reply for one of FAULTS, or None."""

    def __init__(self, folder: Path):
        self.folder, self.requests, self.injected = Path(folder), [], []
        self.fault: Callable[[str, str | None], int | str | None] = lambda path, span: None
        self.stall = 1.0  # seconds that a stalled body is kept open
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def use(self, monkeypatch, timeout: float = 10) -> None:
        """Point this process's huggingface_hub here (it reads HF_ENDPOINT only when it is first imported)."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", timeout)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together, or the client's delayed acknowledgement costs 40 ms
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path, span = urllib.parse.unquote(urllib.parse.urlparse(self.path).path), self.headers.get("Range")
        self.hub.requests.append((path, span))
        fault = self.hub.fault(path, span)
        if fault is not None:
            self.hub.injected.append(fault)
        if fault == "closed":
            self._cut(reset=True)
        elif isinstance(fault, int):
            self._reply(b"", fault, {"Retry-After": "0"} if fault == 429 else {})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(self.hub.folder / found[1], found[1], found[2], fault)
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(self.hub.folder / found[1] / FOLDER[found[2]] / found[3], span, fault)
        else:
            self._reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def _describe(self, folder: Path, name: str, revision: str | None, fault) -> None:
        folder = folder / FOLDER[SHA[revision]]
        if not folder.is_dir():
            self._reply(b"", 404, {"X-Error-Code": "RevisionNotFound" if revision else "RepoNotFound"})
            return
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        listed = [
            {"rfilename": n, "size": p.stat().st_size, "blobId": hashlib.sha1(p.read_bytes()).hexdigest()}
            for n, p in files.items()
            if not n.startswith(".")
        ]
        card = folder / "card.json"
        about = {
            "id": name,
            "sha": SHA[revision],
            "siblings": listed,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        about["cardData"] = json.loads(card.read_text()) if card.exists() else {}
        self._reply(json.dumps(about).encode(), 200, {"Content-Type": "application/json"}, fault)

    def _send_file(self, path: Path, span: str | None, fault) -> None:
        if not path.is_file():
            self._reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        body = path.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", span or f"bytes=0-{len(body) - 1}").groups()
        part = body[int(first) : int(last) + 1]
        self._reply(part, 206 if span else 200, {"Content-Range": f"bytes {first}-{last}/{len(body)}"}, fault)

    def _reply(self, body: bytes, status: int, headers: dict[str, str] | None = None, fault: object = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if fault is None else body[: len(body) // 2])
        self.wfile.flush()
        if fault is not None:
            if fault == "stalled":
                time.sleep(self.hub.stall)
            self._cut(reset=fault == "reset")

    def _cut(self, *, reset: bool) -> None:
        if reset:  # a closed socket that does not linger answers with RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close() if reset else self.connection.shutdown(socket.SHUT_RDWR)


def write_dataset(folder: Path, name: str, configs: dict[str, list[list[str]]], *, rows_per_group: int = 1000) -> None:
    """A data set NAME with a card; `configs` names the texts of each shard of each configuration's training split."""
    entries = []
    for config, shards in configs.items():
        (folder / name / "data" / config).mkdir(parents=True)
        for i, texts in enumerate(shards):
            table = pa.table({"prompt": [f"Write number {j}." for j in range(len(texts))], "text": texts})
            path = folder / name / "data" / config / f"train-{i:05d}-of-{len(shards):05d}.parquet"
            pq.write_table(table, path, row_group_size=rows_per_group)
        files = [{"split": "test", "path": "none-*"}, {"split": "train", "path": f"data/{config}/train-*"}]
        entries.append({"config_name": config, "data_files": files})
    (folder / name / "card.json").write_text(json.dumps({"configs": entries}))


if __name__ == "__main__":
    with Hub(Path(sys.argv[1])) as served:
        print(served.url, flush=True)
        threading.Event().wait()
