"""Tools of the project beside its tests: checks, site, notebooks, release."""
