"""A server with one dataset and the routes of huggingface.co that Hugging Face's client uses."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/pictures"


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Run a hub with the files of `folder` as the dataset `REPO`; gives its endpoint."""

    def entry(path: Path) -> dict[str, Any]:
        name = path.relative_to(folder).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api = f"/api/datasets/{REPO}"
            if path.startswith(f"{api}/tree/main"):
                below = folder / path.removeprefix(f"{api}/tree/main").strip("/")
                query = parse_qs(urlsplit(self.path).query)
                is_deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                found = below.rglob("*") if is_deep else below.glob("*")
                self.answer([entry(each) for each in sorted(found)])
            elif path in (api, f"{api}/revision/main"):
                self.answer({"id": REPO, "sha": "0" * 40, "siblings": []})
            elif path.startswith(f"/datasets/{REPO}/resolve/main/"):
                file = folder / path.removeprefix(f"/datasets/{REPO}/resolve/main/")
                self.send(file.read_bytes())
            else:
                self.answer({"error": "Not Found"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            is_json = "json" in self.headers["Content-Type"]
            paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
            self.answer([entry(folder / path) for path in paths if (folder / path).exists()])

        def send(self, data: bytes) -> None:
            span = self.headers.get("Range")
            if span is not None:
                first, _, last = span.removeprefix("bytes=").partition("-")
                whole = len(data)
                data = data[int(first) : int(last or whole) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
