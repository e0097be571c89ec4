"""Objects in buckets: gs:// through gcsfs, s3:// through s3fs. One appears whole or not at all; none is appended to.

Where the server is and who asks is for those libraries' own settings to say: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
~/.aws, or GOOGLE_APPLICATION_CREDENTIALS and the machine's account. Buckets are never made here.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lm_jax.errors import UserError, without_passwords

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
_NO_ACCESS = re.compile("[Cc]redential|Forbidden|Unauthori[sz]ed|RefreshError|Anonymous caller")
_THREADS = 8  # objects under way at a time
_SHOWN = 200  # characters of what a server said


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is an address, as gs://bucket/name, and no local path."""
    return "://" in os.fspath(path)


def check_address(path: str) -> None:
    """Raises UserError for what is no gs://bucket/name or s3://bucket/name, or where its library is not installed."""
    scheme, _, rest = path.partition("://")
    if scheme not in PACKAGES:
        raise UserError(f"{without_passwords(path)}: give a local path, gs://bucket/name or s3://bucket/name")
    if not re.match(r"[\w.-]+(/|$)", rest):
        raise UserError(f"{without_passwords(path)}: no bucket in it; give {scheme}://bucket/name")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f"{path}: {PACKAGES[scheme]} is not installed; pip install -e '.[remote]'")


@contextlib.contextmanager
def accessing(path: str) -> Iterator[None]:
    """Makes one line of what a bucket or its library refuses within; local paths are left alone.

    Raises:
      UserError: no such object or bucket, no access, a server that cannot be reached.
    """
    if not is_remote(path):
        yield
        return
    check_address(path)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _of_storage(error):
            raise
        raise UserError(f"{path}: {_told(error)}") from error


def _of_storage(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _told(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such object, or no such bucket; check the address"
    said = " ".join(str(error).split())[:_SHOWN]
    if isinstance(error, PermissionError) or _NO_ACCESS.search(type(error).__name__ + said):
        return f"no access ({said}); check the credentials, and their rights to the bucket"
    return f"{type(error).__name__} ({said}); check the address, the endpoint and the network"


def _system(path: str) -> Any:
    import fsspec

    # A listing that is kept would hide what other processes write
    return fsspec.filesystem(path.partition("://")[0], use_listings_cache=False)


def check_bucket(path: str) -> None:
    """Raises UserError where the bucket of `path` is not there or gives no access, before anything slow is done."""
    check_address(path)
    bucket = "/".join(path.split("/")[:3])
    with accessing(path):
        if not _system(bucket).exists(bucket):
            raise UserError(f"{path}: no bucket {bucket}, or no access to it; check the address and the credentials")


def exists(path: str) -> bool:
    """Whether there is such an object, or any below `path/`."""
    with accessing(path):
        return _system(path).exists(path)


def is_directory(path: str) -> bool:
    """Whether there are objects below `path/`."""
    with accessing(path):
        return _system(path).isdir(path)


def find(path: str) -> dict[str, str]:
    """Every object below `path/`, by its name there: what changes when its content does."""
    with accessing(path):
        system = _system(path)
        root = system._strip_protocol(path).rstrip("/") + "/"
        found = system.find(root, detail=True)
        return {
            name.removeprefix(root): f"{info['size']} {info.get('ETag') or info.get('etag')}"
            for name, info in found.items()
            if name.startswith(root)
        }


def read(path: str) -> bytes | None:
    """An object, None where there is none."""
    with accessing(path):
        try:
            return _system(path).cat_file(path)
        except FileNotFoundError:
            return None


def write(path: str, content: bytes) -> None:
    """Makes or replaces an object."""
    with accessing(path):
        _system(path).pipe_file(path, content)


def remove(paths: Iterable[str]) -> None:
    """Removes objects; one that is not there is no error."""

    def one(path: str) -> None:
        with accessing(path), contextlib.suppress(FileNotFoundError):
            _system(path).rm_file(path)

    _each(one, paths)


def upload(directory: str | os.PathLike, names: Iterable[str], path: str) -> None:
    """Makes objects `path/NAME` of the files `directory/NAME`."""

    def one(name: str) -> None:
        with accessing(f"{path}/{name}"):
            _system(path).put_file(str(Path(directory, name)), f"{path}/{name}")

    _each(one, names)


def download(path: str, names: Iterable[str], directory: str | os.PathLike) -> None:
    """Makes files `directory/NAME` of the objects `path/NAME`.

    Raises:
      UserError: also a name that leads out of `directory`.
    """

    def one(name: str) -> None:
        target = Path(directory, name)
        if not target.resolve().is_relative_to(Path(directory).resolve()):
            raise UserError(f"{path}: {name!r} leads out of it; it is no file of a checkpoint or model")
        target.parent.mkdir(parents=True, exist_ok=True)
        with accessing(f"{path}/{name}"):
            _system(path).get_file(f"{path}/{name}", str(target))

    _each(one, names)


def cached(path: str, versions: Mapping[str, str], changing: Sequence[str] = ()) -> Path:
    """A directory of this machine's with the objects `path/NAME`, downloaded unless they are there already.

    Args:
      versions: names and versions, as `find` has them.
      changing: further names, of objects that there may be and whose new versions are no reason to download again.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lm_jax"
    digest = hashlib.sha256(json.dumps([path, sorted(versions.items())]).encode()).hexdigest()[:16]
    target = home / f"{path.rstrip('/').rpartition('/')[2]}-{digest}"
    if target.is_dir():
        return target
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".arriving-") as directory:
        arriving = Path(directory, "whole")
        download(path, [*versions, *(name for name in changing if exists(f"{path}/{name}"))], arriving)
        with contextlib.suppress(OSError):  # another process was first
            arriving.rename(target)
    return target


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(do, name) for name in names]:
            done.result()
