"""One test for both packages: calls with NumPy arrays, which are converted, and what both raise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch

PACKAGES = {"jax": lsce_jax, "torch": lsce_torch}
# The kernels of each package, which only its own messages name.
KERNELS = (", 'triton'", ", 'pallas'")


def to_torch(value: Any) -> Any:
    """Return an array as a tensor, and anything else as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def raised(call: Callable[[], Any]) -> Exception:
    """Return what a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the type is what the callers compare
        call()
    return caught.value


def both_raise(call: Callable[..., Any], *operands: Any, **options: Any) -> list[Exception]:
    """Return what `call(package, *operands, **options)` raises for JAX and for torch, whose types are the same."""
    converted = {name: to_torch(value) for name, value in options.items()}
    problems = [
        raised(lambda: call(lsce_jax, *operands, **options)),
        raised(lambda: call(lsce_torch, *map(to_torch, operands), **converted)),
    ]
    assert type(problems[0]) is type(problems[1]), problems
    return problems


def without_kernels(problem: Exception) -> str:
    """Return the text without what differs: kernels, and int64, which JAX without x64 holds as int32."""
    text = str(problem).replace("int32", "int64")
    for name in KERNELS:
        text = text.replace(name, "")
    return text
