"""Eight simulated devices and exact matmuls for every test; little optimisation, since compiling is most of their time."""

import os
import sys
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def optimisation(request):
    """Little, here and in child processes, since compiling takes most of the time; modules with `OPTIMISED = True` compile as
    users do, where rounding or speed matters."""
    little = not getattr(request.module, "OPTIMISED", False)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(little))
    if little != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", little)
