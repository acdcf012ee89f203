"""Compiles the phases of a run for a topology, with abstract arrays: the trainer's own jitted functions, nothing executed.

Each phase takes the output shardings of the one before, as in a run.
"""

import bisect
import contextlib
import copy
import dataclasses
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax import sharding
from dancegrpo_jax.aot import flops, hlo
from dancegrpo_jax.aot.adapt import microbatches
from dancegrpo_jax.aot.topology import Topology, get_topology
from dancegrpo_jax.config import ConfigError, trained_steps, validate
from dancegrpo_jax.evaluate import decode, encode
from dancegrpo_jax.pipelines.base import configured_policy, lora_settings
from dancegrpo_jax.models.encoders.clip import CLIPModel
from dancegrpo_jax.models.files.convert import abstract_model
from dancegrpo_jax.models.encoders.open_clip import ARCHITECTURES
from dancegrpo_jax.rewards import base as rewards
from dancegrpo_jax.rewards.base import DeviceReward
from dancegrpo_jax.rewards.clip import ClipScore
from dancegrpo_jax.rollout import rollout
from dancegrpo_jax.trainer import concatenate
from dancegrpo_jax.update import Objective, init_state, make_examples, make_optimizer, rescore, update

PHASES = ("encode", "rollout", "decode", "reward", "join", "examples", "rescore", "update")
log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parents[1] / "architectures"  # configs of released pipelines, by hub id
REWARD_MODELS = {"yuvalkirstain/PickScore_v1": "ViT-H-14", "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu"}


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
    learn: Callable[["Run", int], None] | None = None  # adds the learner's phases to a run, for a micro-batch


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


def abstract_clip(target: type[ClipScore], options: dict) -> ClipScore:
    """A CLIP reward with `jax.ShapeDtypeStruct`s for parameters and without a tokenizer."""
    class Abstract(target):
        def load(self, model, tokenizer, architecture):
            architecture = architecture or REWARD_MODELS.get(str(model))
            if architecture in ARCHITECTURES:
                abstract = nnx.eval_shape(lambda: CLIPModel(ARCHITECTURES[architecture], rngs=nnx.Rngs(0)))
            else:
                abstract = abstract_model(CLIPModel, model)
            self.params = self.layout(abstract)

        def prepare(self, prompts, metadata):
            return np.zeros((len(prompts), self.config.text_config.max_position_embeddings), np.int32)
    return Abstract(**options)


def abstract_rewards(config: dict, mesh) -> tuple[dict[str, DeviceReward], list[str]]:
    """The device rewards of a config with abstract parameters on the mesh, and notes on those that are left out."""
    found, notes = {}, []
    for name, options in config.items():
        options = dict(options or {})
        target = rewards._REGISTRY.get(options.get("reward", name))
        options = {key: value for key, value in options.items() if key not in rewards.COMMON_OPTIONS}
        inputs = inspect.signature(target).parameters if target else {}
        if inspect.isclass(target) and issubclass(target, ClipScore) and "head" not in inputs:
            reward = abstract_clip(target, options)
        elif inspect.isclass(target) and issubclass(target, DeviceReward) and "model" not in inputs:
            reward = target(**options)
        else:
            notes.append(f"reward {name!r} is not included: it runs on the host, or its network has no abstract form here")
            continue
        if reward.params:
            where = sharding.param_shardings(reward.params, mesh, reward.sharding)
            reward.params = jax.tree.map(_sharded, reward.params, where)
        found[name] = reward
    return found, notes


def _sharded(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _unsharded(leaf):
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
    return jax.tree.map(_sharded, traced.out_info, compiled.output_shardings)


def compile_run(config, topology_name: str, only: Sequence[str] = ()) -> Run:
    """Compiles every phase of `config` for a topology; a phase that needs too much memory ends the list, with its `error`.

    only: names of phases to compile ("reward" means all rewards); of the others the results are taken to be split by sample.
    Raises: ConfigError for a config that does not fit the number of devices, TopologyError.
    """
    if unknown := set(only) - set(PHASES):
        raise ConfigError(f"--phases: {unknown.pop()!r} is not one of {', '.join(PHASES)}")
    topology = get_topology(topology_name)
    validate(config, len(topology.devices))
    config = offline_config(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    run = Run(topology, mesh, config, [], {}, 0, [])
    if only:
        run.notes.append(f"only {', '.join(only)}: other phases are in no sum")
    with contextlib.suppress(OutOfMemory):
        _compile_phases(run, only)
    _count_resident(run)
    return run


def _count_resident(run: Run) -> None:
    everything = sum(run.resident.values())
    for phase in run.phases:
        phase.resident = everything - sum(run.resident.get(name, 0) for name in phase.uses)


def largest_microbatch(run: Run, usable: float) -> int:
    """The largest micro-batch whose update takes less than `usable` of the memory, by bisection; 0 if none does."""
    grpo, data = run.config.grpo, run.config.data
    rows = data.prompts_per_step * (grpo.best_of or data.group_size) // grpo.updates_per_rollout
    sizes = microbatches(rows * trained_steps(run.config), sharding.batch_devices(run.mesh))
    if run.learn is None:
        return 0

    def fits(size: int) -> bool:
        trial = dataclasses.replace(run, phases=[], resident=dict(run.resident))
        try:
            run.learn(trial, size)
        except OutOfMemory:
            return False
        _count_resident(trial)
        return trial.phases[-1].total < usable * run.topology.chip.memory
    return max(0, *sizes[:bisect.bisect_left(sizes, True, key=lambda size: not fits(size))], 0)


def _compile_phases(run: Run, only: Sequence[str]) -> None:
    config, mesh = run.config, run.mesh
    devices, parts = mesh.size, sharding.batch_devices(mesh)
    chunks, group = config.data.chunks, config.data.group_size
    prompts = config.data.prompts_per_step // chunks
    trained_group = config.grpo.best_of or group
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def split(count: int) -> int:  # a batch that does not divide is computed by every part of the mesh
        return devices if count % parts == 0 else devices // parts

    def by_sample(tree, axis: int):
        def where(leaf):
            fits = leaf.ndim > axis and leaf.shape[axis] % parts == 0
            return NamedSharding(mesh, PartitionSpec(*(None,) * axis, sharding.BATCH) if fits else PartitionSpec())
        return jax.tree.map(lambda leaf: _sharded(leaf, where(leaf)), tree)

    def compiled(name, calls, uses, function, *args, batch, plain=None, run=run, batch_axis=0, **kwargs):
        if name and only and name.split()[0] not in only:
            with jax.set_mesh(mesh):
                return by_sample(function.trace(*args, **kwargs).out_info, batch_axis)
        phase, start = Phase(name, calls, uses), time.process_time()
        if name:
            log.info("compiling %s for %s", name, run.topology.name)
            run.phases.append(phase)
        if plain:  # without a mesh nothing is padded, and no kernel recomputes
            phase.model_flops = flops.count(function.trace(*jax.tree.map(_unsharded, plain), **kwargs).jaxpr) / devices
        with jax.set_mesh(mesh), low_effort():
            try:
                return compile_phase(phase, function, *args, parallel=split(batch), devices=devices, **kwargs)
            finally:
                phase.compile_seconds = time.process_time() - start

    # ---------------------------------------------------------------- arrays that live as long as the run
    policy = configured_policy(config)
    trainable, frozen = policy.abstract(lora_settings(config), mesh)
    tx = make_optimizer(config.optim, config.steps * config.grpo.updates_per_rollout)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(partial(init_state, tx=tx, with_ema=bool(config.optim.ema_decay), rules=policy.sharding),
                               trainable)
    state = jax.tree.map(_sharded, state, sharding.param_shardings(state, mesh, policy.sharding))
    reference = trainable if config.grpo.kl_beta else {}
    found, notes = abstract_rewards(config.rewards.to_dict(), mesh)
    run.notes += notes

    def tokens(count):
        where = NamedSharding(mesh, PartitionSpec(sharding.BATCH if count % parts == 0 else None))
        return {name: jax.ShapeDtypeStruct((count, length), np.int32, sharding=where) for name, length in policy.lengths.items()}

    if config.model.guidance_scale != 1:
        frozen["negative"] = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype),
                                          jax.eval_shape(policy.encode, frozen, tokens(1)))
    embedded = bool(config.data.embeddings)
    run.state_bytes = device_bytes(state)
    run.resident |= {
        "trainable": device_bytes(state.trainable), "optimizer": device_bytes(state.opt_state), "ema": device_bytes(state.ema),
        "frozen denoiser": device_bytes(frozen["denoiser"]), "vae": device_bytes(frozen["vae"]),
        "text encoders": 0 if embedded else sum(device_bytes(frozen[name]) for name in policy.texts),
        "negative": device_bytes(frozen["negative"]), "reference": device_bytes(reference),
        "rewards": sum(device_bytes(reward.params) for reward in found.values())}

    # ---------------------------------------------------------------- the phases of an iteration
    rest = {key: value for key, value in frozen.items() if not embedded or key not in policy.texts}
    args = policy, frozen, tokens(prompts)
    cond = compiled("" if embedded else "encode", chunks, ("text encoders",), encode, *args, batch=parts, plain=args)
    key = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), jax.eval_shape(lambda: jax.random.key(0)))
    schedule = policy.schedule(config.sampler.steps, config.sampler.shift)
    samples, network = prompts * group, ("trainable", "frozen denoiser", "negative")
    args = (policy, state.trainable, rest, cond, key, schedule)
    trajectory = compiled("rollout", chunks, network, rollout, *args, group_size=group,
                          shared_noise=config.sampler.shared_noise, batch=samples, plain=args, batch_axis=1)
    latents = jax.ShapeDtypeStruct(trajectory.latents.shape[1:], trajectory.latents.dtype,
                                   sharding=NamedSharding(mesh, PartitionSpec(*trajectory.latents.sharding.spec[1:])))
    images = compiled("decode", chunks, ("vae",), decode, policy, rest, latents, batch=samples)
    grouped = compiled("", chunks, (), jax.jit(lambda x: x.reshape(prompts, group, *x.shape[1:])), images, batch=samples)
    for name, reward in found.items():
        text = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), reward.prepare([""] * prompts, None))
        compiled(f"reward {name}", chunks, ("rewards",), reward.scorer(), reward.params, grouped, text, batch=samples)

    joined = compiled("join", 1, ("chunks",), concatenate, [trajectory] * chunks, axis=1, batch=samples, batch_axis=1)
    conds = compiled("", 1, (), concatenate, [cond] * chunks, batch=samples)
    rows, times = config.data.prompts_per_step * trained_group, trained_steps(config)
    advantage = array((config.data.prompts_per_step, group), np.float32)
    chosen = array((config.data.prompts_per_step, trained_group), np.int32)
    time_index = array((rows, times), np.int32)
    objective = Objective(config.grpo.clip_range, config.grpo.kl_beta, config.optim.ema_decay,
                          on_policy=config.grpo.updates_per_rollout == 1)
    run.resident |= {"chunks": chunks * device_bytes(trajectory), "trajectory": device_bytes(joined),
                     "conditioning": device_bytes(conds) + chunks * device_bytes(cond), "images": chunks * device_bytes(grouped)}

    def learn(run: Run, microbatch: int) -> None:
        examples = compiled("examples", 1, ("trajectory",), make_examples, joined, schedule, conds, advantage, chosen, time_index,
                            updates=config.grpo.updates_per_rollout, microbatch=microbatch, batch=microbatch, run=run,
                            batch_axis=2)
        run.resident["examples"] = device_bytes(examples)
        if config.grpo.rescore and not objective.on_policy:
            compiled("rescore", 1, (*network, "examples"), rescore, policy, state.trainable, rest, examples, batch=microbatch,
                     run=run)
        args = (tx, objective, state, rest, reference, examples, 0)
        plain = copy.copy(policy)
        plain.remat = "none"
        compiled("update", config.grpo.updates_per_rollout, (*network, "optimizer", "ema", "reference", "examples"),
                 update, policy, *args, batch=microbatch, plain=(plain, *args), run=run)

    run.learn = learn
    learn(run, config.grpo.microbatch)
