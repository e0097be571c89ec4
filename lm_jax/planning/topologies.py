"""The devices that a plan is for: a TPU topology that need not be at hand, or those of this machine."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from lm_jax.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip of a generation has.

    Attributes:
      kind: jax's device_kind.
      dimensions: of a topology's shape.
      largest: chips along a dimension that one slice may have.
      hbm: bytes that a program may use: what the compiler refuses to exceed.
      links: bytes a second between chips, all of a chip's links together (the vendor's data sheets).
    """

    kind: str
    dimensions: int
    largest: int
    hbm: int
    links: float


# The compiler keeps some of the nominal 32, 16, 95 and 32 GB for itself; these are the limits in its refusals.
CHIPS = {
    "v4": Chip("TPU v4", 3, 16, int(30.75 * _GIB), 300e9),
    "v5e": Chip("TPU v5 lite", 2, 16, int(15.75 * _GIB), 200e9),
    "v5p": Chip("TPU v5", 3, 28, int(95.73 * _GIB), 600e9),
    "v6e": Chip("TPU v6 lite", 2, 16, int(31.24 * _GIB), 448e9),
}
EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:16x16"

# libtpu asks the machine which TPU it is; on a machine that is none, or is another one, these answer. What it compiles
# for is the topology's own. Several plans may be under way at once: none of them uses a TPU.
_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: the topology's, or `local`.
      devices: for `make_mesh`.
      hbm: bytes a device; None where it is not known.
      links: bytes a second between devices, of one of them; None where it is not known.
    """

    name: str
    devices: tuple[jax.Device, ...]
    hbm: int | None
    links: float | None


def open_target(topology: str | None) -> Target:
    """The devices of `topology` (`v5e:8x8`), of which none need be here; None: this machine's.

    For a topology JAX itself is kept on the CPU, so that a TPU that is here stays free. Call it before anything uses
    JAX's devices.

    Raises:
      UserError: no such topology, or no libtpu to compile for it.
    """
    if topology is None:
        return _local()
    chip = _check(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs libtpu, which compiles for TPUs (Linux on x86-64); run in the checkout: pip install -e "
            "'.[tpu-plan]'; without --topology the plan is for this machine's devices"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    # A v4 is two cores, which programs see as one device, as they do on the machines
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:  # libtpu's, of whatever kind
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: libtpu does not know it ({reason}); give one such as {EXAMPLES}"
        ) from None
    return Target(topology, tuple(devices), chip.hbm, chip.links)


def _check(topology: str) -> Chip:
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(
            f"--topology={topology}: not a TPU generation and its shape; give one such as {EXAMPLES}, of "
            f"{', '.join(CHIPS)}"
        )
    chip, sizes = CHIPS[name], [int(size) for size in shape.split("x")]
    if len(sizes) != chip.dimensions or max(sizes) > chip.largest or math.prod(sizes) == 1:
        raise UserError(
            f"--topology={topology}: {name} comes in {chip.dimensions} dimensions of at most {chip.largest} chips; "
            f"give one such as {EXAMPLES}"
        )
    return chip


def _local() -> Target:
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    hbm = stats.get("bytes_limit")
    if hbm is None and devices[0].platform == "cpu":  # its devices share what the machine has
        hbm = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return Target("local", tuple(devices), hbm, None)
