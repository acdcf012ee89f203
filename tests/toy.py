"""Two tiny pipelines with the attributes that the core uses of `pipelines.base.Pipeline`, and small meshes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from dancegrpo_jax import sde, sharding
from dancegrpo_jax.guidance import Cond
from dancegrpo_jax.sde import Kernel
from tests import oracle


class Toy:
    """What both have; `kernel` is what tests sample them with."""

    guidance_scale, fps, sharding = 1.0, 0.0, ()

    def __init__(self, kernel, prediction, eta, latent_shape):
        self.kernel, self.prediction, self.latent_shape = Kernel(kernel, eta), prediction, latent_shape

    def denoise(self, params, x, time, cond):
        return self.predict(params.get("net"), x, time, cond)


class GaussianPipeline(Toy):
    """The exact denoiser of data x0 ~ N(cond["mean"], cond["std"]^2), both [B, *latent_shape]; it has no parameters."""

    def __init__(self, kernel, prediction, eta, schedule, latent_shape):
        super().__init__(kernel, prediction, eta, latent_shape)
        self.times, self.sigmas = np.asarray(schedule.times), np.asarray(schedule.sigmas, np.float64)[:-1]

    def predict(self, params, x, time, cond):
        step = jnp.abs(time[:, None] - self.times).argmin(1)
        column = (-1, *(1,) * len(self.latent_shape))
        sigma = jnp.asarray(self.sigmas, jnp.float32)[step].reshape(column)
        alpha = jnp.asarray(oracle.signal(self.prediction, self.sigmas), jnp.float32)[step].reshape(column)
        return oracle.gaussian_output(self.prediction, x, sigma, alpha, cond["mean"], cond["std"])


class MLPPipeline(Toy):
    """A two-layer network on [x, time features, cond["text"]]; its parameter names match the sharding rules."""

    text, hidden = 5, 32
    latent_shape = (2, 2, 3)
    sharding = sharding.row_parallel("fc2")

    def __init__(self, kernel="dance", prediction="velocity", eta=0.3):
        super().__init__(kernel, prediction, eta, self.latent_shape)

    def init(self, seed=0, dtype=np.float32):
        """(trainable, frozen): host arrays."""
        rng = np.random.default_rng(seed)
        size = int(np.prod(self.latent_shape))
        shapes = {"fc1.kernel": (size + 3 + self.text, self.hidden), "fc1.bias": (self.hidden,),
                  "fc2.kernel": (self.hidden, size), "fc2.bias": (size,)}
        trainable = {name: (rng.standard_normal(shape) / shape[0]**0.5).astype(dtype) for name, shape in shapes.items()}
        return {"net": trainable}, {"net": {"scale": np.asarray(0.9, dtype)}}

    def cond(self, prompts, seed=0):
        return Cond({"text": np.random.default_rng(seed).standard_normal((prompts, self.text), dtype=np.float32)})

    def predict(self, params, x, time, cond):
        xp = np if isinstance(x, np.ndarray) else jnp
        t = time[:, None] / 1000
        inputs = xp.concatenate([x.reshape(len(x), -1), t, xp.sin(9 * t), xp.cos(9 * t), cond["text"]], axis=1)
        hidden = xp.tanh(inputs @ params["fc1.kernel"] + params["fc1.bias"])
        return (params["scale"] * (hidden @ params["fc2.kernel"] + params["fc2.bias"])).reshape(x.shape)


def joined(trainable, frozen):
    """All parameters of the toy's network."""
    return trainable["net"] | frozen["net"]


# One pipeline, one size of rollout and the same meshes for all tests, so that they compile once.
PROMPTS, GROUP, STEPS = 4, 4, 6
TOY = MLPPipeline()
SCHEDULE = sde.flow_schedule(STEPS, 3.0)
MESHES = [None, (8, 1), (2, 4)]  # (data, fsdp); None: one device


def on_mesh(shape):
    """The mesh as a context; without a shape a context that does nothing."""
    return jax.set_mesh(sharding.make_mesh(*shape)) if shape else contextlib.nullcontext()


def placed(toy, mesh):
    """(trainable, frozen), on the mesh if there is one."""
    params = toy.init()
    return sharding.place_params(params, sharding.make_mesh(*mesh), toy.sharding) if mesh else params
