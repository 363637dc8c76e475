"""lsce_torch on tensors that JAX computes, through torchax: on any device that JAX finds.

torchax has torch's operations in JAX, and `call_torch` lets JAX trace, differentiate and compile a torch function.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lsce_spec.extras import install
from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.truth.arithmetic import NARROW
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult


class TorchaxAdapter(JaxAdapter):
    """A `JaxAdapter` of a loss of lsce_torch.

    Args:
        options: as in `JaxAdapter`. `narrow` does not matter: all logits are computed at once, by "reference", which
            writes into nothing that torchax gives it.

    Raises:
        UnavailableError: JAX, torch or torchax, or the device, is not there, or torchax does not fit this torch.
    """

    def __init__(self, **options: Any) -> None:
        """Load torchax."""
        self.interop = load_interop()
        super().__init__(**{**options, "narrow": NARROW})
        self.torch_loss, self.loss = self.loss, self._call

    def _load_package(self) -> Any:
        return importlib.import_module("lsce_torch")

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss or torchax cannot handle a case, or None."""
        if isinstance(case, LinearCase) and case.bias is not None and case.dtype in ("bfloat16", "float16"):
            return f"has a bias, whose gradient torchax adds up in {case.dtype}"
        return super().unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        with default_promotion():
            return super().__call__(case)

    def _call(self, *leaves: Any, **options: Any) -> Any:
        if self.linear:
            hidden, weight = leaves
            leaves = hidden, weight.T  # JAX has the features first
        with warnings.catch_warnings():
            # torch's int64 is JAX's int32, which holds every label.
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            return self.interop.call_torch(self.torch_loss, *leaves, **options)


@contextmanager
def default_promotion() -> Iterator[None]:
    """Let JAX promote dtypes and ranks, as others rely on, even if the user has forbidden that."""
    jax = importlib.import_module("jax")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load_interop() -> Any:
    """Return torchax.interop.

    Raises:
        UnavailableError: torchax is not there, or does not fit this torch.
    """
    try:
        return importlib.import_module("torchax.interop")
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed. Run: {install('jax,torch', also='torchax')}") from error
    except Exception as error:
        raise UnavailableError(
            f"torchax cannot be imported ({error}). torchax 0.0.13 works with torch 2.12, builds of 0.0.14 with torch "
            "2.13. Run: pip install 'torch<2.13', or pip install --pre --upgrade torchax"
        ) from error
