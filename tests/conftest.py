"""What the tests of the examples and of training loops share."""

import jax
import pytest
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def optax_promotion():
    """Allow what Optax does: it raises a float to the power of an int32 count, and divides a float32 by an int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def run_example():
    """Return a function that runs an example's command line in this process."""

    def run(example, *arguments):
        return CliRunner().invoke(example.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})

    return run
