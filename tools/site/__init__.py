"""The site, which `make docs` builds from README, docs, notebooks, examples and docstrings, and checks."""
