"""Label-smoothed cross-entropy for PyTorch.

Public are the names below, `lsce_torch.metrics` and `lsce_torch.trainers`. All other modules are internal and may
change in any release.
"""

from typing import TYPE_CHECKING

from lsce_spec.extras import require

require("lsce_torch", "torch", "torch")

import lsce_torch.dtensors  # makes the losses take DTensors
from lsce_spec import Convention as Convention
from lsce_spec import Explanation as Explanation
from lsce_spec import convert_smoothing as convert_smoothing
from lsce_spec import identify_loss as identify_loss
from lsce_spec import identify_targets as identify_targets
from lsce_spec import smoothing_weights as smoothing_weights
from lsce_spec.public import hide_internals
from lsce_torch.denominators import mean_denominator as mean_denominator
from lsce_torch.drop_in import cross_entropy as cross_entropy
from lsce_torch.functional import explain as explain
from lsce_torch.functional import label_smoothed_cross_entropy as label_smoothed_cross_entropy
from lsce_torch.functional import label_smoothed_cross_entropy_with_stats as label_smoothed_cross_entropy_with_stats
from lsce_torch.linear import linear_label_smoothed_cross_entropy as linear_label_smoothed_cross_entropy
from lsce_torch.linear import (
    linear_label_smoothed_cross_entropy_with_stats as linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.modules import CELossWithLabelSmoothing as CELossWithLabelSmoothing
from lsce_torch.modules import LabelSmoothedCrossEntropyLoss as LabelSmoothedCrossEntropyLoss
from lsce_torch.modules import LinearLabelSmoothedCrossEntropyLoss as LinearLabelSmoothedCrossEntropyLoss
from lsce_torch.smoothing import add_smoothing as add_smoothing
from lsce_torch.smoothing import linear_add_smoothing as linear_add_smoothing
from lsce_torch.stats import LossStats as LossStats
from lsce_torch.vocab_parallel import (
    vocab_parallel_label_smoothed_cross_entropy as vocab_parallel_label_smoothed_cross_entropy,
)
from lsce_torch.vocab_parallel import (
    vocab_parallel_label_smoothed_cross_entropy_with_stats as vocab_parallel_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.vocab_parallel import (
    vocab_parallel_linear_label_smoothed_cross_entropy as vocab_parallel_linear_label_smoothed_cross_entropy,
)
from lsce_torch.vocab_parallel import (
    vocab_parallel_linear_label_smoothed_cross_entropy_with_stats as vocab_parallel_linear_label_smoothed_cross_entropy_with_stats,  # noqa: E501
)

__all__ = [
    "CELossWithLabelSmoothing",
    "Convention",
    "Explanation",
    "LabelSmoothedCrossEntropyLoss",
    "LinearLabelSmoothedCrossEntropyLoss",
    "LossStats",
    "add_smoothing",
    "convert_smoothing",
    "cross_entropy",
    "explain",
    "identify_loss",
    "identify_targets",
    "label_smoothed_cross_entropy",
    "label_smoothed_cross_entropy_with_stats",
    "linear_add_smoothing",
    "linear_label_smoothed_cross_entropy",
    "linear_label_smoothed_cross_entropy_with_stats",
    "mean_denominator",
    "smoothing_weights",
    "vocab_parallel_label_smoothed_cross_entropy",
    "vocab_parallel_label_smoothed_cross_entropy_with_stats",
    "vocab_parallel_linear_label_smoothed_cross_entropy",
    "vocab_parallel_linear_label_smoothed_cross_entropy_with_stats",
]
lsce_torch.errors.refuse_script(globals()[name] for name in __all__)
__version__: str
if not TYPE_CHECKING:  # a type checker would take any name for one of the package
    __getattr__, __dir__ = hide_internals(__name__, __all__)
