"""Time and memory of the losses, side by side with their peers: `python -m benchmarks --help`."""
