"""Object stores on loopback ports, S3 by moto and a stand-in for GCS, that fail where a test says so."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator

from tests.gcs_server import GcsServer

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
    gcs: GcsServer | None = None

    @contextlib.contextmanager
    def refusing(self, refuses: Callable[[str, str], bool]) -> Iterator[None]:
        self.refuses = refuses
        try:
            yield
        finally:
            self.refuses = lambda method, path: False

    def make_bucket(self, name: str) -> str:
        if self.gcs is None:
            self.system().mkdir(name)
            return f"s3://{name}"
        self.gcs.buckets[name] = {}
        return f"gs://{name}"

    def system(self):
        """fsspec's view of it, apart from the one that the project uses."""
        if self.gcs is not None:
            import gcsfs

            return gcsfs.GCSFileSystem(use_listings_cache=False)
        import s3fs

        return s3fs.S3FileSystem(
            key=self.settings["AWS_ACCESS_KEY_ID"],
            secret=SECRET,
            endpoint_url=self.settings["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )

    def names(self, path: str) -> list[str]:
        """All objects below `path/`."""
        return sorted(name.removeprefix(path.partition("://")[2] + "/") for name in self.system().find(path))


@contextlib.contextmanager
def serve_gcs() -> Iterator[Store]:
    """As `serve`, for gs://."""

    def refuses(method, path):
        store.asked.append((method, path))
        return store.refuses(method, path)

    server = GcsServer(refuses)
    settings = {"STORAGE_EMULATOR_HOST": server.url, "TENSORSTORE_GCS_HTTP_URL": server.url}
    # Else gcsfs asks another service, which is not here, of what kind a bucket is
    quiet = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true", "NO_PROXY": "127.0.0.1"}
    store = Store({**settings, **quiet}, gcs=server)
    with _environment("gs", store.settings):
        yield store
    server.close()


@contextlib.contextmanager
def _environment(scheme: str, settings: dict[str, str]) -> Iterator[None]:
    from fsspec import get_filesystem_class

    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    # What fsspec keeps of an earlier server asks at that one's port
    get_filesystem_class(scheme).clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """Within, this process and those that it starts use the server for s3://."""
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
            # All of the request is read and a HEAD gets no body, else the next answer on the connection is unreadable
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            body = b"" if method == "HEAD" else body
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    settings = ("known", SECRET, f"http://127.0.0.1:{server.port}", "us-east-1", "127.0.0.1")
    store = Store(dict(zip(_NAMES, settings, strict=True)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with _environment("s3", store.settings):
        yield store
    server.shutdown()
