"""On-policy means ratio == 1: rollout and update evaluate the same Gaussian, whatever the batch, dtype and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sharding
from dancegrpo_jax.evaluate import encode
from dancegrpo_jax.rollout import rollout
from dancegrpo_jax.update import Objective, init_state, make_examples, update
from tests.pipelines import load_policy, write_pipeline

OPTIMISED = True
STEPS = 4
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
    policy, trainable, frozen = load_policy(pipelines[paradigm], paradigm, lora_rank=rank, dtype=dtype,
                                            guidance_scale=guidance)
    if rank:  # fresh adapters are zero: move them, so that they take part
        keys = jax.random.split(jax.random.key(5), len(trainable))
        trainable = {name: 0.2 * jax.random.normal(key, leaf.shape) for key, (name, leaf) in zip(keys, trainable.items())}
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        trainable, frozen = sharding.place_params((trainable, frozen), mesh)
        tokens = policy.tokenize((PROMPTS * prompts)[:prompts])
        cond = encode(policy, frozen, sharding.shard_batch(tokens, mesh))
        schedule = policy.schedule(STEPS, 2.0)
        trajectory = rollout(policy, trainable, frozen, cond, jax.random.key(1), schedule, group_size=group)
        trained = STEPS - 1
        time_index = jnp.tile(jnp.arange(trained), (prompts * group, 1))
        chosen = jnp.tile(jnp.arange(group), (prompts, 1))
        advantage = jax.random.normal(jax.random.key(2), (prompts, group))
        examples = make_examples(trajectory, schedule, cond, advantage, chosen, time_index, updates=1,
                                 microbatch=prompts * group)
        tx = optax.adamw(1e-3)
        state = init_state(trainable, tx=tx, with_ema=False, rules=policy.sharding)
        state, first = update(policy, tx, Objective(), state, frozen, {}, examples, 0)
        _, second = update(policy, tx, Objective(), state, frozen, {}, examples, 0)
    assert float(jnp.abs(trajectory.log_probs[:trained]).min()) > 0
    for bound in ("min", "max"):
        assert abs(float(first[f"rollout_ratio/{bound}"]) - 1) <= 1e-6
    # and it is no constant: one update moves it
    assert np.ptp([float(second["rollout_ratio/min"]), float(second["rollout_ratio/max"])]) > 1e-6
