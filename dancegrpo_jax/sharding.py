"""Where arrays live: a mesh from the config, rules on names for parameters, the batch over (data, fsdp).

Four axes: `data` replicates parameters and splits the batch, `fsdp` splits both, `seq` splits the tokens of a sample,
`tensor` the features of parameters. The mesh is a context (`with jax.set_mesh(mesh)`), so functions constrain arrays by
axis name and are the same program on one device, where the constraints vanish.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "seq", "tensor")
BATCH = ("data", "fsdp")

# A rule: (regex on the parameter's dotted name, axes of its last dimensions). A model class has its own, `SHARDING`; these
# are shared by all models and come after them. First match wins; what does not divide is replicated.
Rules = tuple[tuple[str, tuple], ...]

# Kernels, convolutions' too, end in (in, out). Column-parallel layers split their outputs over `tensor`.
SHARED_RULES: Rules = (
    (r".*\.lora_a", ("fsdp", None)),
    (r".*\.lora_b", (None, "tensor")),
    (r".*\.kernel", ("fsdp", "tensor")),
    (r".*\.embedding", ("tensor", "fsdp")),
)


def row_parallel(*layers: str) -> Rules:
    """Rules for the layers at the end of dotted paths ("o", "net.2") that consume what column-parallel ones split.

    They split their inputs over `tensor`, so that between the two nothing travels, and their products are summed.
    """
    path = rf"(.*\.)?({'|'.join(map(re.escape, layers))})\."
    return (
        (path + "kernel", ("tensor", "fsdp")),
        # Adapters, x A B: A's inputs are split as the kernel's are, so that x stays where it is and only the few features
        # between A and B are summed. B's outputs are whole on every device of `tensor`, as the kernel's are after their sum:
        # split, they would have to be gathered, which is as much traffic again. Like all B it is not split over fsdp.
        (path + "lora_a", (("tensor", "fsdp"), None)),
        (path + "lora_b", (None, None)),
    )


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """Builds the mesh over `devices` (default: all); one axis may be -1, "the rest".

    Neighbours on an axis are neighbours in the torus, tensor's closest. Of several slices each holds an equal part of the
    `data` axis, the only one whose traffic (gradients, once an update) the network between slices is fit for.
    `config.validate` explains what is wrong with axes that do not multiply to the number of devices.

    Raises: ValueError if the data axis is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = np.arange(len(devices)).reshape(data, fsdp, seq, tensor).shape
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise ValueError(f"config.mesh.data={shape[0]}: must be a multiple of the {slices} slices; set it to {slices} or -1")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices,
                                                    allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto axes: jax 0.10 defaults to explicit ones, which break scan carries.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axes(mesh) -> dict:
    sizes = mesh.axis_sizes if hasattr(mesh, "axis_sizes") else mesh.devices.shape
    return dict(zip(mesh.axis_names, sizes, strict=True))


def _fit(spec, shape, axes) -> P:
    """Drops the axes that do not divide their dimension; `spec` may stop before the last dimension."""
    def fits(names, size):
        names = (names,) if isinstance(names, str) else names or ()
        return size % int(np.prod([axes.get(name, 1) for name in names])) == 0
    return P(*(names if fits(names, size) else None for names, size in zip(spec, shape, strict=False)))


def param_spec(name: str, shape, mesh, rules: Rules = ()) -> P:
    """The PartitionSpec of one parameter by its model's rules, then the shared ones.

    Leading axes (layers, space) are not split. A rule that has more axes than the parameter does not match it.
    """
    for pattern, spec in (*rules, *SHARED_RULES):
        if re.fullmatch(pattern, name) and len(shape) >= len(spec):
            return _fit((None,) * (len(shape) - len(spec)) + spec, shape, _axes(mesh))
    return P()


def param_shardings(tree, mesh, rules: Rules = ()):
    """NamedSharding of every leaf of a pytree that holds flat parameter dicts (parameters, optimizer state, EMA).

    A leaf's parameter name is its last dict key; leaves without one (counters) are replicated. `rules` are the model's.
    """
    def sharding(path, leaf):
        name = getattr(path[-1], "key", "") if path else ""
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh, rules))
    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract(leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of what stands for one, at a place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def place_params(tree, mesh, rules: Rules = ()):
    """Puts parameters that every process has on the mesh, by their model's rules."""
    return jax.tree.map(_put, tree, param_shardings(tree, mesh, rules))


def _put(leaf, sharding):
    """A global array of which each process supplies the parts on its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def constrain_params(tree, rules: Rules = ()):
    """Inside jit: pins parameters, gradients or a whole TrainState to the parameters' sharding, by their model's rules."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, param_shardings(tree, mesh, rules))


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
    """function(batch), an array [B, ...] from a pytree of such, `size` items per device at a time (0: all), to bound memory.

    Every slice takes equal parts of all devices; a last slice is padded. If the devices do not divide B, it is all at once.
    """
    devices = batch_devices()
    per_device, rest = divmod(len(jax.tree.leaves(batch)[0]), devices)
    if not size or rest or per_device <= size:
        return function(batch)
    slices = -(-per_device // size)

    def cut(x):
        x = x.reshape(devices, per_device, *x.shape[1:])
        x = jnp.pad(x, ((0, 0), (0, slices * size - per_device), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(devices, slices, size, *x.shape[2:]).swapaxes(0, 1).reshape(slices, devices * size, *x.shape[2:])

    y = jax.lax.map(lambda part: constrain_batch(function(constrain_batch(part))), jax.tree.map(cut, batch))
    y = y.reshape(slices, devices, size, *y.shape[2:]).swapaxes(0, 1).reshape(devices, slices * size, *y.shape[2:])
    return y[:, :per_device].reshape(devices * per_device, *y.shape[2:])


def axis_size(name: str) -> int:
    """Devices along one axis of the current mesh; 1 without a mesh."""
    return _axes(jax.sharding.get_abstract_mesh()).get(name, 1)


def constrain(x, *spec):
    """Inside jit: splits every dimension of x over the axes that `spec` names for it; None: not split.

    What does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitted = _fit(spec, x.shape, _axes(mesh))
    return jax.lax.with_sharding_constraint(x, P(*(
        P.UNCONSTRAINED if wanted and not given else given for wanted, given in zip(spec, fitted, strict=True))))


def batch_devices(mesh=None) -> int:
    """Into how many parts the batch is split on the mesh (default: the current one); 1 without a mesh."""
    axes = _axes(mesh or jax.sharding.get_abstract_mesh())
    return int(np.prod([axes.get(name, 1) for name in BATCH]))


def shard_batch(tree, mesh):
    """Puts arrays that every process has on the mesh, dimension 0 over (data, fsdp) where it divides, else replicated."""
    def put(leaf):
        return _put(leaf, NamedSharding(mesh, _fit((BATCH,), leaf.shape, _axes(mesh)) if np.ndim(leaf) else P()))
    return jax.tree.map(put, tree)


def replicate(tree, mesh):
    """Puts arrays that every process has on every device of the mesh."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P())), tree)
