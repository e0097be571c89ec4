"""A launcher in one of whose processes a function does something else: FAULT={"command", "process", "where", "call",
"does", "mark"} in the environment.

    where   MODULE:NAME, or MODULE:NAME() for the function that this one gives
    call    which call of it, from 1
    does    fail (as on a full disk), hang, kill (the process), stop (asks it to, and goes on)
    mark    a file that appears then
"""

import errno
import functools
import importlib
import json
import operator
import os
import runpy
import signal
import sys
import time
from pathlib import Path


def disturb(where: str, call: int, does: str, mark: str) -> None:
    module, name = where.removesuffix("()").split(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    def disturbed(function, *args, **given):
        calls.append(None)
        if len(calls) == call:
            Path(mark).write_text(does)
            act(does)
        return function(*args, **given)

    def maker(*args, **given):
        return functools.partial(disturbed, original(*args, **given))

    if where.endswith("()"):
        setattr(owner, name, maker)
    else:
        setattr(owner, name, lambda *args, **given: disturbed(original, *args, **given))


def act(does: str) -> None:
    if does == "fail":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/disk")
    if does == "hang":
        time.sleep(1e6)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[does])


def main() -> None:
    fault = json.loads(os.environ["FAULT"])
    if f"--process_id={fault['process']}" in sys.argv:
        disturb(*operator.itemgetter("where", "call", "does", "mark")(fault))
    command = fault["command"]
    module = command if command.startswith("tests.") else f"launch.{command}"
    sys.argv[0] = f"{module.replace('.', '/')}.py"
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
