"""The Pallas kernel for TPUs, and the choice between it and XLA's program of `fused.py`.

`tpu.py` has the kernel. `losses.py` has the primitives that become the kernel in a program for a TPU, and decides
which calls take it. With implementation="pallas" every call takes it that it can compute. Without an `implementation`,
it must also move fewer bytes, in fewer instructions, than XLA's program.
"""

import lsce_spec
from lsce_jax.kernels.losses import NAME as NAME
from lsce_jax.kernels.losses import NOT_A_TPU as NOT_A_TPU
from lsce_jax.kernels.losses import loss_and_stats as loss_and_stats
from lsce_jax.kernels.losses import why_passed_over as why_passed_over

# What a caller may choose.
IMPLEMENTATIONS = (*lsce_spec.IMPLEMENTATIONS, NAME)
