# Each target sets up what it needs. PYTHON is the interpreter that the virtual environments are made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What did not run on the CPU, or is claimed in the README and was not executed, fails the tests.
EVIDENCE := --parity-require=cpu --parity-claims=docs/ledger.json
PIP := pip install --quiet --disable-pip-version-check

.PHONY: install demo test test-oldest lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --editable '.[all]'
	touch $@

demo: install
	$(BIN)/python -m examples.digits_parity

test: install
	$(BIN)/python -m pytest $(EVIDENCE)

# The same tests with the lowest versions that pyproject.toml admits.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(EVIDENCE)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/$(PIP) --editable '.[all]' --constraint constraints-oldest.txt
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest out dist
