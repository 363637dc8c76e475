"""What the loss costs on a TPU or GPU that is not there: compiled, counted and estimated. See docs/cost.md."""

from lsce_jax.aot.compilers import CompilerEndedError as CompilerEndedError
from lsce_jax.aot.cost import CompilerMissingError as CompilerMissingError
from lsce_jax.aot.cost import Cost as Cost
from lsce_jax.aot.cost import Request as Request
from lsce_jax.aot.cost import measure as measure
from lsce_jax.aot.cost import measure_all as measure_all
from lsce_jax.aot.roofline import Roofline as Roofline
from lsce_jax.aot.roofline import roofline as roofline
