"""From what a program computes and moves to seconds: a bound and an expectation, both predictions.

Per device, of one phase of an iteration:

* `compute`: FLOPs at the chip's published bf16 peak;
* `memory`: bytes of HBM that its ops read and write, at the published bandwidth;
* `ici`: every collective at the bandwidth of the links that its group spans. A group takes both links of each torus axis that
  it fills where the axis closes to a ring, else one. An all-gather or reduce-scatter of n devices moves (n-1)/n of its buffer
  over them, an all-reduce twice that, an all-to-all a quarter (half the axis on average, in both directions), a permute
  its buffer over one link.

`bound` = max(compute, memory, ici): peak rates, everything overlaps. No program is faster than this.
`expected` = max(compute / rate, memory) + ici: the share of the peak that the compiler's own cycle estimates give a FLUX
transformer, its norms and other elementwise work included, and no collective hidden, which is what the compiler's default
flags do on v5p and v6e. Latencies, the host and the input of data are in neither.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dancegrpo_jax.aot.hlo import Collective, Traffic
from dancegrpo_jax.aot.topology import Topology


class Times(NamedTuple):
    """Seconds of one execution on one device."""

    compute: float
    memory: float
    ici: float
    rate: float  # share of the peak

    @property
    def bound(self) -> float:
        return max(self.compute, self.memory, self.ici)

    @property
    def expected(self) -> float:
        return max(self.compute / self.rate, self.memory) + self.ici


def links(coords: Sequence[tuple[int, ...]], shape: tuple[int, ...], ring: int) -> int:
    """ICI links per device that a group of devices at `coords` in a torus of `shape` can use at once."""
    total = 0
    for axis, size in enumerate(shape):
        extent = len({place[axis] for place in coords})
        if extent > 1:
            total += 2 if extent == size and size % ring == 0 and size > 2 else 1
    return max(total, 1)


def collective_seconds(collective: Collective, topology: Topology, mesh_devices: Sequence) -> float:
    """Seconds of all executions of a collective; `mesh_devices` are the mesh's, in flat order."""
    n = len(collective.group)
    coords = [tuple(mesh_devices[i].coords)[:len(topology.shape)] for i in collective.group]
    ring = collective.bytes * (n - 1) / n
    width = links(coords, topology.shape, topology.chip.ring)
    moved = {"all-gather": ring, "reduce-scatter": ring, "all-reduce": 2 * ring, "all-to-all": ring / 4 * width,
             "collective-permute": collective.bytes * width}[collective.kind]
    return collective.count * moved / (topology.chip.link * width)


def times(flops: float, traffic: Traffic, topology: Topology, mesh_devices: Sequence) -> Times:
    """The terms of one execution. `flops`: of one device."""
    chip = topology.chip
    return Times(flops / chip.flops, traffic.hbm_bytes / chip.hbm,
                 sum(collective_seconds(c, topology, mesh_devices) for c in traffic.collectives), chip.rate)
