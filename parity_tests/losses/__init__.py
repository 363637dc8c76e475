"""Anything callable as a loss on NumPy arrays."""
