"""The reward contract. `RewardSet` in `set.py` scores rollouts with several rewards at once.

A reward scores samples (pictures, or clips of F frames) of P prompts, G of each: values fp32 [P, G], higher is better, and
ok bool [P, G], False where the reward could not be computed (the value is then 0 and must not be used). Two kinds:

* `DeviceReward`: a jitted function of device arrays, sharded as they come;
* `HostReward`: a function of numpy arrays, run in threads while the device goes on working. It may fail: an
  exception or a non-finite value masks the samples concerned and is counted, and training continues.

Your own host reward is a plain function; name it by import path in the config, `{"mypackage.rewards:brightness": {}}`:

    def brightness(images, prompts):  # uint8 [B, H, W, 3], B strings -> B floats
        return images.mean((1, 2, 3)) / 255

Its first parameter says what it takes: `images`, which for clips are single frames, whose values are averaged, or `videos`,
uint8 [B, F, H, W, 3]. A parameter called `metadata` receives B mappings, the other fields of the rows; further keyword
parameters become options in the config. Subclass `HostReward` or `DeviceReward` to keep state; their attribute `takes` is
"images" or "videos". A name in `registry.REWARDS` makes any of them known.
"""

import copy
import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dancegrpo_jax import sharding
from dancegrpo_jax.data import Row
from dancegrpo_jax.media import Media
from dancegrpo_jax.rewards.batch import Batch, chosen_frames
from dancegrpo_jax.sharding import Rules

log = logging.getLogger(__name__)
TAKES = ("images", "videos")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a set uses a reward: the options common to all rewards, as `RewardSet` has read them."""

    name: str = "reward"
    components: tuple[str, ...] = ()  # of a reward that gives several values a sample: those that are wanted
    threshold: float | None = None
    frames: str | int = "all"
    batch: int = 0

    @property
    def names(self) -> list[str]:
        """The names of the values: the reward's own, or "name.component" for each component."""
        return [f"{self.name}.{component}" for component in self.components] or [self.name]

    def stacked(self, scores) -> list:
        """The wanted components of {component: value}, in order; without components the value itself, or that of "score"."""
        several = isinstance(scores, Mapping)
        if self.components and not several:
            raise TypeError(f"components {', '.join(self.components)} are wanted, but the reward gives a single value")
        if missing := [name for name in self.components or ("score",) if several and name not in scores]:
            raise KeyError(f"no component {', '.join(missing)}; there are {', '.join(scores)}")
        return [scores[name] for name in self.components or ("score",)] if several else [scores]


class Reward:
    """What RewardSet needs of a reward: `submit`, which starts the work, and a function that waits for it."""

    name = "reward"  # in messages: what the config calls it
    takes = "images"
    on_host = False  # whether it wants uint8 pixels on the host

    def submit(self, batch: Batch, use: Use, pool: ThreadPoolExecutor) -> Callable:
        """Starts scoring. Returns `wait(timeout, report) -> [(values [P, G], ok [P, G]), ...]`, a pair for each of `use.names`.

        `report(kind, message, count)` is told of samples that could not be scored.
        """
        raise NotImplementedError

    def __call__(self, media: Media, rows: Sequence[Row]) -> dict:
        """Scores and waits: `{"reward": (values fp32 [P, G], ok bool [P, G])}`."""
        def report(kind, message, count):
            log.warning("reward %r could not score %d samples: %s", self.name, count, message)

        with ThreadPoolExecutor() as pool:
            return dict(zip(Use().names, self.submit(Batch(media, rows), Use(), pool)(None, report), strict=True))


# ------------------------------------------------------------------------------------------ on the device


class DeviceReward(Reward):
    """A reward computed on the accelerator.

    Subclasses implement `apply`, a pure function that is traced once per shape, and set `params` (arrays it needs,
    a pytree) and `prepare` if the rows matter. Errors while tracing are raised: they are mistakes in the program.
    """

    params = ()
    sharding: Rules = ()  # of the model that its parameters belong to

    def prepare(self, rows: Sequence[Row]):
        """On the host, once per row: a pytree of numpy arrays with leading axis P, e.g. token ids."""
        return ()

    def apply(self, params, pixels, text):
        """pixels fp32 in [0, 1], [P, G, H, W, 3] or, if it takes videos, [P, G, F, H, W, 3]; text as prepared.

        Returns: values [P, G], or {component: values}. A sample's value may depend on its own pixels and row only: clips come
        with their frames among the G, and with the option `batch` every sample is a prompt of its own.
        """
        raise NotImplementedError

    def signature(self):
        """What `apply` depends on besides its arguments: equal signatures share a compiled function; None: no sharing."""
        return

    @classmethod
    def abstract(cls, options: Mapping, mesh) -> "DeviceReward | None":
        """The reward with `jax.ShapeDtypeStruct`s for parameters, without weights and tokenizer; None: it has none."""
        return None

    def scorer(self, use: Use) -> Callable:
        """The jitted function (params, pixels [P, G, F, H, W, 3], text) -> [(values [P, G], ok [P, G]), ...], as `submit`."""
        signature = self.signature()
        compiled = self.__dict__.setdefault("_compiled", {}) if signature is None else _COMPILED
        key = signature, dataclasses.replace(use, name="")
        if key not in compiled:
            reward = copy.copy(self)
            reward.params, reward._compiled = (), {}  # the function outlives the reward and must not keep its weights
            compiled[key] = jax.jit(partial(_score, reward, use))
        return compiled[key]

    def submit(self, batch, use, pool):
        text = batch.place_text(self.prepare(batch.rows))
        scored = batch.call(f"reward {use.name}", self.scorer(use), self.params, batch.media.pixels, text)
        return lambda timeout, report: scored  # a jax.Array already is a promise


_COMPILED: dict[Any, Callable] = {}


def _score(reward: DeviceReward, use: Use, params, pixels, text):
    p, g, count = pixels.shape[:3]
    frames = chosen_frames(use.frames, count)
    if len(frames) < count:
        pixels = pixels[:, :, np.array(frames)]
    if reward.takes == "images":  # the frames of a clip are more samples of its prompt
        pixels = pixels.reshape(p, g * len(frames), *pixels.shape[3:])
    samples = pixels.shape[1]

    def apply(part):
        pixels, text = part
        values = jnp.stack(use.stacked(reward.apply(params, pixels.astype(jnp.float32), text))).astype(jnp.float32)
        if values.shape[1:] != pixels.shape[:2]:
            raise ValueError(f"reward {use.name!r}: values have shape {values.shape[1:]}, expected {pixels.shape[:2]}")
        return values

    if use.batch:
        part = pixels.reshape(p * samples, 1, *pixels.shape[2:]), jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, 0), text)
        values = sharding.map_slices(lambda part: apply(part)[..., 0].T, part, use.batch).T
    else:
        values = apply((pixels, text))
    values = values.reshape(len(values), p, g, samples // g).mean(-1)
    ok = jnp.isfinite(values)
    values = jnp.where(ok, values, 0)
    if use.threshold is not None:
        values = ((values > use.threshold) & ok).astype(jnp.float32)
    return list(zip(values, ok, strict=True))


def place(reward: DeviceReward, mesh) -> None:
    """Puts a reward's parameters on the mesh by its sharding rules; abstract ones get these as their shardings."""
    leaves = jax.tree.leaves(reward.params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        where = sharding.param_shardings(reward.params, mesh, reward.sharding)
        reward.params = jax.tree.map(sharding.abstract, reward.params, where)
    elif leaves:
        reward.params = sharding.place_params(reward.params, mesh, reward.sharding)


# ------------------------------------------------------------------------------------------ on the host


class HostReward(Reward):
    """A reward computed on the host, one call for the samples of one prompt, calls running in several threads.

    Of several processes each scores the samples that lie on its devices; a group spread over two is scored in two calls,
    unless `needs_group`: then one process gets it as a whole.
    """

    on_host = True
    needs_group = False  # whether a sample's value depends on the others of its prompt

    def score(self, samples: np.ndarray, prompts: list[str], metadata: list[Mapping]) -> Sequence[float]:
        """B samples of one prompt, uint8 [B, H, W, 3] (of clips: one frame of each) or, if it takes videos, [B, F, H, W, 3],
        B prompts and the fields of their rows -> B floats, or {component: B floats}.

        Return NaN for a sample that cannot be scored; an exception masks all B. Must be thread-safe.
        """
        raise NotImplementedError

    def _score_group(self, batch: Batch, use: Use, row: int, fetch: Callable):
        """(values [C, B], finite bool [B]) of what `fetch` gives: uint8 [B, F, H, W, 3] and which of them are finite."""
        samples, finite = fetch()
        frames = [batch.frames.index(frame) for frame in chosen_frames(use.frames, batch.media.pixels.shape[2])]
        b = len(samples)
        parts = [samples[:, frames]] if self.takes == "videos" else [samples[:, frame] for frame in frames]
        prompts, metadata = [batch.rows[row].prompt] * b, [batch.rows[row].fields] * b
        with batch.clock:
            scores = [np.asarray(use.stacked(self.score(part, prompts, metadata)), np.float32) for part in parts]
        for values in scores:
            if values.shape != (len(use.names), b):
                raise ValueError(f"{b} samples got scores of shape {values.shape[1:]}")
        return np.mean(scores, 0), finite

    def submit(self, batch, use, pool):
        batch.copy_to_host()
        waiting = batch.shared_rows() if self.needs_group else []

        def start(row, columns, fetch):
            return row, columns, pool.submit(self._score_group, batch, use, row, fetch)
        jobs = [start(row, columns, partial(batch.samples, row, columns)) for row, columns in batch.mine().items()
                if row not in waiting]

        def wait(timeout, report):
            # Processes exchange what they must in the order of the rows, and in this thread: no two exchanges may cross.
            for row in waiting:
                group = batch.gather(row)
                if batch.scorer(row) == jax.process_index():
                    jobs.append(start(row, np.arange(batch.shape[1]), lambda group=group: group))
            values, ok = _collect(jobs, (len(use.names), *batch.shape), timeout, report)
            if jax.process_count() > 1:  # every process scored its own samples; the rest of its arrays is 0
                values, ok = multihost_utils.process_allgather((values, ok.astype(np.float32)))
                values, ok = values.sum(0, dtype=np.float32), ok.sum(0) > 0
            if use.threshold is not None:
                values = ((values > use.threshold) & ok).astype(np.float32)
            return list(zip(values, ok, strict=True))
        return wait


def _collect(jobs, shape, timeout, report) -> tuple[np.ndarray, np.ndarray]:
    """(values fp32 [C, P, G], ok bool [C, P, G]) of this process's jobs (prompt, samples, future); 0 and False elsewhere."""
    values, ok = np.zeros(shape, np.float32), np.zeros(shape, bool)
    deadline = None if timeout is None else time.monotonic() + timeout
    for row, columns, future in jobs:
        try:
            scores, finite = future.result(None if deadline is None else max(deadline - time.monotonic(), 0))
        except Exception as error:  # the one place that swallows: a failed reward must not end the run
            future.cancel()
            report(type(error).__name__, f"{type(error).__name__}: {error}", len(columns))
            continue
        good = np.isfinite(scores) & finite
        values[:, row, columns], ok[:, row, columns] = np.where(good, scores, 0), good
        if not good.all():
            report("non-finite", "non-finite score or pixels", int((~good).any(0).sum()))
    return values, ok


class FunctionReward(HostReward):
    """A plain function `(images or videos, prompts, **options)` as a reward."""

    def __init__(self, function: Callable, **options):
        self.function, self.options = function, options
        self.takes = next(iter(inspect.signature(function).parameters))
        self.wants_metadata = "metadata" in inspect.signature(function).parameters

    def score(self, samples, prompts, metadata):
        extra = {"metadata": metadata} if self.wants_metadata else {}
        return self.function(samples, prompts, **self.options, **extra)


class LeftOut(Reward):
    """Stands in an abstract set for a reward that is not compiled: gives 0; for a host reward the pixels are quantised."""

    def __init__(self, on_host: bool):
        self.on_host = on_host

    def submit(self, batch, use, pool):
        if self.on_host:
            batch.quantised  # noqa: B018 (computes it)
        return lambda timeout, report: [(np.zeros(batch.shape, np.float32), np.ones(batch.shape, bool)) for _ in use.names]
