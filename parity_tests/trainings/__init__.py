"""Comparison of two training runs."""
