"""Cost of the loss on a TPU or GPU that is not there: compiled, counted and estimated. See docs/cost.md."""
