"""On-policy means ratio == 1: rollout and update evaluate the same Gaussian, whatever the batch, dtype and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sharding
from dancegrpo_jax.algorithms.grpo import GRPO
from dancegrpo_jax.data import rows_of
from dancegrpo_jax.learner import Learner, init_state, make_batch, update
from dancegrpo_jax.rollout import encode, rollout
from dancegrpo_jax.sde import Kernel
from tests.pipelines import load_pipeline, write_pipeline

OPTIMISED = True
STEPS = 4
KERNELS = {"flow": Kernel("flow", 0.7), "diffusion": Kernel("ddim", 1.0)}
PROMPTS = ["a red circle", "two blue squares", "a cross and a circle"]

# paradigm, dtype, LoRA rank, guidance, (prompts, group), devices: every value of each with every one of the others once,
# but the batch sizes
CASES = [
    ("flow", "float32", 0, 1.0, (1, 1), 1),
    ("diffusion", "bfloat16", 0, 1.0, (1, 7), 1),
    ("diffusion", "float32", 4, 3.0, (2, 12), 1),
    ("diffusion", "bfloat16", 4, 1.0, (8, 1), 8),
    ("flow", "bfloat16", 0, 3.0, (16, 12), 8),
    ("flow", "float32", 4, 3.0, (8, 7), 8),
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {paradigm: write_pipeline(tmp_path_factory.mktemp(paradigm), paradigm) for paradigm in ("flow", "diffusion")}


@pytest.mark.parametrize("paradigm,dtype,rank,guidance,batch,devices", CASES)
def test_ratio_is_one_before_the_first_update(pipelines, paradigm, dtype, rank, guidance, batch, devices):
    prompts, group = batch
    pipeline, trainable, frozen = load_pipeline(pipelines[paradigm], lora_rank=rank, dtype=dtype, guidance_scale=guidance)
    if rank:  # fresh adapters are zero: move them, so that they take part
        (part, adapters), = trainable.items()
        keys = jax.random.split(jax.random.key(5), len(adapters))
        trainable = {part: {name: 0.2 * jax.random.normal(key, leaf.shape)
                            for key, (name, leaf) in zip(keys, adapters.items(), strict=True)}}
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    learner = Learner(pipeline, KERNELS[paradigm], GRPO(timestep_fraction=1.0), optax.adamw(1e-3))
    with jax.set_mesh(mesh):
        trainable, frozen = sharding.place_params((trainable, frozen), mesh)
        inputs = pipeline.inputs(rows_of((PROMPTS * prompts)[:prompts]))
        cond = encode(pipeline, frozen, sharding.shard_batch(inputs, mesh), jax.random.key(0))
        assert (cond.negative is None) == (guidance == 1)
        schedule = pipeline.schedule(STEPS, 2.0)
        trajectory = rollout(pipeline, learner.kernel, trainable, frozen, cond, jax.random.key(1), schedule, group_size=group)
        scores = {"r": (jax.random.normal(jax.random.key(2), (prompts, group)), jnp.ones((prompts, group), bool))}
        examples, _, _ = make_batch(learner.algorithm, jax.random.key(3), trajectory, schedule, scores, jnp.arange(prompts), {},
                                    cond, weights=(("r", 1.0),), updates=1, microbatch=prompts * group)
        if group == 1:  # alone in its group a sample has no advantage
            examples = examples._replace(samples={"advantage": scores["r"][0].reshape(-1)})
        state = init_state(learner, trainable, {})
        state, first = update(learner, state, frozen, {}, examples, 0, jax.random.key(4), False)
        _, second = update(learner, state, frozen, {}, examples, 0, jax.random.key(4), False)
    assert float(jnp.abs(trajectory.log_probs[:STEPS - 1]).min()) > 0
    for bound in ("min", "max"):
        assert abs(float(first[f"ratio_first/{bound}"]) - 1) <= 1e-6
    # and it is no constant: one update moves it
    assert np.ptp([float(second["ratio_first/min"]), float(second["ratio_first/max"])]) > 1e-6
