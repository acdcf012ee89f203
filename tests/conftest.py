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
    """Modules with `OPTIMISED = True` compile as users do: how values round is what they test."""
    little = not getattr(request.module, "OPTIMISED", False)
    if little != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", little)
