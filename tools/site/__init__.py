"""The documentation's site: `make docs` builds it from README, docs, notebooks, examples and docstrings, and checks it."""
