"""Scripts to read from top to bottom, and to run with `python -m examples.NAME`."""
