"""Label-smoothed cross-entropy for PyTorch.

Public are the names below and `lsce_torch.metrics`. All other modules are internal and may change in any release.
"""

from lsce_spec import Convention as Convention
from lsce_spec import convert_smoothing as convert_smoothing
from lsce_spec import identify_loss as identify_loss
from lsce_spec import identify_targets as identify_targets
from lsce_spec import smoothing_weights as smoothing_weights
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
