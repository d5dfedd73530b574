"""One regime for all tests: shapes checked, rank promotion an error, eight CPU devices."""

import os

# Compiling is most of the tests' time, and LLVM's optimisations are most of compiling.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("pae_jax", "beartype.beartype")


@pytest.fixture
def float64():
    """Runs a test in double precision, where an oracle needs it."""
    with jax.enable_x64(True):
        yield
