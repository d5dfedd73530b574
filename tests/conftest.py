"""Settings of all tests: shapes are checked, rank promotion is an error, eight CPU devices."""

import atexit
import logging
import os
import tempfile

# Compiling is most of the tests' time, and LLVM's optimisations are most of compiling.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax
import pytest
from jaxtyping import install_import_hook

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("pae_jax", "beartype.beartype")

# The user's own cache is neither read nor filled.
_cache = tempfile.TemporaryDirectory(prefix="pae_tests_")
atexit.register(_cache.cleanup)
os.environ["PAE_CACHE"] = _cache.name

import runs  # noqa: E402 - after the hook, because it imports pae_jax


@pytest.fixture
def float64():
    """Runs a test in double precision, which some oracles need."""
    with enable_x64(True):
        yield


@pytest.fixture
def messages():
    """The messages that the package logs during a test.

    Unlike caplog it does not depend on whether the command line ran before in this process and
    ended the propagation to the root logger.
    """
    logger, lines = logging.getLogger("pae_jax"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Compiles each program once per session; `runs.environment` passes it to other processes."""
    from jax.experimental.compilation_cache import compilation_cache as cache

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    cache.reset_cache()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, compilation_cache) -> runs.Run:
    """A finished run that tests must not change; a test that would change it uses `runs.clone`."""
    from pae_jax import train

    root = runs.make_folder(tmp_path_factory.mktemp("images"))
    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = train.train_and_evaluate(runs.load_config(root), workdir)
    assert result.outcome == train.FINISHED
    return runs.Run(root, workdir)
