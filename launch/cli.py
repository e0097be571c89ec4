"""What every entry point shares: `--config=FILE.py[:preset] --config.key=value`, and errors as one line."""

import os
import re
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from lm_jax.config import from_config_dict
from lm_jax.errors import UserError

INTERRUPTED = 130  # exit status of a process that Ctrl-C ended, as shells have it
PIPE_CLOSED = 141  # that of one whose reader went away
_GIVE = "give --config=configs/NAME.py[:preset]"


def run(
    command: Callable[[], tuple[type | Callable[[dict[str, Any]], Any], Callable[[Any], None]]],
    preview: Callable[[], Callable[[Any, int], None]] | None = None,
) -> None:
    """Parses the flags, builds the command's config strictly and makes the one call `main(config)`.

    Exits with 0 on success and 1 on an error of the user's, whose one line is the last on stderr.

    Args:
      command: () -> (config class, or several as A | B, main). It imports them, so that --help and a mistyped flag are
        answered at once and Ctrl-C during the imports is caught too. Instead of a class: a function that makes a config
        of the file's values.
      preview: () -> show(config, rows), what --preview=ROWS calls instead of main.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started this wants it ignored
        signal.signal(signal.SIGINT, _interrupted)
    flag = config_flags.DEFINE_config_file("config", None, "settings file, with an optional :preset", lock_config=True)
    if preview is not None:
        flags.DEFINE_integer("preview", None, "rows to print as the model sees them; nothing is trained", lower_bound=1)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if flag.value is not None:
                flag.value.to_dict()  # a file that could not be read shows only now
        except Exception as e:  # a config file may raise anything
            _fail(_flag_fault(e, argv))
        if flag.value is None:
            _fail(f"no config file given; {_GIVE}")
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; settings are given as --config.key=value")
        return rest

    def call(_: list[str]) -> None:
        # Checkpointing logs pages at INFO, and the traceback of every thread where a write fails; what fails is raised.
        logging.set_verbosity(logging.FATAL)
        try:
            read, main = command()
            values = flag.value.to_dict()
            config = from_config_dict(read, values) if isinstance(read, (type, types.UnionType)) else read(values)
            rows = None if preview is None else flags.FLAGS.preview
            if rows is None:
                main(config)
            else:
                preview()(config, rows)
            sys.stdout.flush()
        except UserError as e:
            _fail(str(e))
        except BrokenPipeError:  # who read the output, as `head`, has seen enough
            os._exit(PIPE_CLOSED)
        except OSError as e:  # what a command does not foresee of paths, access and space
            where = f"{e.filename}: " if e.filename else ""
            _fail(f"{where}{e.strerror or e}; check the path, its access and its free space")

    app.run(call, flags_parser=parse)


def _flag_fault(error: Exception, argv: list[str]) -> str:
    """What is wrong with the flags, and the cure."""
    words = iter(argv[1:])
    name = next((w if "=" in w else f"{w}={next(words, '')}" for w in words if re.match("--?config(=|$)", w)), None)
    if name is None and any(re.match(r"--?config\.", w) for w in argv[1:]):
        return f"no config file given; {_GIVE}"
    if isinstance(error, OSError):
        return f"{name}: no such config file; {_GIVE}"
    if isinstance(error, (KeyError, AttributeError)) and "get_config" not in str(error):
        meant = re.search(r'Did you mean "(\w+)"', str(error))
        keys = [w.lstrip("-").split("=")[0] for w in argv[1:] if re.match(r"--?config\.", w)]
        lacking = re.findall(r"\w+", str(error).split("\\n")[0])[-1:]
        key = next((k for k in keys if {*lacking} & {*k.split(".")}), name)
        return f"{key}: unknown key{f' (did you mean {meant[1]}?)' if meant else ''}; see the keys in the config file"
    if isinstance(error, flags.IllegalFlagValueError) and "whilst parsing config file" not in str(error):
        return f"{str(error).removeprefix('flag ')}; see the keys and their types in the config file"
    if isinstance(error, flags.Error) and not isinstance(error, flags.IllegalFlagValueError):
        return f"{error}; settings are given as --config=FILE.py --config.key=value"
    cause: BaseException = error  # what get_config raised; absl and ml_collections wrap it, with a traceback as text
    while cause.__context__ is not None:
        cause = cause.__context__
    if "get_config() takes 0" in str(cause):
        return f"{name}: this config file has no presets; leave out what follows the colon"
    return f"{name}: {cause if isinstance(cause, ValueError) else f'{type(cause).__name__}: {cause}'}"


def _fail(line: str) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _end(line, 1)


def _interrupted(*_) -> NoReturn:
    # No KeyboardInterrupt: raised inside a callback of the garbage collector, and JAX has one, it would be lost
    _end("interrupted; the same command goes on from what was saved", INTERRUPTED)


def _end(line: str, status: int) -> NoReturn:
    # No shutdown of the interpreter: threads of XLA and of the checkpointing may be at work, and at times crash under
    # it. What is on disk survives a SIGKILL, so it survives this.
    os.write(2, f"error: {' '.join(line.split())}\n".encode())
    os._exit(status)
