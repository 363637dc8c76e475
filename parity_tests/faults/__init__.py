"""Losses that are wrong on purpose."""
