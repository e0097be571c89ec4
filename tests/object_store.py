"""An S3 server on a loopback port, by moto, which knows who may come in and fails where a test says so."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator

SECRET = "not-to-be-shown-anywhere"
_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "NO_PROXY")


@dataclasses.dataclass
class Store:
    """The server.

    Attributes:
      settings: environment variables of a process that uses it.
      refuses: (method, path of the request) -> whether it gets status 403 instead of an answer.
      asked: method and path of every request.
    """

    settings: dict[str, str]
    refuses: Callable[[str, str], bool] = lambda method, path: False
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def refusing(self, refuses: Callable[[str, str], bool]) -> Iterator[None]:
        self.refuses = refuses
        try:
            yield
        finally:
            self.refuses = lambda method, path: False

    def make_bucket(self, name: str) -> str:
        self.system().mkdir(name)
        return f"s3://{name}"

    def system(self):
        """fsspec's view of it, apart from the one that the project uses."""
        import s3fs

        return s3fs.S3FileSystem(
            key=self.settings["AWS_ACCESS_KEY_ID"],
            secret=SECRET,
            endpoint_url=self.settings["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )

    def names(self, path: str) -> list[str]:
        """All objects below `path/`."""
        return sorted(name.removeprefix(path.removeprefix("s3://") + "/") for name in self.system().find(path))


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """Within, this process and those that it starts use the server."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_):
            pass

    inner = DomainDispatcherApplication(create_backend_app)

    def app(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.asked.append((method, path))
        known = "Credential=known/" in environ.get("HTTP_AUTHORIZATION", "")
        if not known or store.refuses(method, path):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    settings = ("known", SECRET, f"http://127.0.0.1:{server.port}", "us-east-1", "127.0.0.1")
    store = Store(dict(zip(_NAMES, settings, strict=True)))
    before = {name: os.environ.get(name) for name in _NAMES}
    os.environ.update(store.settings)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
