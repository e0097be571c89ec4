"""A small stand-in for Google Cloud Storage on a loopback port: what gcsfs and tensorstore ask of it, and no more."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class GcsServer:
    """Objects by bucket and name, each with the generation that conditional writes go by.

    Args:
      refuses: (method, path of the request) -> whether it gets status 403 instead of an answer.
    """

    def __init__(self, refuses: Callable[[str, str], bool]):
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {}
        self._refuses, self._lock, self._generation = refuses, threading.Lock(), 1
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()

    def answer(self, method: str, url: str, kind: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = urlsplit(url)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if self._refuses(method, unquote(parts.path)):
            return _error(403)
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", parts.path)
        with self._lock:
            if found is None or (objects := self.buckets.get(found[2])) is None:
                return _error(404)
            if found[1] == "/upload":
                return self._upload(objects, query, kind, body)
            if found[3] is not None:
                return _object(objects, method, unquote(found[3]), query, found[1] is not None)
            if parts.path.endswith("/o"):
                return _listing(objects, query)
            return _json({"kind": "storage#bucket", "name": found[2]})

    def _upload(self, objects, query, kind, body):
        name = query.get("name")
        if query["uploadType"] == "multipart":
            mark = b"--" + re.search('boundary="?([^"]+)"?', kind)[1].encode()
            told, content = (p.split(b"\n\n", 1)[1] for p in body.split(mark)[1:3])  # newlines as gcsfs has them
            name, body = json.loads(told)["name"], content.removesuffix(b"\n")
        if int(query.get("ifGenerationMatch", -1)) not in (-1, objects.get(name, (0,))[0]):
            return _error(412)
        self._generation += 1
        objects[name] = (self._generation, body)
        return _json(_described(objects, name))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: GcsServer

    def _any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        status, headers, content = self.store.answer(self.command, self.path, kind, body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            total, first = len(content), int(asked[1])
            content = content[first : int(asked[2]) + 1 if asked[2] else None]
            headers |= {"Content-Range": f"bytes {first}-{first + len(content) - 1}/{total}"}
            status = 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _any

    def log_message(self, *_):
        pass


def _described(objects, name):
    generation, content = objects[name]
    about = {"name": name, "size": str(len(content)), "generation": str(generation), "etag": f"e{generation}"}
    return about | {"updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z", "bucket": "b"}


def _object(objects, method, name, query, media):
    if name not in objects:
        return _error(404)
    generation, content = objects[name]
    if method == "DELETE":
        del objects[name]
        return 204, {}, b""
    if str(generation) == query.get("ifGenerationNotMatch"):
        return 304, {}, b""
    if media or query.get("alt") == "media":
        return 200, {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}, content
    return _json(_described(objects, name))


def _listing(objects, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], set()
    for name in sorted(n for n in objects if n.startswith(prefix)):
        head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        prefixes.add(prefix + head + cut) if cut else items.append(_described(objects, name))
    return _json({"items": items, "prefixes": sorted(prefixes)})


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status):
    return status, {"Content-Type": "application/json"}, json.dumps({"error": {"code": status, "message": ""}}).encode()
