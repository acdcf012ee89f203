"""Batch settings of a config that divide over a topology's devices, as overrides for the command line."""

import copy
import math

from dancegrpo_jax.config import algorithm_of


def adapt(config, devices: int, shape: tuple[int, ...]):
    """(a config that divides over `devices` chips of a torus of `shape`, {key: value} of what it changes).

    What is left alone where it can be: samples of an update, chunks, micro-batch. On a 3-D torus `fsdp` is at most two of its
    axes, because over all three the compiler gathers weights by all-reduce. Prompts are raised to the next multiple, which
    is weak scaling: the learning rate may then want another value.
    """
    config, changed = copy.deepcopy(config), {}

    def change(section: str, name: str, value: int) -> None:
        if config[section][name] != value:
            config[section][name] = changed[f"{section}.{name}"] = value

    axes = dict(config.mesh)
    if axes["fsdp"] == -1 and len(shape) == 3 and shape[2] > 1 and math.prod(shape) >= 64:
        plane = shape[0] * shape[1]
        others = math.prod(size for name, size in axes.items() if name not in ("data", "fsdp"))
        change("mesh", "fsdp", plane // others), change("mesh", "data", -1)
        axes = dict(config.mesh)
    rest = devices // math.prod(size for size in axes.values() if size != -1)
    axes = {name: rest if size == -1 else size for name, size in axes.items()}
    parts = axes["data"] * axes["fsdp"]

    algorithm = algorithm_of(config)
    trained = algorithm.samples_per_prompt(config.data.group_size)
    updates = config.optim.updates_per_rollout
    step = math.lcm(parts * updates // math.gcd(parts * updates, trained), parts // math.gcd(parts, config.data.group_size))
    change("data", "prompts_per_step", -(-config.data.prompts_per_step // step) * step)
    prompts = config.data.prompts_per_step
    change("data", "chunks", max(n for n in range(1, config.data.chunks + 1)
                                 if prompts % n == 0 and prompts // n * config.data.group_size % parts == 0))
    pairs = prompts * trained // updates * algorithm.examples_per_sample(config.sampler.steps)
    sizes = microbatches(pairs, parts)
    change("optim", "microbatch", min((size for size in sizes if size >= config.optim.microbatch), default=sizes[-1]))
    for name, options in config.evals.items():
        batch = -(-options.get("batch", 16) // parts) * parts
        if options.get("batch", 16) != batch:
            with options.unlocked():
                options.batch = changed[f"evals.{name}.batch"] = batch
    return config, changed


def microbatches(pairs: int, parts: int) -> list[int]:
    """The micro-batches that divide an update's pairs and that `parts` devices share equally, ascending."""
    return [size for size in range(parts, pairs + 1, parts) if pairs % size == 0]
