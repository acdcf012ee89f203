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
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax.sharding import Rules

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
    components: tuple[str, ...] = ()  # of a reward that gives several values a sample: those that are wanted

    def submit(self, batch: "Batch", pool: ThreadPoolExecutor) -> Callable:
        """Starts scoring. Returns `wait(timeout, report) -> (values [C, P, G], ok [C, P, G])`, C components, or 1.

        `report(kind, message, count)` is told of samples that could not be scored.
        """
        raise NotImplementedError

    def __call__(self, images, prompts: Sequence[str], metadata: Sequence | None = None) -> dict:
        """Scores and waits: `{name: (values fp32 [P, G], ok bool [P, G])}`."""
        def report(kind, message, count):
            log.warning("reward %r could not score %d samples: %s", self.name, count, message)

        with ThreadPoolExecutor() as pool:
            return self.named(*self.submit(Batch(images, prompts, metadata), pool)(None, report))

    @property
    def names(self) -> list[str]:
        """The names of its values: its own, or "name.component" for each component."""
        return [f"{self.name}.{component}" for component in self.components] or [self.name]

    def named(self, values, ok) -> dict:
        """{name: (values [P, G], ok [P, G])} of what `wait` returns."""
        return {name: (values[i], ok[i]) for i, name in enumerate(self.names)}

    def stacked(self, scores) -> list:
        """The wanted components of {component: value}, in order; without components the value itself, alone."""
        if not self.components:
            return [scores]
        if not isinstance(scores, Mapping):
            raise TypeError(f"components {', '.join(self.components)} are wanted, but the reward gives a single value")
        if missing := [name for name in self.components if name not in scores]:
            raise KeyError(f"no component {', '.join(missing)}; there are {', '.join(scores)}")
        return [scores[name] for name in self.components]


class DeviceReward(Reward):
    """A reward computed on the accelerator.

    Subclasses implement `apply`, a pure function that is traced once per shape, and set `params` (arrays it needs,
    a pytree), `sharding` (the rules of the model that these belong to) and `prepare` if the prompts matter. Errors
    while tracing are raised: they are mistakes in the program.
    """

    params = ()
    sharding: Rules = ()

    def prepare(self, prompts: Sequence[str], metadata: Sequence | None):
        """On the host, once per prompt: a pytree of numpy arrays with leading axis P, e.g. token ids."""
        return ()

    def apply(self, params, images, text):
        """images fp32 [P, G, H, W, 3] in [0, 1], text as prepared -> values [P, G], or {component: values}."""
        raise NotImplementedError

    def signature(self):
        """What `apply` depends on besides its arguments: rewards of equal signature share one compiled function."""
        return self

    def scorer(self) -> Callable:
        """The jitted function (params, images, text) -> (values [P, G], ok [P, G])."""
        signature = self.signature(), self.components
        if signature not in _COMPILED:
            _COMPILED[signature] = jax.jit(partial(_score, self))
        return _COMPILED[signature]

    def submit(self, batch, pool):
        scored = self.scorer()(self.params, batch.images, self.prepare(batch.prompts, batch.metadata))
        return lambda timeout, report: scored  # a jax.Array already is a promise


_COMPILED: dict[Any, Callable] = {}


def _score(reward: DeviceReward, params, images, text):
    values = jnp.stack(reward.stacked(reward.apply(params, images.astype(jnp.float32), text))).astype(jnp.float32)
    if values.shape[1:] != images.shape[:2]:
        raise ValueError(f"reward {reward.name!r}: values have shape {values.shape[1:]}, expected {images.shape[:2]}")
    ok = jnp.isfinite(values)
    return jnp.where(ok, values, 0), ok


class HostReward(Reward):
    """A reward computed on the host, one call for the images of one prompt, calls running in several threads."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list | None) -> Sequence[float]:
        """images uint8 [B, H, W, 3], B prompts and B metadata (or None) -> B floats, or {component: B floats}.

        Return NaN for an image that cannot be scored; an exception masks all B. Must be thread-safe.
        """
        raise NotImplementedError

    def _score_group(self, batch: "Batch", row: int):
        images = batch.pixels()[row]
        b = len(images)
        metadata = None if batch.metadata is None else [batch.metadata[row]] * b
        with batch.clock:
            scores = self.stacked(self.score(images, [batch.prompts[row]] * b, metadata))
        values = np.asarray(scores, np.float32)
        if values.shape != (len(self.names), b):
            raise ValueError(f"{b} images got scores of shape {values.shape[1:]}")
        return values

    def submit(self, batch, pool):
        batch.copy_to_host()
        # On a pod each process takes every n-th prompt, with its whole group.
        rows = range(jax.process_index(), len(batch.prompts), jax.process_count())
        jobs = [(row, pool.submit(self._score_group, batch, row)) for row in rows]

        def wait(timeout, report):
            shape = (len(self.names), *batch.shape)
            values, ok = np.zeros(shape, np.float32), np.zeros(shape, bool)
            finite = batch.finite()
            deadline = None if timeout is None else time.monotonic() + timeout
            for row, future in jobs:
                try:
                    scores = future.result(None if deadline is None else max(deadline - time.monotonic(), 0))
                except Exception as error:  # the one place that swallows: a failed reward must not end the run
                    future.cancel()
                    report(type(error).__name__, f"{type(error).__name__}: {error}", batch.shape[1])
                    continue
                good = np.isfinite(scores) & finite[row]
                values[:, row], ok[:, row] = np.where(good, scores, 0), good
                if not good.all():
                    report("non-finite", "non-finite score or image", int((~good).any(0).sum()))
            if jax.process_count() > 1:  # every process scored its own prompts; the rest of its arrays is 0
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


class Batch:
    """Checked inputs, and their uint8 copy for the host, made once and only if there are host rewards."""

    def __init__(self, images, prompts: Sequence[str], metadata: Sequence | None = None, clock: "BusyClock | None" = None):
        if np.ndim(images) != 5 or np.shape(images)[-1] != 3:
            raise ValueError(f"images have shape {np.shape(images)}, expected [P, G, H, W, 3]")
        for what, items in (("prompts", prompts), ("metadata", metadata)):
            if items is not None and len(items) != len(images):
                raise ValueError(f"images of {len(images)} prompts, but {len(items)} {what}")
        self.images, self.prompts, self.metadata = images, list(prompts), metadata
        self.shape, self.clock = tuple(np.shape(images)[:2]), clock or BusyClock()

    @cached_property
    def _quantised(self):
        return _quantise(self.images, getattr(self.images, "sharding", None) if jax.process_count() > 1 else None)

    def copy_to_host(self) -> None:
        """Starts copying; on a pod every process gets all images."""
        for array in self._quantised:
            array.copy_to_host_async()

    def pixels(self) -> np.ndarray:
        """uint8 [P, G, H, W, 3], once the device has computed them."""
        return np.asarray(self._quantised[0])

    def finite(self) -> np.ndarray:
        """bool [P, G], False for images with NaN or infinity, whose uint8 copy would hide it."""
        return np.asarray(self._quantised[1])


@partial(jax.jit, static_argnames=("sharding",))
def _quantise(images, sharding=None):
    """(uint8 copy, whether finite); for images with a sharding over several processes both are replicated."""
    pixels = jnp.round(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8), jnp.isfinite(images).all((2, 3, 4))
    return jax.lax.with_sharding_constraint(pixels, NamedSharding(sharding.mesh, PartitionSpec())) if sharding else pixels


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


# ------------------------------------------------------------------------------------------ from a config


class RewardSet:
    """Several rewards with weights, built from a config.

    Args:
      config: `{name: {"weight": 1.0, ...options}}`. `name` is a registered name or an import path "package.module:attr"
        (a plain function or a Reward class); an option `reward` gives it instead, so that `name` can be a label and
        one reward can appear twice. Options common to all:
        weight: factor of the advantage, any finite number; 0 means logged only, negative means avoided. Of a reward
        with several values `{component: factor}`: each becomes a reward "name.component" of its own.
        binary: `{"threshold": tau}` replaces the reward r by 1[r > tau].
      place: puts the parameters {name: array} of a device reward on the devices by its `sharding`, e.g.
        `lambda params, rules: place_params(params, mesh, rules)`.
      threads: of the pool that runs host rewards.
      timeout: seconds that `result` waits for each host reward; what is missing then is masked. None: for ever.
    Raises: ValueError for an unknown name or option, naming the nearest known one, or for a bad value.

    `weights` is {name: float}. `failures` counts masked samples of host rewards on this process, {name: int}. `clock` knows
    how long host rewards have been computing.
    """

    def __init__(self, config: Mapping, *, place: Callable | None = None, threads: int = 8,
                 timeout: float | None = 600):
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        self._thresholds: dict[str, float] = {}
        self.failures: Counter[str] = Counter()
        self.clock = BusyClock()
        self._logged: set[tuple[str, str]] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")
        self._timeout = timeout
        for name, options in config.items():
            if not hasattr(options, "items"):
                raise ValueError(f"reward {name!r}: expected a dict of options like {{'weight': 1.0}}, got {options!r}")
            options = dict(options.items())
            weight = options.pop("weight", 1.0)
            factors = dict(weight.items()) if hasattr(weight, "items") else {"": weight}
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
            self.rewards[name].components = tuple(factors) if hasattr(weight, "items") else ()
            for label, factor in zip(self.rewards[name].names, factors.values()):
                self.weights[label] = _number(factor, f"reward {label!r}: weight")
            reward = self.rewards[name]
            if place is not None and isinstance(reward, DeviceReward) and reward.params:
                reward.params = place(reward.params, reward.sharding)

    def submit(self, images, prompts: Sequence[str], metadata: Sequence | None = None) -> "Handle":
        """Starts scoring [P, G, H, W, 3] images in [0, 1] of P prompts and returns at once.

        Several batches can be in flight. Raises: ValueError if the numbers do not match.
        """
        batch = Batch(images, prompts, metadata, self.clock)
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
            scores |= owner.rewards[name].named(values, ok)
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
    parameters = _parameters(target) if is_class else [
        p for p in list(inspect.signature(target).parameters.values())[2:] if p.name != "metadata"]
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


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The parameters of a class, with those of its parents where it passes **options on."""
    found = {}
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            own = list(inspect.signature(parent.__init__).parameters.values())[1:]
            found = {p.name: p for p in own} | found
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return list(found.values())


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
