"""Where arrays live: a mesh from the config, path rules for parameters, the batch over (data, fsdp).

Three axes: `data` replicates parameters and splits the batch, `fsdp` splits both, `tensor` splits the features of
parameters. The mesh is a context (`with jax.set_mesh(mesh)`), so functions constrain arrays by axis name and are
the same program on one device, where the constraints vanish.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (regex on the parameter name, axes of its last dimensions). First match wins; what does not divide is replicated.
# Column-parallel layers split their outputs over `tensor`, the row-parallel ones that follow split their inputs.
RULES = (
    (r".*\.lora_a", ("fsdp", None)),
    (r".*\.lora_b", (None, "tensor")),
    (r".*(to_out\.0|to_add_out|out_proj|proj_out|net\.2|fc2|linear_2)\.kernel", ("tensor", "fsdp")),
    (r".*\.kernel", ("fsdp", "tensor")),
    (r".*\.embedding", ("tensor", "fsdp")),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """Builds the mesh over all devices; one axis may be -1, "the rest".

    `config.validate` explains what is wrong with axes that do not multiply to the number of devices.
    """
    shape = np.arange(jax.device_count()).reshape(data, fsdp, tensor).shape
    # Auto axes: jax 0.10 defaults to explicit ones, which break scan carries.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axes(mesh) -> dict:
    return dict(zip(mesh.axis_names, mesh.axis_sizes if hasattr(mesh, "axis_sizes") else mesh.devices.shape))


def _fit(spec, shape, axes) -> P:
    """Drops the axes that do not divide their dimension."""
    def fits(names, size):
        names = (names,) if isinstance(names, str) else names or ()
        return size % int(np.prod([axes.get(name, 1) for name in names])) == 0
    return P(*(names if fits(names, size) else None for names, size in zip(spec, shape)))


def param_spec(name: str, shape, mesh) -> P:
    """The PartitionSpec of one parameter by RULES; leading layer and spatial axes are not split."""
    for pattern, spec in RULES:
        if re.fullmatch(pattern, name) and len(shape) >= len(spec):
            return _fit((None,) * (len(shape) - len(spec)) + spec, shape, _axes(mesh))
    return P()


def param_shardings(tree, mesh):
    """NamedSharding of every leaf of a pytree that holds flat parameter dicts (parameters, optimizer state, EMA).

    A leaf's parameter name is its last dict key; leaves without one (counters) are replicated.
    """
    def sharding(path, leaf):
        name = getattr(path[-1], "key", "") if path else ""
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_params(tree, mesh):
    """Puts host parameters on the mesh by RULES."""
    return jax.device_put(tree, param_shardings(tree, mesh))


def constrain_params(tree):
    """Inside jit: pins parameters, gradients or a whole TrainState to the parameters' sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, param_shardings(tree, mesh))


def constrain_batch(tree, axis: int = 0):
    """Inside jit: splits dimension `axis` of every leaf over (data, fsdp); leaves that do not divide are left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    devices = batch_devices(mesh)

    def constrain(leaf):
        if leaf.shape[axis] % devices:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, P(*(None,) * axis, BATCH))
    return jax.tree.map(constrain, tree)


def map_slices(function, batch, size: int):
    """function(batch) for an array [B, ...], computed `size` items per device at a time to bound memory; 0: all at once.

    Every slice takes equal parts of all devices. B must be a multiple of the devices; a last slice is padded.
    """
    per_device, rest = divmod(batch.shape[0], batch_devices())
    if not size or rest or per_device <= size:
        return function(batch)
    devices, slices = batch_devices(), -(-per_device // size)
    x = batch.reshape(devices, per_device, *batch.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, slices * size - per_device), *((0, 0),) * (batch.ndim - 1)))
    x = x.reshape(devices, slices, size, *batch.shape[1:]).swapaxes(0, 1).reshape(slices, devices * size, *batch.shape[1:])
    y = jax.lax.map(lambda part: constrain_batch(function(constrain_batch(part))), x)
    y = y.reshape(slices, devices, size, *y.shape[2:]).swapaxes(0, 1).reshape(devices, slices * size, *y.shape[2:])
    return y[:, :per_device].reshape(batch.shape[0], *y.shape[2:])


def batch_devices(mesh=None) -> int:
    """Into how many parts the batch is split on the mesh (default: the current one); 1 without a mesh."""
    axes = _axes(mesh or jax.sharding.get_abstract_mesh())
    return int(np.prod([axes.get(name, 1) for name in BATCH]))


def shard_batch(tree, mesh):
    """Puts host arrays on the mesh, dimension 0 over (data, fsdp) where it divides, else replicated."""
    def put(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, _fit((BATCH,), leaf.shape, _axes(mesh)) if np.ndim(leaf) else P()))
    return jax.tree.map(put, tree)


def replicate(tree, mesh):
    """Puts arrays on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
