"""Compiles an iteration for a topology, with abstract arrays: the trainer's own code, nothing executed.

`iteration.collect` and `learn` run as in training, on an abstract session and with a `call` that compiles. Each phase takes the
output shardings of the one before, as in a run.
"""

import bisect
import contextlib
import copy
import dataclasses
import logging
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax import iteration, sharding
from dancegrpo_jax.aot import flops, hlo
from dancegrpo_jax.aot.adapt import microbatches
from dancegrpo_jax.aot.topology import Topology, get_topology
from dancegrpo_jax.config import ConfigError, validate
from dancegrpo_jax.learner import Batch, Learner, TrainState
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.session import Session, as_returned

PHASES = ("encode", "rollout", "decode", "reward", "join", "examples", "rescore", "update", "copies")
NETWORK = ("trainable", "frozen denoiser")
# The resident arrays that a phase has among its arguments.
USES = {"encode": ("text encoders",), "rollout": NETWORK, "decode": ("codec",), "reward": ("rewards",), "join": ("chunks",),
        "examples": ("trajectory", "conditioning"), "rescore": (*NETWORK, "examples"),
        "update": (*NETWORK, "optimizer", "ema", "copies", "reference", "examples"), "copies": ("trainable", "copies")}
# What lives only while an iteration collects, or only while it learns; everything else lives as long as the run.
COLLECTING, LEARNING = ("chunks", "images"), ("trajectory", "conditioning", "shown", "examples")
log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parents[1] / "architectures"  # configs of released pipelines, by hub id


@dataclasses.dataclass
class Phase:
    """One compiled program of an iteration. Bytes and FLOPs are per device and execution."""

    name: str
    calls: int  # in an iteration
    uses: tuple[str, ...] = ()  # groups of resident arrays that are among its arguments
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # of the compiler, plus "total"
    resident: int = 0  # alive during the phase, but no arguments of it
    flops: float = 0.0
    model_flops: float = 0.0  # without recomputation, padding and what several devices compute alike
    xla_flops: float = 0.0  # of XLA, every loop body once
    traffic: hlo.Traffic | None = None
    error: str = ""  # why it did not compile
    compile_seconds: float = 0.0  # CPU time

    @property
    def total(self) -> int:
        """Bytes of HBM while the phase runs."""
        return self.memory.get("total", 0) + self.resident


@dataclasses.dataclass
class Run:
    """All phases of a config on a topology, and what lies in memory throughout (bytes per device)."""

    topology: Topology
    mesh: Any
    config: Any
    phases: list[Phase]
    resident: dict[str, int]
    state_bytes: int
    notes: list[str]
    rules: tuple = ()  # sharding rules of what is trained
    learn: Any = None  # what `largest_microbatch` learns from: (session, state, collected, plan, key)


def device_bytes(tree) -> int:
    """Bytes of a pytree of sharded (abstract) arrays on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def offline_config(config):
    """The config with its base model's shipped architecture in place of a hub id, if there is one."""
    config = copy.deepcopy(config)
    name = config.model.folder.partition("@")[0]
    if (SHIPPED / name / "model_index.json").exists():
        config.model.folder = str(SHIPPED / name)
    elif not Path(config.model.folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = ", ".join(sorted(str(file.parent.relative_to(SHIPPED)) for file in SHIPPED.glob("*/*/model_index.json")))
        raise ConfigError(f"config.model.folder={config.model.folder!r}: nothing is downloaded here; known without files are "
                          f"{known}; for others give a folder with the pipeline's json files")
    return config


def _place(leaf):
    """How an array is split, the same for all ways to say it."""
    where = getattr(leaf, "sharding", None)
    if not isinstance(where, NamedSharding):
        return where
    spec = as_returned(where).spec
    return (*spec, *(None,) * (len(leaf.shape) - len(spec)))


def _unsharded(leaf):
    """Without a mesh nothing is padded and no kernel recomputes; nor does anything without rematerialisation."""
    if isinstance(leaf, Learner):
        return dataclasses.replace(leaf, pipeline=_unsharded(leaf.pipeline))
    if isinstance(leaf, Pipeline):
        leaf = copy.copy(leaf)
        leaf.remat = "none"
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


@contextlib.contextmanager
def low_effort():
    """Compiles five to nine times faster; memory within 1.5 % and the same collectives (docs/compile_reports.md)."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


class OutOfMemory(Exception):
    """The compiler's refusal, in its words."""


def compile_phase(phase: Phase, function, *args, parallel: int, devices: int, **kwargs):
    """Traces and compiles a jitted function, fills `phase`, returns the abstract outputs with their shardings.

    parallel: among how many devices its arithmetic is split. Raises: OutOfMemory.
    """
    traced = function.trace(*args, **kwargs)
    total = flops.count(traced.jaxpr)
    phase.flops, phase.model_flops = total / parallel, phase.model_flops or total / devices
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        phase.error = " ".join(str(error).partition("RESOURCE_EXHAUSTED: ")[2].split())[:160]
        raise OutOfMemory(phase.error) from error
    stats = compiled.memory_analysis()
    phase.memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    phase.memory |= {"code": stats.generated_code_size_in_bytes, "peak": getattr(stats, "peak_memory_in_bytes", 0)}
    phase.memory["total"] = sum(phase.memory[name] for name in ("argument", "output", "temp", "code")) - phase.memory["alias"]
    phase.xla_flops = compiled.cost_analysis().get("flops", 0.0)
    phase.traffic = hlo.analyse(compiled.as_text(), devices)
    return jax.tree.map(sharding.abstract, traced.out_info, compiled.output_shardings)


class Compiler:
    """A `call` for `iteration`: compiles each function once for its shapes, notes it as a phase, returns abstract results.

    only: names of phases to compile; of the others the results are taken to be split by sample.
    """

    def __init__(self, run: Run, session: Session, only: Sequence[str] = ()):
        self.run, self.only, self.known = run, only, {}
        self.samples = len(session.rows[0]) // session.chunks * session.group
        self.batch = {"rollout": self.samples, "decode": self.samples, "reward": self.samples, "update": session.microbatch,
                      "rescore": session.microbatch, "examples": session.microbatch}

    def __call__(self, name: str, function, *args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        asked = name, function, structure, tuple((leaf.shape, leaf.dtype, _place(leaf)) if hasattr(leaf, "shape") else leaf
                                                 for leaf in leaves)
        if asked not in self.known:
            self.known[asked] = self.compile(name, function, *args, **kwargs)
        phase, result = self.known[asked]
        phase.calls += 1
        return result

    def compile(self, name: str, function, *args, **kwargs):
        mesh, kind = self.run.mesh, name.partition(" ")[0]
        devices, parts = mesh.size, sharding.batch_devices(mesh)
        phase = Phase(name, 0, USES.get(kind, ()))
        if kind not in PHASES or (" " in name and kind != "reward"):  # small ones are part of no sum
            with jax.set_mesh(mesh), low_effort():
                return phase, compile_phase(phase, function, *args, parallel=devices, devices=devices, **kwargs)
        if self.only and kind not in self.only:
            with jax.set_mesh(mesh):
                return phase, self.by_sample(kind, function.trace(*args, **kwargs).out_info)
        log.info("compiling %s for %s", name, getattr(self.run.topology, "name", mesh))
        self.run.phases.append(phase)
        start = time.process_time()
        if kind in ("encode", "rollout", "update", "rescore"):
            plain = function.trace(*(jax.tree.map(_unsharded, arg, is_leaf=lambda x: isinstance(x, (Learner, Pipeline)))
                                     for arg in args), **kwargs)
            phase.model_flops = flops.count(plain.jaxpr) / devices
        # A batch that does not divide is computed by every part of the mesh.
        parallel = devices if self.batch.get(kind, parts) % parts == 0 else devices // parts
        with jax.set_mesh(mesh), low_effort():
            try:
                return phase, compile_phase(phase, function, *args, parallel=parallel, devices=devices, **kwargs)
            finally:
                phase.compile_seconds = time.process_time() - start

    def bytes(self, kind: str) -> int:
        """Bytes on a device of what the first phase of a kind returns."""
        results = [result for (name, *_), (_, result) in self.known.items() if name.partition(" ")[0] == kind]
        return device_bytes(results[0]) if results else 0

    def by_sample(self, kind: str, result):
        """Results of a phase that is not compiled, placed as a compiled one would."""
        mesh, parts = self.run.mesh, sharding.batch_devices(self.run.mesh)

        def split(tree, axis):
            def where(leaf):
                fits = leaf.ndim > axis and leaf.shape[axis] % parts == 0
                return NamedSharding(mesh, PartitionSpec(*(None,) * axis, sharding.BATCH) if fits else PartitionSpec())
            return jax.tree.map(lambda leaf: sharding.abstract(leaf, where(leaf)), tree)

        def params(tree):
            return jax.tree.map(sharding.abstract, tree, sharding.param_shardings(tree, mesh, self.run.rules))
        placed = {Batch: lambda batch: Batch(split(batch.pairs, 2), *split((batch.samples, batch.cond), 0)), TrainState: params}
        if kind == "decode":  # split by sample, then by prompt and sample as the compiler does it
            flat = jax.ShapeDtypeStruct((math.prod(result.shape[:2]), *result.shape[2:]), result.dtype)
            group = jax.jit(lambda pixels: pixels.reshape(result.shape)).lower(split(flat, 0)).compile()
            return sharding.abstract(result, group.output_shardings)
        if type(result) is tuple:
            return tuple(placed.get(type(part), lambda part: split(part, 0))(part) for part in result)
        return params(result) if kind == "copies" else split(result, 1 if kind in ("rollout", "join") else 0)


def compile_run(config, topology_name: str, only: Sequence[str] = ()) -> Run:
    """Compiles every phase of `config` for a topology; a phase that needs too much memory ends the list, with its `error`.

    only: names of phases to compile ("reward" means all rewards).
    Raises: ConfigError for a config that does not fit the number of devices, TopologyError.
    """
    if unknown := set(only) - set(PHASES):
        raise ConfigError(f"--phases: {unknown.pop()!r} is not one of {', '.join(PHASES)}")
    topology = get_topology(topology_name)
    validate(config, len(topology.devices))
    config = offline_config(config)
    return compile_on(config, sharding.make_mesh(**config.mesh, devices=topology.devices), topology, only)


def compile_on(config, mesh, topology: Topology | None, only: Sequence[str] = ()) -> Run:
    """`compile_run` for the devices of a mesh."""
    run = Run(topology, mesh, config, [], {}, 0, [])
    with jax.set_mesh(mesh):
        session = Session(config, mesh, abstract=True)
        state = session.load()
    run.rules = session.pipeline.sharding
    run.notes += session.rewards.notes
    run.notes += [f"only {', '.join(only)}: other phases are in no sum"] if only else []
    pipeline, frozen = session.pipeline, session.frozen

    def held(role):
        return sum(device_bytes(frozen[name]) for name in pipeline.named(role) if name in frozen)
    run.state_bytes = device_bytes(state)
    run.resident |= {
        "trainable": device_bytes(state.trainable), "optimizer": device_bytes(state.opt_state), "ema": device_bytes(state.ema),
        "copies": device_bytes(state.copies), "reference": device_bytes(session.reference), "frozen denoiser": held("denoiser"),
        "codec": held("codec"), "text encoders": held("text"),
        "rewards": device_bytes(session.rewards.params)}
    with contextlib.suppress(OutOfMemory):
        call = Compiler(run, session, only)
        plan, key = session.replicated(session.algorithm.plan(session.schedule, 0)), session.key(0)
        collected = iteration.collect(session, state, session.rows[0], plan, key, call)
        run.resident |= {
            "chunks": session.chunks * call.bytes("rollout"), "images": session.chunks * device_bytes(collected.shown.pixels),
            "shown": device_bytes(collected.shown.pixels), "trajectory": device_bytes(collected.trajectory),
            "conditioning": device_bytes(collected.cond)}
        run.learn = session, state, collected, plan, key
        _learn(run, call)
    _count_resident(run)
    return run


def _learn(run: Run, call: Compiler) -> None:
    session, *rest = run.learn
    iteration.learn(session, *rest, 0, call)
    run.resident["examples"] = call.bytes("examples")


def _count_resident(run: Run) -> None:
    def alive(name, phase):
        kind = phase.name.partition(" ")[0]
        learns = kind in ("join", "examples", "rescore", "update", "copies")
        return kind == "join" or not learns if name in COLLECTING else learns or name not in LEARNING
    for phase in run.phases:
        phase.resident = sum(size for name, size in run.resident.items() if name not in phase.uses and alive(name, phase))


def largest_microbatch(run: Run, usable: float) -> int:
    """The largest micro-batch whose update takes less than `usable` of the memory, by bisection; 0 if none does."""
    if run.learn is None:
        return 0
    session = run.learn[0]
    rows = len(session.rows[0]) * session.algorithm.samples_per_prompt(session.group) // session.updates
    examples = rows * session.algorithm.examples_per_sample(run.config.sampler.steps)
    sizes = microbatches(examples, sharding.batch_devices(run.mesh))

    def fits(size: int) -> bool:
        trial = dataclasses.replace(run, phases=[], resident=dict(run.resident))
        session.microbatch = size
        try:
            _learn(trial, Compiler(trial, session))
        except OutOfMemory:
            return False
        _count_resident(trial)
        return max(phase.total for phase in trial.phases) < usable * run.topology.chip.memory
    return max(0, *sizes[:bisect.bisect_left(sizes, True, key=lambda size: not fits(size))], 0)
