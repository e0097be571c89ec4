"""One run at a time in a run directory."""

import fcntl
import os

from etils import epath

from lm_jax.errors import UserError

_HELD: dict[str, int] = {}  # directory -> descriptor, until this process ends
NAME = ".lock"


def lock(directory: epath.Path) -> None:
    """Keeps other processes out of the directory, which is made; where there are no locks, as in a bucket, nothing.

    Raises:
      UserError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    where = os.path.realpath(directory)
    if "://" in str(directory) or where in _HELD:
        return
    descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"{directory}: another process is training there; wait for its end, or give another config.output"
        ) from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _HELD[where] = descriptor
