"""One run at a time in a directory."""

import fcntl
import os

from etils import epath

from lm_jax.errors import UserError

_HELD: dict[str, int] = {}  # directory -> descriptor, until this process ends
NAME = ".lock"


def lock(directory: epath.Path) -> None:
    """Keeps other processes out of the directory, which is made; on a file system without locks it does nothing.

    Raises:
      UserError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    where = os.path.realpath(directory)
    if where in _HELD:
        return
    if (descriptor := locked(directory, "another process is training there; wait for its end")) is not None:
        _HELD[where] = descriptor


def locked(directory: os.PathLike[str], taken: str) -> int | None:
    """A descriptor that keeps others out of the directory until it is closed; None on a file system without locks.

    Args:
      taken: what to say where another process has it.

    Raises:
      UserError: another process has it.
    """
    descriptor = os.open(os.path.join(directory, NAME), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{os.fspath(directory)}: {taken}, or give another config.output") from error
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
