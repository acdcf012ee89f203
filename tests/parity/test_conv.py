"""Convolutions over one, two and three spatial axes against PyTorch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dancegrpo_jax.models.files.convert import from_torch as load
from dancegrpo_jax.models.layers import Conv, merge, split

torch = pytest.importorskip("torch")

from against_torch import assert_close, from_torch, to_torch  # noqa: E402 (it needs torch)

CASES = {  # spatial size, kernel_size, stride, padding
    "1-D": ((11,), (3,), 1, 1),
    "1-D, causal": ((9,), (4,), (1,), ((3, 0),)),
    "1-D, stride 3": ((11,), (5,), 3, ((0, 2),)),
    "2-D": ((7, 10), 3, 1, 1),
    "2-D, more than the kernel": ((5, 6), (2, 3), 1, ((3, 0), (1, 4))),
    "2-D, stride 2, bottom and right": ((8, 10), 3, 2, ((0, 1), (0, 1))),
    "3-D": ((4, 5, 6), (3,) * 3, 1, 1),
    "3-D, causal in time": ((4, 5, 6), (3, 1, 2), 1, ((2, 0), (0, 0), (0, 1))),
    "3-D, strides": ((5, 8, 6), (3, 2, 3), (1, 2, 3), ((2, 0), (0, 0), (1, 1))),
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("spatial", "size", "stride", "padding"), CASES.values(), ids=CASES.keys())
def test_values_and_gradients(spatial, size, stride, padding, use_bias):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    graphdef, abstract = split(nnx.eval_shape(lambda: Conv(
        4, 6, size, stride=stride, padding=padding, use_bias=use_bias, rngs=nnx.Rngs(0))))
    torch_conv = getattr(torch.nn, f"Conv{len(spatial)}d")(4, 6, size, stride, bias=use_bias)
    params = load({name: p.detach().numpy() for name, p in torch_conv.named_parameters()}, abstract)
    pairs = ((padding, padding),) * len(spatial) if isinstance(padding, int) else padding

    x = rng.standard_normal((2, *spatial, 4), dtype=np.float32)
    theirs_x = to_torch(x).requires_grad_()
    theirs = torch_conv(torch.nn.functional.pad(theirs_x, [n for pair in reversed(pairs) for n in pair]))
    cotangent = rng.standard_normal(from_torch(theirs).shape, dtype=np.float32)
    (theirs * to_torch(cotangent)).sum().backward()

    @jax.jit
    def run(params, x):
        y, back = jax.vjp(lambda params, x: merge(graphdef, params)(x), params, x)
        return y, *back(jnp.asarray(cotangent))

    ours, grads, ours_x = run(params, x)
    assert_close(ours, from_torch(theirs))
    assert_close(ours_x, from_torch(theirs_x.grad))
    assert_close(np.moveaxis(grads["kernel"], (-1, -2), (0, 1)), torch_conv.weight.grad.numpy())
    if use_bias:
        assert_close(grads["bias"], torch_conv.bias.grad.numpy())


@pytest.mark.parametrize("wrong", [{"kernel_size": (3,) * 4}, {"kernel_size": (3,), "stride": (1, 1)},
                                   {"kernel_size": 3, "padding": ((1, 1),)}])
def test_axes_that_do_not_agree(wrong):
    with pytest.raises(ValueError, match="must agree in their number of axes, at most three"):
        Conv(4, 6, **wrong, rngs=nnx.Rngs(0))
