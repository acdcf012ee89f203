"""TPU topologies without TPUs: chips, their published figures, and the devices that libtpu compiles for."""

import math
import os
from typing import NamedTuple

# Before jax is imported: no TPU is asked for, several processes may compile, and libtpu keeps its logs to itself.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
               "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}


class TopologyError(ValueError):
    """No such topology, or no libtpu; says what to do."""


class Chip(NamedTuple):
    """Published peaks of one chip.

    `flops`: bf16 FLOP/s. `memory`: bytes of HBM that a program may use, as libtpu's own error message says. `hbm`, `link`:
    bytes/s of HBM, and of one ICI link in one direction. `axes`: of the torus, two links each. `ring`: an axis whose length
    is a multiple of it closes to a ring. `rate`: share of `flops` at which the
    compiler's cycle estimates, at default effort, run a FLUX transformer with all its elementwise work (v4: assumed).
    """

    flops: float
    memory: float
    hbm: float
    link: float
    axes: int
    ring: int
    rate: float


GIB = 1024**3
CHIPS = {
    "v4": Chip(275e12, 2 * 15.25 * GIB, 1228e9, 50e9, 3, 4, 0.60),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 2, 16, 0.55),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 3, 4, 0.61),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 112e9, 2, 16, 0.31),
}


class Topology(NamedTuple):
    """A slice of a pod: its name, chip, extent of the torus, and compile-only devices with `coords`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple


def set_environment() -> None:
    """Must run before jax is imported."""
    os.environ |= ENVIRONMENT


def get_topology(name: str) -> Topology:
    """The topology "chip:AxB" or "chip:AxBxC", e.g. v5e:16x16, v5p:4x4x4.

    Raises: TopologyError for an unknown one, or without libtpu.
    """
    from jax.experimental import topologies

    kind, _, extent = name.partition(":")
    if kind not in CHIPS or not extent or not all(part.isdigit() for part in extent.split("x")):
        raise TopologyError(f"--topology={name}: expected chip:AxB or chip:AxBxC with a chip of {', '.join(CHIPS)}; "
                            "for example v5e:16x16 or v5p:4x4x4")
    shape = tuple(map(int, extent.split("x")))
    if len(shape) != CHIPS[kind].axes:
        raise TopologyError(f"--topology={name}: {kind} has a torus of {CHIPS[kind].axes} axes")
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:
        text = " ".join(str(error).split())
        remedy = "" if "libtpu" not in text else "; install libtpu (tests/requirements.txt has the version)"
        raise TopologyError(f"--topology={name}: {text[:300]}{remedy}") from error
    if len(devices) != math.prod(shape):
        raise TopologyError(f"--topology={name}: libtpu made {len(devices)} devices of {math.prod(shape)} chips")
    return Topology(name, CHIPS[kind], shape, devices)
