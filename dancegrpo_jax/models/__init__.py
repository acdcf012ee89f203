"""Networks as flax.nnx modules, and conversion from and to safetensors folders."""
