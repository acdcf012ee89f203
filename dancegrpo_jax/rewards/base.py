"""The reward contract, the registry, and `RewardSet`, which scores rollouts with several rewards at once.

A reward maps `(images [P, G, H, W, 3] in [0, 1], prompts [P], metadata [P] or None)` to `{name: (values, ok)}`:
values fp32 [P, G], higher is better, and ok bool [P, G], False where the reward could not be computed (the value is
then 0 and must not be used). There are two kinds:

* `DeviceReward`: a jitted function of device arrays, sharded as they come;
* `HostReward`: a function of numpy images, run in threads while the device goes on working. It may fail: an
  exception or a non-finite value masks the samples concerned and is counted, and training continues.

Your own host reward is a plain function; name it by import path in the config, `{"mypackage.rewards:brightness": {}}`:

    def brightness(images, prompts):  # uint8 [B, H, W, 3], B strings -> B floats
        return images.mean((1, 2, 3)) / 255

Keyword parameters of the function become options in the config, and a parameter called `metadata` receives the
batch's metadata. Subclass `HostReward` or `DeviceReward` to keep state; `@register("name")` gives a short name.
"""

import difflib
import importlib
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

log = logging.getLogger(__name__)
COMMON_OPTIONS = ("reward", "weight", "binary")  # read by RewardSet itself
_REGISTRY: dict[str, Callable] = {}


def register(name: str):
    """Decorator: makes a Reward class or a plain scoring function known by a short name."""
    def add(target):
        if name in _REGISTRY:
            raise ValueError(f"reward {name!r} is registered twice")
        _REGISTRY[name] = target
        return target
    return add


class Reward:
    """What RewardSet needs of a reward: `submit`, which starts the work, and a function that waits for it."""

    name = "reward"

    def submit(self, batch: "Batch", pool: ThreadPoolExecutor) -> Callable:
        """Starts scoring. Returns `wait(timeout, report) -> (values [P, G], ok [P, G])`.

        `report(kind, message, count)` is told of samples that could not be scored.
        """
        raise NotImplementedError

    def __call__(self, images, prompts: Sequence[str], metadata: Sequence | None = None) -> dict:
        """Scores and waits: `{name: (values fp32 [P, G], ok bool [P, G])}`."""
        def report(kind, message, count):
            log.warning("reward %r could not score %d samples: %s", self.name, count, message)

        with ThreadPoolExecutor() as pool:
            return {self.name: self.submit(Batch(images, prompts, metadata), pool)(None, report)}


class DeviceReward(Reward):
    """A reward computed on the accelerator.

    Subclasses implement `apply`, a pure function that is traced once per shape, and set `params` (arrays it needs,
    a pytree) and `prepare` if the prompts matter. Errors while tracing are raised: they are mistakes in the program.
    """

    params = ()

    def prepare(self, prompts: Sequence[str], metadata: Sequence | None):
        """On the host, once per prompt: a pytree of numpy arrays with leading axis P, e.g. token ids."""
        return ()

    def apply(self, params, images, text):
        """images fp32 [P, G, H, W, 3] in [0, 1], text as prepared -> values [P, G]."""
        raise NotImplementedError

    def signature(self):
        """What `apply` depends on besides its arguments: rewards of equal signature share one compiled function."""
        return self

    def submit(self, batch, pool):
        signature = self.signature()
        if signature not in _COMPILED:
            _COMPILED[signature] = jax.jit(partial(_score, self))
        scored = _COMPILED[signature](self.params, batch.images, self.prepare(batch.prompts, batch.metadata))
        return lambda timeout, report: scored  # a jax.Array already is a promise


_COMPILED: dict[Any, Callable] = {}


def _score(reward: DeviceReward, params, images, text):
    values = reward.apply(params, images.astype(jnp.float32), text).astype(jnp.float32)
    if values.shape != images.shape[:2]:
        raise ValueError(f"reward {reward.name!r}: values have shape {values.shape}, expected {images.shape[:2]}")
    ok = jnp.isfinite(values)
    return jnp.where(ok, values, 0), ok


class HostReward(Reward):
    """A reward computed on the host, one call for the images of one prompt, calls running in several threads."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list | None) -> Sequence[float]:
        """images uint8 [B, H, W, 3], B prompts and B metadata (or None) -> B floats.

        Return NaN for an image that cannot be scored; an exception masks all B. Must be thread-safe.
        """
        raise NotImplementedError

    def _score_group(self, group: "HostGroup", batch: "Batch"):
        images = group.fetch()
        b = len(images)
        metadata = None if batch.metadata is None else [batch.metadata[group.row]] * b
        values = np.asarray(self.score(images, [batch.prompts[group.row]] * b, metadata), np.float32)
        if values.shape != (b,):
            raise ValueError(f"{b} images got scores of shape {values.shape}")
        return values

    def submit(self, batch, pool):
        jobs = [(group, pool.submit(self._score_group, group, batch)) for group in batch.host_groups]

        def wait(timeout, report):
            values, ok = np.zeros(batch.shape, np.float32), np.zeros(batch.shape, bool)
            finite = batch.finite()
            deadline = None if timeout is None else time.monotonic() + timeout
            for group, future in jobs:
                place = (group.row, group.columns)
                try:
                    scores = future.result(None if deadline is None else max(deadline - time.monotonic(), 0))
                except Exception as error:  # the one place that swallows: a failed reward must not end the run
                    future.cancel()
                    report(type(error).__name__, f"{type(error).__name__}: {error}", values[place].size)
                    continue
                good = np.isfinite(scores) & finite[place]
                values[place], ok[place] = np.where(good, scores, 0), good
                if not good.all():
                    report("non-finite", "non-finite score or image", int((~good).sum()))
            if jax.process_count() > 1:  # every process scored what it holds; the rest of its arrays is 0
                values, ok = multihost_utils.process_allgather((values, ok.astype(np.float32)))
                values, ok = values.sum(0, dtype=np.float32), ok.sum(0) > 0
            return values, ok
        return wait


class FunctionReward(HostReward):
    """A plain function `(images uint8 [B, H, W, 3], prompts list[str]) -> B floats` as a reward."""

    def __init__(self, function: Callable, **options):
        self.function, self.options = function, options
        self.wants_metadata = "metadata" in inspect.signature(function).parameters

    def score(self, images, prompts, metadata):
        extra = {"metadata": metadata} if self.wants_metadata else {}
        return self.function(images, prompts, **self.options, **extra)


# ------------------------------------------------------------------------------------------ one batch of images


class HostGroup(NamedTuple):
    """The images of one prompt that this process holds: row `row`, slice `columns` of the [P, G] batch."""

    row: int
    columns: slice
    fetch: Callable[[], np.ndarray]  # waits for the device; uint8 [B, H, W, 3]


class Batch:
    """Checked inputs, and their uint8 copy for the host, made once and only if there are host rewards."""

    def __init__(self, images, prompts: Sequence[str], metadata: Sequence | None = None):
        if np.ndim(images) != 5 or np.shape(images)[-1] != 3:
            raise ValueError(f"images have shape {np.shape(images)}, expected [P, G, H, W, 3]")
        for what, items in (("prompts", prompts), ("metadata", metadata)):
            if items is not None and len(items) != len(images):
                raise ValueError(f"images of {len(images)} prompts, but {len(items)} {what}")
        self.images, self.prompts, self.metadata = jnp.asarray(images), list(prompts), metadata
        self.shape = tuple(np.shape(images)[:2])

    @cached_property
    def _quantised(self):
        return _quantise(self.images)  # dispatched here, awaited by whoever needs the values

    @cached_property
    def host_groups(self) -> list[HostGroup]:
        """One per prompt; on a pod each process gets the images it holds, so a prompt's group may be split."""
        pixels = self._quantised[0]
        if pixels.is_fully_addressable:
            parts = [((slice(None), slice(None)), pixels)]
        else:  # over all processes, replica 0 of the shards covers every image once
            parts = [(shard.index, shard.data) for shard in pixels.addressable_shards if shard.replica_id == 0]
        return [HostGroup(row, columns, lambda data=data, i=i: np.asarray(data)[i])
                for (rows, columns, *_), data in parts for i, row in enumerate(range(*rows.indices(self.shape[0])))]

    def finite(self) -> np.ndarray:
        """bool [P, G], False for images with NaN or infinity, whose uint8 copy would hide it."""
        finite = self._quantised[1]
        if not finite.is_fully_addressable:
            finite = jax.jit(lambda x: x, out_shardings=NamedSharding(finite.sharding.mesh, PartitionSpec()))(finite)
        return np.asarray(finite)


@jax.jit
def _quantise(images):
    return jnp.round(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8), jnp.isfinite(images).all((2, 3, 4))


# ------------------------------------------------------------------------------------------ from a config


class RewardSet:
    """Several rewards with weights, built from a config.

    Args:
      config: `{name: {"weight": 1.0, ...options}}`. `name` is a registered name or an import path "package.module:attr"
        (a plain function or a Reward class); an option `reward` gives it instead, so that `name` can be a label and
        one reward can appear twice. Options common to all:
        weight: factor of the advantage, any finite number; 0 means logged only, negative means avoided.
        binary: `{"threshold": tau}` replaces the reward r by 1[r > tau].
      place: puts the parameters of a device reward on the devices, `{name: array} -> {name: array}`, e.g.
        `lambda p: jax.device_put(p, param_shardings(p, mesh))`.
      threads: of the pool that runs host rewards.
      timeout: seconds that `result` waits for each host reward; what is missing then is masked. None: for ever.
    Raises: ValueError for an unknown name or option, naming the nearest known one, or for a bad value.

    `weights` is {name: float}. `failures` counts masked samples of host rewards on this process, {name: int}.
    """

    def __init__(self, config: Mapping, *, place: Callable | None = None, threads: int = 8,
                 timeout: float | None = 600):
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        self._thresholds: dict[str, float] = {}
        self.failures: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")
        self._timeout = timeout
        for name, options in config.items():
            if not hasattr(options, "items"):
                raise ValueError(f"reward {name!r}: expected a dict of options like {{'weight': 1.0}}, got {options!r}")
            options = dict(options.items())
            self.weights[name] = _number(options.pop("weight", 1.0), f"reward {name!r}: weight")
            binary = options.pop("binary", None)
            if binary is not None:
                if not hasattr(binary, "keys") or set(binary.keys()) != {"threshold"}:
                    raise ValueError(f'reward {name!r}: binary must be {{"threshold": number}}, got {binary!r}')
                self._thresholds[name] = _number(binary["threshold"], f"reward {name!r}: binary threshold")
            try:
                self.rewards[name] = build(options.pop("reward", name), options)
            except ValueError as error:
                raise type(error)(str(error) if repr(name) in str(error) else f"reward {name!r}: {error}") from error
            self.rewards[name].name = name
            if place is not None and getattr(self.rewards[name], "params", None):
                self.rewards[name].params = place(self.rewards[name].params)

    def submit(self, images, prompts: Sequence[str], metadata: Sequence | None = None) -> "Handle":
        """Starts scoring [P, G, H, W, 3] images in [0, 1] of P prompts and returns at once.

        Several batches can be in flight. Raises: ValueError if the numbers do not match.
        """
        batch = Batch(images, prompts, metadata)
        # Host rewards first: their copy of the images should not queue behind the device rewards' computation.
        order = sorted(self.rewards, key=lambda name: isinstance(self.rewards[name], DeviceReward))
        waits = {name: self.rewards[name].submit(batch, self._pool) for name in order}
        return Handle(self, {name: waits[name] for name in self.rewards})

    def __call__(self, images, prompts: Sequence[str], metadata: Sequence | None = None) -> dict:
        """`submit(...).result()`."""
        return self.submit(images, prompts, metadata).result()

    def close(self) -> None:
        """Ends the threads, without waiting for calls in flight."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _report(self, name: str, kind: str, message: str, count: int) -> None:
        self.failures[name] += count
        if (name, kind) not in self._logged:
            self._logged.add((name, kind))
            log.warning("reward %r could not score %d samples (they are masked; further cases are only counted): %s",
                        name, count, message)


class Handle:
    """A batch being scored."""

    def __init__(self, owner: RewardSet, waits: dict[str, Callable]):
        self._owner, self._waits = owner, waits

    def result(self) -> dict:
        """Waits for host rewards: `{name: (values fp32 [P, G], ok bool [P, G])}`, in the config's order.

        Host rewards are numpy arrays, the same on every process; device rewards are jax arrays, perhaps still being
        computed. On a pod all processes must call this, in the same order.
        """
        owner, scores = self._owner, {}
        for name, wait in self._waits.items():
            values, ok = wait(owner._timeout, partial(owner._report, name))
            if name in owner._thresholds:
                values = ((values > owner._thresholds[name]) & ok).astype(np.float32)
            scores[name] = values, ok
        return scores


def build(name: str, options: Mapping | None = None) -> Reward:
    """Makes the reward that a registered name or an import path stands for, with its options.

    Raises: ValueError for an unknown name, a path that cannot be imported, an unknown or a missing option.
    """
    target = _import(name) if ":" in name else _REGISTRY.get(name)
    if target is None:
        raise ValueError(f"unknown reward {name!r}{_nearest(name, _REGISTRY)}; known: {', '.join(sorted(_REGISTRY))}; "
                         "your own: 'package.module:function'")
    is_class = isinstance(target, type) and issubclass(target, Reward)
    if not is_class and (isinstance(target, type) or not callable(target)):
        raise ValueError(f"reward {name!r} is {target!r}, neither a function nor a Reward class")
    parameters = list(inspect.signature(target).parameters.values())
    parameters = [p for p in parameters[0 if is_class else 2:] if is_class or p.name != "metadata"]
    options = dict(options or {})
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option not in names:
            known = [*names, *COMMON_OPTIONS]
            raise ValueError(f"reward {name!r}: unknown option {option!r}{_nearest(option, known)}; "
                             f"known: {', '.join(known)}")
    for p in parameters:
        if p.name in names and p.default is p.empty and p.name not in options:
            raise ValueError(f"reward {name!r}: option {p.name!r} is missing")
    return target(**options) if is_class else FunctionReward(target, **options)


def _import(path: str):
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {path!r} cannot be imported: {error}") from error


def _nearest(word: str, known) -> str:
    match = difflib.get_close_matches(word, list(known), 1, cutoff=0)
    return f"; nearest: {match[0]!r}" if match else ""


def _number(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)
