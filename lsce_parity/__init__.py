"""Are two losses of torch and JAX the same? `assert_same_loss` for your own tests, `save_batch` for your training loop.

The command line is `lsce-parity`. Neither framework is loaded unless a loss of it is compared.
"""

from lsce_spec.extras import require

require("lsce_parity", "parity", "numpy", "ml_dtypes", "mpmath", "safetensors", "scipy")

from parity_tests.assertions import (
    CompareOptions,
    Comparison,
    FrameworkError,
    NoVerdictError,
    SpecificationError,
    UnavailableError,
    assert_same_loss,
    compare_losses,
)
from parity_tests.truth.batches import BatchError, save_batch

__all__ = [
    "BatchError",
    "CompareOptions",
    "Comparison",
    "FrameworkError",
    "NoVerdictError",
    "SpecificationError",
    "UnavailableError",
    "assert_same_loss",
    "compare_losses",
    "save_batch",
]
