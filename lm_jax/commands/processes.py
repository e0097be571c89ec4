"""What one process of many knows, made known to all."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def everywhere(value: Callable[[], Any]) -> Any:
    """What `value` gives in process 0 (JSON), in every process."""
    if jax.process_count() == 1:
        return value()
    from jax.experimental import multihost_utils

    here = json.dumps(value()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(here))))
    return json.loads(multihost_utils.broadcast_one_to_all(np.frombuffer(here.ljust(size), np.uint8)).tobytes())
