"""The true values of losses and gradients, and bounds on how far rounding may move a result from them."""
