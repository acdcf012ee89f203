"""The device's part of an iteration takes device arrays and moves nothing between host and device by the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sharding
from dancegrpo_jax.algorithms.grpo import GRPO
from dancegrpo_jax.learner import Learner, init_state, make_batch, update
from dancegrpo_jax.rollout import rollout
from tests.toy import GROUP, MESHES, PROMPTS, SCHEDULE, TOY


def test_no_implicit_transfers():
    mesh = sharding.make_mesh(*MESHES[1])
    learner = Learner(TOY, TOY.kernel, GRPO(timestep_fraction=1.0), optax.adamw(1e-3), ema_decay=0.9)
    with jax.set_mesh(mesh):
        trainable, frozen = sharding.place_params(TOY.init(), mesh)
        state = init_state(learner, trainable, {})
        cond = sharding.shard_batch(TOY.cond(PROMPTS), mesh)
        scores = {"r": (np.random.default_rng(0).random((PROMPTS, GROUP), np.float32), np.ones((PROMPTS, GROUP), bool))}
        scores, numbers, index, on_policy, plan = sharding.replicate(
            (scores, np.arange(PROMPTS), np.int32(0), np.bool_(True), SCHEDULE), mesh)
        keys = list(jax.random.split(jax.random.key(0)))
        for key in keys:
            with jax.transfer_guard("disallow"):
                trajectory = rollout(TOY, TOY.kernel, state.trainable, frozen, cond, key, plan, group_size=GROUP)
                batch, _, _ = make_batch(learner.algorithm, key, trajectory, plan, scores, numbers, {}, cond,
                                         weights=(("r", 1.0),), updates=1, microbatch=16)
                state, metrics = update(learner, state, frozen, {}, batch, index, key, on_policy)
        assert int(state.step) == 2 and jnp.isfinite(metrics["loss"])
        with pytest.raises(Exception, match="Disallowed host-to-device"), jax.transfer_guard("disallow"):
            rollout(TOY, TOY.kernel, state.trainable, frozen, cond, keys[0], SCHEDULE, group_size=GROUP)  # left on the host
