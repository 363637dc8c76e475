"""Fixtures that several files of tests share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.fixture(scope="session")
def assert_derivatives() -> Callable[..., None]:
    """Return a function that holds the derivatives of a JAX function against central differences, in float64.

    It checks forward mode, reverse mode, and all four second derivatives that they make, along random directions. With
    a step of 1e-4 the differences have errors of about 1e-8; the tolerance allows for these. Everything is one program,
    since compiling takes nearly all the time.
    """

    def assert_derivatives(function: Callable[..., Any], *primals: Any, step: float = 1e-4) -> None:
        random = np.random.default_rng(0)

        def draw(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: random.normal(size=leaf.shape), tree)

        def inner(ones: Any, others: Any) -> Any:
            pairs = zip(jax.tree.leaves(ones), jax.tree.leaves(others), strict=True)
            return sum(jnp.vdot(one, other) for one, other in pairs)

        cotangent = draw(jax.eval_shape(function, *primals))
        directions = draw(primals), draw(primals)

        def value(*primals: Any) -> Any:
            return jnp.vdot(cotangent, function(*primals))

        def forward(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *primals: jax.jvp(function, primals, directions[0])[1]

        def reverse(function: Callable[..., Any]) -> Callable[..., Any]:
            gradients = jax.grad(function, argnums=tuple(range(len(primals))))
            return lambda *primals: inner(gradients(*primals), directions[1])

        functions = value, forward(value), reverse(value)
        derivatives = [[mode(function) for function in functions] for mode in (forward, reverse)]
        evaluate = jax.jit(lambda *primals: jax.tree.map(lambda function: function(*primals), (functions, derivatives)))
        exact = np.asarray(evaluate(*primals)[1])
        for direction, derivative in zip(directions, exact, strict=True):
            ahead, behind = (
                np.asarray(evaluate(*jax.tree.map(lambda x, d, s=signed: x + s * d, primals, direction))[0])
                for signed in (step, -step)
            )
            assert np.all(np.abs((ahead - behind) / (2 * step) - derivative) <= 1e-7 * (1 + np.abs(derivative)))

    return assert_derivatives
