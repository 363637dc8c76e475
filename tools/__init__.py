"""What the project is checked with, beside its tests."""
