"""The strictest settings of JAX, for all tests, since a user may set them; code in Markdown pages runs as tests."""

import gc
import os

import jax
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests of more devices start a process of their own.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("LSCE_TEST_DEVICES", "2")))

# The collector would walk through the many small objects of JAX so often that it takes a fifth of the time.
gc.set_threshold(100_000, 20, 100)

# No test reads or writes the user's files.
os.environ.setdefault("LSCE_PARITY_CACHE", "off")

# It loads Triton, which not every machine has, and holds no examples.
collect_ignore = ["lsce_torch/kernels/gpu.py"]

pytest_collect_file = Sybil([PythonCodeBlockParser()], patterns=["*.md"]).pytest()


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small gain nothing from more threads, and lose a lot where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    """Keep what XLA compiles: it takes most of the time of a first run of the tests."""
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
