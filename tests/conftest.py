"""Eight simulated devices and exact matmuls for every test; little optimisation, since compiling is most of their time."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from jax._src import compiler

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Without optimisation XLA's older way to emit code for CPUs compiles two to four times as fast.
QUICK = {"xla_cpu_use_fusion_emitters": False}
get_compile_options = compiler.get_compile_options


@pytest.fixture(scope="module", autouse=True)
def optimisation(request):
    """Little, here and in child processes, since compiling takes most of the time; modules with `OPTIMISED = True` compile as
    users do, where rounding or speed matters."""
    little = not getattr(request.module, "OPTIMISED", False)
    flags = QUICK if little else {}

    def with_flags(*args, env_options_overrides=None, **kwargs):
        return get_compile_options(*args, env_options_overrides=(env_options_overrides or {}) | flags, **kwargs)

    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(little))
    os.environ["XLA_FLAGS"] = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
    compiler.get_compile_options = with_flags  # jax's configuration has no place for compiler options
    if little != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", little)
