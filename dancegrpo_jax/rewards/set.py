"""`RewardSet`: several rewards with weights, built from a config, that score a batch together."""

import difflib
import importlib
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Real

from dancegrpo_jax.data import Row
from dancegrpo_jax.media import Media
from dancegrpo_jax.models.files.convert import CheckpointError
from dancegrpo_jax.registry import REWARDS
from dancegrpo_jax.rewards.base import TAKES, DeviceReward, FunctionReward, LeftOut, Reward, Use, place
from dancegrpo_jax.rewards.batch import Batch, BusyClock
from dancegrpo_jax.rollout import run

log = logging.getLogger(__name__)
COMMON_OPTIONS = ("reward", "weight", "binary", "frames", "batch")  # read by RewardSet itself


class RewardSet:
    """Several rewards with weights.

    Args:
      config: `{name: {"weight": 1.0, ...options}}`. `name` is a registered name or an import path "package.module:attr"
        (a plain function or a Reward class); an option `reward` gives it instead, so that `name` can be a label and
        one reward can appear twice. Options common to all:
        weight: factor of the advantage, any finite number; 0 means logged only, negative means avoided. Of a reward
        with several values `{component: factor}`: each becomes a reward "name.component" of its own.
        binary: `{"threshold": tau}` replaces the reward r by 1[r > tau].
        frames: which frames of a clip are looked at, "first", a number n (evenly spaced) or "all" (the default).
        batch: a device reward is computed for so many samples (of clips: frames) per device at a time; 0 all at once.
      mesh: where the parameters of device rewards are placed; None leaves them where they are.
      shared: an earlier set, whose rewards of the same kind and options (the common ones aside) are used again, so that a
        network is loaded once. One set shares its own in the same way.
      threads: of the pool that runs host rewards.
      timeout: seconds that `result` waits for each host reward; what is missing then is masked. None: for ever.
    Raises: ValueError for an unknown name or option, naming the nearest known one, or for a bad value.

    `weights` is {name: float}. `failures` counts masked samples of host rewards on this process, {name: int}. `clock` knows
    how long host rewards have been computing. `notes` says what an abstract set leaves out.
    """

    def __init__(self, config: Mapping, mesh=None, *, shared: "RewardSet | None" = None, threads: int = 8,
                 timeout: float | None = 600, _abstract: bool = False):
        self.mesh = mesh
        self.rewards: dict[str, Reward] = {}
        self.uses: dict[str, Use] = {}
        self.weights: dict[str, float] = {}
        self.failures: Counter[str] = Counter()
        self.notes: list[str] = []
        self.clock = BusyClock()
        self._logged: set[tuple[str, str]] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")
        self._timeout = timeout
        self._made: list[tuple[Callable, dict, Reward]] = []
        others = shared._made if shared is not None and shared.mesh == mesh else []
        for name, options in config.items():
            common, own = _common_options(name, options)
            try:
                target = resolve(common["reward"])
                check_options(target, own, common.pop("reward"))
                same = (reward for made, its_own, reward in [*self._made, *others] if made is target and its_own == own)
                reward = next(same, None) or self._make(name, target, own, _abstract)
            except ValueError as error:
                raise type(error)(str(error) if repr(name) in str(error) else f"reward {name!r}: {error}") from error
            self._made.append((target, own, reward))
            self.add(name, reward, **common)

    @classmethod
    def abstract(cls, config: Mapping, mesh) -> "RewardSet":
        """The set with abstract parameters, without weights, network and tokenizers, to be submitted abstract pixels and a
        `call` that compiles. Rewards on the host, and networks without an abstract form, give zeros; `notes` names them.
        """
        return cls(config, mesh, _abstract=True)

    def _make(self, name: str, target: Callable, options: dict, abstract: bool) -> Reward:
        if not abstract:
            reward = _construct(target, options)
        elif not _is(target, DeviceReward):
            self.notes.append(f"reward {name!r} is not included: it runs on the host")
            return LeftOut(on_host=True)
        else:
            try:
                reward, why = target.abstract(options, self.mesh), "its network has no abstract form"
            except CheckpointError as error:
                reward, why = None, f"nothing is known of its network without its files ({error})"
            if reward is None:
                self.notes.append(f"reward {name!r} is not included: {why}")
                return LeftOut(on_host=False)
        if self.mesh is not None and isinstance(reward, DeviceReward):
            place(reward, self.mesh)
        reward.name = name
        return reward

    def add(self, name: str, reward: Reward, *, weight=1.0, binary: Mapping | None = None, frames: str | int = "all",
            batch: int = 0) -> None:
        """Adds a reward under a name; the options as in a config. Raises: ValueError for a bad value."""
        factors = dict(weight.items()) if hasattr(weight, "items") else {"": weight}
        threshold = None
        if binary is not None:
            if not hasattr(binary, "keys") or set(binary.keys()) != {"threshold"}:
                raise ValueError(f'reward {name!r}: binary must be {{"threshold": number}}, got {binary!r}')
            threshold = _number(binary["threshold"], f"reward {name!r}: binary threshold")
        if frames not in ("first", "all") and not _at_least(frames, 1):
            raise ValueError(f"reward {name!r}: frames must be 'first', 'all' or a number from 1, got {frames!r}")
        if not _at_least(batch, 0):
            raise ValueError(f"reward {name!r}: batch must be an integer from 0, got {batch!r}")
        if reward.takes not in TAKES:
            raise ValueError(f"reward {name!r}: takes is {reward.takes!r}, expected one of {', '.join(map(repr, TAKES))}")
        use = Use(name, tuple(factors) if hasattr(weight, "items") else (), threshold, frames, batch)
        for label, factor in zip(use.names, factors.values(), strict=False):  # {}: scored without a weight
            self.weights[label] = _number(factor, f"reward {label!r}: weight")
        self.rewards[name], self.uses[name] = reward, use

    @property
    def params(self) -> dict:
        """{name: pytree} of the device rewards' parameters, those that two names share only once."""
        found = {id(reward): (name, reward.params) for name, reward in reversed(self.rewards.items())
                 if isinstance(reward, DeviceReward)}
        return dict(reversed(found.values()))

    def submit(self, media: Media, rows: Sequence[Row], call: Callable = run) -> "Handle":
        """Starts scoring media [P, G, F, H, W, 3] of P rows and returns at once.

        Several batches can be in flight. Every jitted function is run by `call(name, function, *args, **kwargs)`: "quantise"
        and "reward <name>". Raises: ValueError if the numbers do not match.
        """
        if self._pool is None:
            raise RuntimeError("this RewardSet is closed")
        looks = [self.uses[name].frames for name, reward in self.rewards.items() if reward.on_host]
        batch = Batch(media, rows, looks, call=call, mesh=self.mesh, clock=self.clock)
        # Host rewards first: their copy of the pixels should not queue behind the device rewards' computation.
        order = sorted(self.rewards, key=lambda name: not self.rewards[name].on_host)
        waits = {name: self.rewards[name].submit(batch, self.uses[name], self._pool) for name in order}
        return Handle(self, [(self.uses[name], waits[name]) for name in self.rewards])

    def __call__(self, media: Media, rows: Sequence[Row], call: Callable = run) -> dict:
        """`submit(...).result()`."""
        return self.submit(media, rows, call).result()

    def close(self) -> None:
        """Ends the threads, without waiting for calls in flight, and lets go of the rewards and their parameters."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        self.rewards, self.uses, self._made = {}, {}, []

    def _report(self, name: str, kind: str, message: str, count: int) -> None:
        self.failures[name] += count
        if (name, kind) not in self._logged:
            self._logged.add((name, kind))
            log.warning("reward %r could not score %d samples (they are masked; further cases are only counted): %s",
                        name, count, message)


class Handle:
    """A batch being scored."""

    def __init__(self, owner: RewardSet, waits: list[tuple[Use, Callable]]):
        self._owner, self._waits, self._scores = owner, waits, {}

    def result(self) -> dict:
        """Waits for host rewards: `{name: (values fp32 [P, G], ok bool [P, G])}`, in the config's order.

        Host rewards are numpy arrays, the same on every process; device rewards are jax arrays, perhaps still being
        computed. On a pod all processes must call this, in the same order.
        """
        while self._waits:  # let go of the pixels one by one, and ask no process twice
            use, wait = self._waits[0]
            scores = wait(self._owner._timeout, partial(self._owner._report, use.name))
            self._scores |= dict(zip(use.names, scores, strict=True))
            del self._waits[0]
        return dict(self._scores)


# ------------------------------------------------------------------------------------------ names and options


def build(name: str, options: Mapping | None = None) -> Reward:
    """Makes the reward that a registered name or an import path stands for, with its own options.

    Raises: ValueError for an unknown name, a path that cannot be imported, an unknown or a missing option.
    """
    target, options = resolve(name), dict(options or {})
    check_options(target, options, name)
    return _construct(target, options)


def resolve(name: str) -> Callable:
    """The Reward class or the function that a registered name or an import path stands for.

    Raises: ValueError for anything else, and for a function that does not say what it takes.
    """
    if ":" not in name and name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}{_nearest(name, REWARDS)}; known: {', '.join(sorted(REWARDS))}; "
                         "your own: 'package.module:function'")
    module, _, attribute = REWARDS.get(name, name).partition(":")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if _is(target, Reward):
        return target
    if isinstance(target, type) or not callable(target):
        raise ValueError(f"reward {name!r} is {target!r}, neither a function nor a Reward class")
    first, second, *_ = [*inspect.signature(target).parameters, None, None]
    if first not in TAKES:
        raise ValueError(f"reward {name!r}: the first parameter of {target.__qualname__} is {first!r}; call it `images` if it "
                         "takes uint8 [B, H, W, 3] (of a clip: frames), or `videos` if it takes uint8 [B, F, H, W, 3]")
    if second in (None, "metadata"):
        raise ValueError(f"reward {name!r}: {target.__qualname__} must take the prompts as its second parameter")
    return target


def check_options(target: Callable, options: Mapping, name: str) -> None:
    """Raises: ValueError for options that a reward does not have, or without which it cannot be made."""
    parameters = _parameters(target) if _is(target, Reward) else [
        p for p in list(inspect.signature(target).parameters.values())[2:] if p.name != "metadata"]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option not in names:
            known = [*names, *COMMON_OPTIONS]
            raise ValueError(f"reward {name!r}: unknown option {option!r}{_nearest(option, known)}; "
                             f"known: {', '.join(known)}")
    for p in parameters:
        if p.name in names and p.default is p.empty and p.name not in options:
            raise ValueError(f"reward {name!r}: option {p.name!r} is missing")


def _common_options(name: str, options) -> tuple[dict, dict]:
    """(the options common to all, "reward" always among them; those of the reward itself)."""
    if not hasattr(options, "items"):
        raise ValueError(f"reward {name!r}: expected a dict of options like {{'weight': 1.0}}, got {options!r}")
    options = dict(options.items())
    common = {key: options.pop(key) for key in COMMON_OPTIONS if key in options}
    return {"reward": name} | common, options


def _is(target, kind: type) -> bool:
    return isinstance(target, type) and issubclass(target, kind)


def _construct(target: Callable, options: Mapping) -> Reward:
    return target(**options) if _is(target, Reward) else FunctionReward(target, **options)


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


def _nearest(word: str, known) -> str:
    match = difflib.get_close_matches(word, list(known), 1, cutoff=0)
    return f"; nearest: {match[0]!r}" if match else ""


def _at_least(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)
