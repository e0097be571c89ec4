"""What every entry point shares: `--config=FILE.py[:preset] --config.key=value`, and errors as one line."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from lm_jax.config import from_config_dict
from lm_jax.errors import UserError


def run(config_class: type, main: Callable[[Any], None]) -> None:
    """Parses the flags, builds `config_class` strictly and makes the one call `main(config)`.

    Exits with 0 on success and 1 on an error of the user's, whose one line is the last on stderr.
    """
    flag = config_flags.DEFINE_config_file("config", None, "settings file, with an optional :preset", lock_config=True)
    flags.mark_flag_as_required("config")

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as e:
            _fail(f"{_first_line(e)}; see the keys in the config file, and --help")
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; settings are given as --config.key=value")
        return rest

    def call(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # checkpointing logs pages at INFO
        try:
            main(from_config_dict(config_class, flag.value.to_dict()))
        except UserError as e:
            _fail(str(e))
        except KeyboardInterrupt:
            _fail("interrupted; the same command continues from the last checkpoint")

    app.run(call, flags_parser=parse)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(line: str) -> None:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(1)
