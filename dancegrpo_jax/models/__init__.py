"""Base models as flax.nnx modules, the Policy contract, and conversion from and to safetensors folders."""
