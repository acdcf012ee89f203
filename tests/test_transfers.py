"""The device's part of an iteration takes device arrays and moves nothing between host and device by the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax import sharding
from dancegrpo_jax.rollout import rollout
from dancegrpo_jax.update import Objective, init_state, make_examples, update
from tests.toy import GROUP, MESHES, POLICY, PROMPTS, SCHEDULE, STEPS


def test_no_implicit_transfers():
    mesh = sharding.make_mesh(*MESHES[1])
    tx, objective = optax.adamw(1e-3), Objective(ema_decay=0.9)
    with jax.set_mesh(mesh):
        trainable, frozen = sharding.place_params(POLICY.init(), mesh, POLICY.sharding)
        state = init_state(trainable, tx=tx, with_ema=True, rules=POLICY.sharding)
        cond = sharding.shard_batch(POLICY.cond(PROMPTS), mesh)
        advantage, chosen, time_index, index, plan = sharding.replicate(
            (np.ones((PROMPTS, GROUP), np.float32), np.tile(np.arange(GROUP), (PROMPTS, 1)),
             np.tile(np.arange(STEPS - 1), (PROMPTS * GROUP, 1)), np.int32(0), SCHEDULE), mesh)
        keys = list(jax.random.split(jax.random.key(0)))
        for key in keys:
            with jax.transfer_guard("disallow"):
                trajectory = rollout(POLICY, state.trainable, frozen, cond, key, plan, group_size=GROUP)
                examples = make_examples(trajectory, plan, cond, advantage, chosen, time_index, updates=1, microbatch=16)
                state, metrics = update(POLICY, tx, objective, state, frozen, {}, examples, index)
        assert int(state.step) == 2 and jnp.isfinite(metrics["loss"])
        with pytest.raises(Exception, match="Disallowed host-to-device"), jax.transfer_guard("disallow"):
            rollout(POLICY, state.trainable, frozen, cond, keys[0], SCHEDULE, group_size=GROUP)  # a schedule left on the host
