"""What every entry point shares: `--config=FILE.py[:preset] --config.key=value`, and errors as one line."""

import contextlib
import importlib.util
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from lm_jax.config import from_config_dict
from lm_jax.distributed import stopping
from lm_jax.distributed.start import Processes, start
from lm_jax.errors import UserError, without_passwords

INTERRUPTED = 130  # exit status of a process that Ctrl-C ended, as shells have it
PIPE_CLOSED = 141  # that of one whose reader went away
TERMINATED = 143  # that of one that SIGTERM ended before there was anything to save
_SHOWN = 900  # characters of an error
_SECRET_LENGTH = 8  # characters; what is shorter is no secret, and a word that errors use
_GIVE = "give --config=configs/NAME.py[:preset]"
_HOME = Path(__file__).resolve().parents[1]  # holds configs/, in a checkout and where the wheel is installed
_on_end: list[Callable[[str | None], None]] = []  # what lets the run's other processes know


def run(
    command: Callable[[], tuple[type | Callable[[dict[str, Any]], Any], Callable[[Any], None]]],
    preview: Callable[[], Callable[[Any, int], None]] | None = None,
) -> None:
    """Parses the flags, builds the command's config strictly and makes the one call `main(config)`.

    Exits with 0 on success, with --stopped_status where it was asked to stop and saved, and with 1 on an error of the
    user's, whose one line is the last on stderr.

    Args:
      command: () -> (config class, or several as A | B, main). It imports them, so that --help and a mistyped flag are
        answered at once and Ctrl-C during the imports is caught too. Instead of a class: a function that makes a config
        of the file's values.
      preview: () -> show(config, rows), what --preview=ROWS calls instead of main.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started this wants it ignored
        signal.signal(signal.SIGINT, _interrupted)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupted)
    sys.argv = _with_config_file(sys.argv)
    flag = config_flags.DEFINE_config_file("config", None, "settings file, with an optional :preset", lock_config=True)
    _define_processes()
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

    def call(_: list[str]) -> int:
        # Checkpointing logs pages at INFO, and the traceback of every thread where a write fails; what fails is raised.
        logging.set_verbosity(logging.FATAL)
        try:
            read, main = command()
            values = flag.value.to_dict()
            config = from_config_dict(read, values) if isinstance(read, (type, types.UnionType)) else read(values)
            with _processes():
                if preview is not None and (rows := flags.FLAGS.preview) is not None:
                    preview()(config, rows)
                else:
                    main(config)
            sys.stdout.flush()
        except UserError as e:
            _fail(str(e))
        except stopping.Stopped as e:
            print(e, file=sys.stderr, flush=True)
            return flags.FLAGS.stopped_status
        except BrokenPipeError:  # who read the output, as `head`, has seen enough
            os._exit(PIPE_CLOSED)
        except OSError as e:  # what a command does not foresee of paths, access and space
            _fail(_os_fault(e))
        except Exception as e:
            if not _of_memory(e):
                raise
            _fail(_memory_fault(e))
        return 0

    app.run(call, flags_parser=parse)


def console() -> None:
    """Runs the command that a console script is named after: `musc-train` is `python -m launch.musc_train`."""
    name = Path(sys.argv[0]).stem.removeprefix("lm-").replace("-", "_")
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(f"launch.{name}")
    module = importlib.import_module(f"launch.{name}")
    run(module.command, getattr(module, "preview", None))


def _with_config_file(argv: list[str]) -> list[str]:
    """The arguments with the command's own config file where none is given; configs/ may lie beside the packages."""
    given = next((i for i, word in enumerate(argv) if re.match("--?config(=|$)", word)), None)
    if given is None:
        spec = sys.modules["__main__"].__spec__
        own = _HOME / "configs" / f"{spec.name.removeprefix('launch.') if spec else ''}.py"
        return [argv[0], f"--config={own}", *argv[1:]] if own.is_file() else argv
    place = re.match(r"--?config=(configs/\w+\.py)(:.*)?$", argv[given])
    if place is None or Path(place[1]).exists() or not (_HOME / place[1]).is_file():
        return argv
    return [*argv[:given], f"--config={_HOME / place[1]}{place[2] or ''}", *argv[given + 1 :]]


def _define_processes() -> None:
    """The flags of a run of many processes; their defaults are the environment's."""

    def number(name: str) -> int | None:
        value = os.environ.get(name)
        return int(value) if value and value.isdigit() else None

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    flags.DEFINE_string("coordinator_address", address, "HOST:PORT of process 0, in a run of many processes")
    flags.DEFINE_integer("num_processes", number("JAX_NUM_PROCESSES"), "how many there are", lower_bound=1)
    flags.DEFINE_integer("process_id", number("JAX_PROCESS_ID"), "which one this is, from 0", lower_bound=0)
    flags.DEFINE_float("start_timeout", 300.0, "seconds until all of them must have started", lower_bound=1.0)
    flags.DEFINE_float("process_timeout", 300.0, "seconds without a sign of one until all end", lower_bound=1.0)
    # What restarts a preempted run takes 0 for its end
    flags.DEFINE_integer("stopped_status", 0, "exit status when asked to stop, with all saved", 0, 255)


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Within, the run's other processes are there; what ends one ends all."""
    given = flags.FLAGS
    done = start(
        Processes(
            given.coordinator_address, given.num_processes, given.process_id, given.start_timeout, given.process_timeout
        ),
        end=_lost,
    )
    if done is None:
        yield
        return
    from lm_jax.distributed.processes import outlast

    _on_end.append(done)
    try:
        yield
    except (UserError, OSError) as e:
        outlast(e)
        raise
    except stopping.Stopped:
        done(None)
        raise
    except Exception as e:
        if _of_memory(e):
            raise UserError(_memory_fault(e)) from e
        outlast(e)
        traceback.print_exc()
        raise UserError(f"{type(e).__name__}: {str(e)[:300]}; its traceback is above") from e
    done(None)


def _lost(line: str) -> NoReturn:
    """Ends this process for another's sake, in whatever it is."""
    _on_end.clear()
    _end(line, 1)


def _os_fault(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its access and its free space"


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)  # as XLA says it


def _memory_fault(error: Exception) -> str:
    said = (str(error).splitlines() or ["of the host"])[0]
    return (
        f"out of memory ({said[:200]}); in training set compute.remat=full, lower config.batch.rows_per_device or "
        "config.max_length; elsewhere lower config.batch.rows or config.decode.slots; docs/troubleshooting.md has more"
    )


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
        with contextlib.suppress(OSError):
            stream.flush()
    _end(line, 1)


def _printable(line: str) -> str:
    """One line of at most `_SHOWN` characters, without secrets. It may quote what others wrote: it moves no cursor."""
    for name, value in os.environ.items():
        if len(value) >= _SECRET_LENGTH and re.search("(KEY|TOKEN|PASSWORD|SECRET)$", name):
            line = line.replace(value, f"<{name}>")
    line = without_passwords(line)
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(line.split()))
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]} ... {line[-_SHOWN // 2 :]}"  # the cure stands last


def _interrupted(number: int, _) -> None:
    if stopping.ask():
        return  # it is heeded where everything is saved
    # No KeyboardInterrupt: raised inside a callback of the garbage collector, and JAX has one, it would be lost
    line = "interrupted; the same command goes on from what was saved"
    _end(line, INTERRUPTED if number == signal.SIGINT else TERMINATED)


def _end(line: str, status: int) -> NoReturn:
    # No shutdown of the interpreter: threads of XLA and of the checkpointing may be at work, and at times crash under
    # it. What is on disk survives a SIGKILL, so it survives this.
    line = _printable(line)
    try:
        for done in _on_end:
            done(line)
        os.write(2, f"error: {line}\n".encode())
    finally:  # the log may lie on the disk that is full
        os._exit(status)
