"""One batch on its way to the rewards: its pixels as uint8 on the host, and which process scores which sample."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax import sharding
from dancegrpo_jax.data import Row
from dancegrpo_jax.media import Media, quantise
from dancegrpo_jax.rollout import run

_CUT = "pixels {} are cut within a sample ({}); only [P, G] may be split over devices"


def chosen_frames(option: str | int, count: int) -> tuple[int, ...]:
    """The frames of a clip of `count` that the option `frames` means; n of them are evenly spaced from first to last."""
    if option == "all" or (isinstance(option, int) and option >= count):
        return tuple(range(count))
    if option == "first":
        return (0,)
    return tuple(int(frame) for frame in np.linspace(0, count - 1, option).round())


def owners(where: jax.sharding.Sharding, shape: Sequence[int], processes: int,
           process_of: Callable = lambda device: device.process_index) -> np.ndarray:
    """Which process scores which sample of an array [P, G, ...]: int [P, G], one of those that hold the whole sample.

    Where several hold a prompt, prompts go round among them, so that replicas share the work and groups stay together.
    Raises: ValueError if a sample is cut over devices.
    """
    held = np.zeros((processes, *shape[:2]), bool)
    if where.is_fully_addressable:  # every process has made the same array for itself
        held[:] = True
    else:
        for device, index in where.devices_indices_map(tuple(shape)).items():
            if _whole(index[2:], shape[2:]):
                held[process_of(device)][index[:2]] = True
    if not held.any(0).all():
        raise ValueError(_CUT.format(tuple(shape), where))
    order = np.argsort(~held, axis=0, kind="stable")  # holders first, by number
    turn = np.arange(shape[0])[:, None] % held.sum(0)
    return np.take_along_axis(order, turn[None], 0)[0]


def _whole(index: Sequence[slice], shape: Sequence[int]) -> bool:
    return all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=True))


class Part(NamedTuple):
    """A piece of an array [P, G, ...] on one device of this process."""

    rows: range
    columns: range
    data: jax.Array

    def __contains__(self, sample: tuple[int, int]) -> bool:
        return sample[0] in self.rows and sample[1] in self.columns

    def __getitem__(self, sample: tuple[int, int]) -> np.ndarray:
        return np.asarray(self.data)[sample[0] - self.rows.start, sample[1] - self.columns.start]


def local_parts(array: jax.Array, samples: Sequence[tuple[int, int]]) -> list[Part]:
    """The pieces on this process's devices that together hold `samples`. Raises: ValueError if one is cut over devices."""
    parts, missing = [], set(samples)
    for shard in array.addressable_shards:
        rows, columns = (range(*cut.indices(size)) for cut, size in zip(shard.index[:2], array.shape[:2], strict=True))
        part = Part(rows, columns, shard.data)
        if _whole(shard.index[2:], array.shape[2:]) and any(sample in part for sample in missing):
            parts.append(part)
            missing = {sample for sample in missing if sample not in part}
    if missing:
        raise ValueError(_CUT.format(array.shape, array.sharding))
    return parts


class Batch:
    """Media and rows, checked; their uint8 copy is made once, and only if there are host rewards.

    Args:
      looks: the options `frames` of the host rewards; only frames that one of them looks at are copied.
      call: runs a jitted function, see `run`; where it gives abstract arrays, nothing may ask for `group`.
      mesh: where prepared text goes; None leaves that to jax.
    """

    def __init__(self, media: Media, rows: Sequence[Row], looks: Sequence = ("all",), *, call: Callable = run, mesh=None,
                 clock: "BusyClock | None" = None):
        if not isinstance(media, Media):
            raise TypeError(f"rewards score Media, got {type(media).__name__}; see media.from_images")
        shape = tuple(np.shape(media.pixels))
        if len(shape) != 6 or shape[-1] != 3:
            raise ValueError(f"pixels have shape {shape}, expected [P, G, F, H, W, 3]")
        if len(rows) != shape[0]:
            raise ValueError(f"pixels of {shape[0]} prompts, but {len(rows)} rows")
        self.media, self.rows, self.call, self.mesh = media, list(rows), call, mesh
        self.shape, self.clock = shape[:2], clock or BusyClock()
        self.frames = tuple(sorted({frame for option in looks for frame in chosen_frames(option, shape[2])}))

    def place_text(self, text):
        """Prepared text (a pytree of numpy arrays [P, ...]) on every device of the mesh; abstract if the pixels are."""
        if self.mesh is None:
            return text
        if isinstance(self.media.pixels, jax.ShapeDtypeStruct):
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), text)
        return sharding.replicate(text, self.mesh)

    @cached_property
    def quantised(self):
        """`media.quantise` of the frames, split as the pixels are, but never within a sample."""
        where = getattr(self.media.pixels, "sharding", None)
        if isinstance(where, NamedSharding):
            where = NamedSharding(where.mesh, PartitionSpec(*(*where.spec, None, None)[:2]))
        else:
            where = None
        return self.call("quantise", quantise, self.media.pixels, frames=self.frames, where=where)

    @cached_property
    def owner(self) -> np.ndarray:
        """int [P, G]: the process that scores each sample."""
        pixels = self.quantised[0]
        return owners(pixels.sharding, pixels.shape, jax.process_count())

    @cached_property
    def _parts(self) -> tuple[list[Part], list[Part]]:
        mine = [(int(p), int(g)) for p, g in np.argwhere(self.owner == jax.process_index())]
        return tuple(local_parts(array, mine) for array in self.quantised)

    def copy_to_host(self) -> None:
        """Starts copying the samples that this process scores."""
        for part in (*self._parts[0], *self._parts[1]):
            part.data.copy_to_host_async()

    def mine(self) -> dict[int, np.ndarray]:
        """{prompt: its samples} that this process scores."""
        owned = self.owner == jax.process_index()
        return {row: np.flatnonzero(owned[row]) for row in range(self.shape[0]) if owned[row].any()}

    def shared_rows(self) -> list[int]:
        """Prompts whose samples are scored by several processes: the same list on each."""
        return [row for row, owner in enumerate(self.owner) if len(set(owner.tolist())) > 1]

    def scorer(self, row: int) -> int:
        """The process that scores a prompt as a whole: its owners take turns."""
        processes = sorted(set(self.owner[row].tolist()))
        return processes[row % len(processes)]

    def samples(self, row: int, columns: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n, F, H, W, 3], finite bool [n]) of samples of one prompt that this process scores; waits for the device."""
        return tuple(np.stack([next(part for part in parts if (row, int(g)) in part)[row, int(g)] for g in columns])
                     for parts in self._parts)

    def gather(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """As `samples`, of the whole group of a prompt, from all processes, which must all call this in the same order.

        The exchange itself goes over the devices' network: one group at a time, which leaves the devices at once.
        """
        shape = self.shape[1], *self.quantised[0].shape[2:]
        pixels, finite = np.zeros(shape, np.uint8), np.zeros(shape[0], np.uint8)
        columns = self.mine().get(row, ())
        if len(columns):
            pixels[columns], finite[columns] = self.samples(row, columns)
        pixels, finite = multihost_utils.process_allgather((pixels, finite))  # every sample comes from one, the rest is 0
        return pixels.sum(0, dtype=np.uint8), finite.sum(0) > 0


class BusyClock:
    """Seconds during which at least one of several threads was inside `with clock:`."""

    def __init__(self):
        self._lock, self._inside, self._since, self._seconds = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self):
        with self._lock:
            if self._inside == 0:
                self._since = time.monotonic()
            self._inside += 1

    def __exit__(self, *exception):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """The seconds since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds
