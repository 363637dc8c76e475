# Each target sets up what it needs. PYTHON is the interpreter that the virtual environments are made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What did not run on the CPU, or is claimed in the README and was not executed, fails the tests.
EVIDENCE := --parity-require=cpu --parity-claims=docs/ledger.json
# Another library whose kernels run in Triton's interpreter. In an extra it would bring torch to those who have only JAX.
PEERS := $(if $(filter Linux,$(shell uname)),'liger-kernel>=0.8.5')
# One half of the tests marked as devices.
SIMULATED := test_simulated or test_xla_passes
# What has targets of its own.
COMPILED := test_compiled or test_cost or test_scaling or test_triton
# With parity_tests, the testpaths of pyproject.toml.
REST := tests examples lsce_spec lsce_jax lsce_torch lsce_cost lsce_parity README.md docs
SELECTED ?= not slow and not devices and not distributed
# Make 3.81, which macOS has, would mix the two.
WHOLE_OUTPUT := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
# TorchTPU needs Python 3.13 or 3.14 and pins its torch. So it has an environment of its own, if there is such a Python.
PYTHON_TORCHTPU ?= $(firstword $(foreach name,python3.13 python3.14,$(shell $(name) -c $(PRINT_PATH) 2>/dev/null)))
PRINT_PATH := 'import sys; print(sys.executable)'
VENV_TORCHTPU ?= .venv-torchtpu
export LSCE_TORCHTPU_PYTHON ?= $(abspath $(VENV_TORCHTPU))/bin/python
PIP := pip install --quiet --disable-pip-version-check
# Makes the environment if need be, and says what it installs, and how far it is.
INSTALL := -m tools.install $(VENV)
CONSTRAINED := $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: install install-devices install-torchtpu demo fonts docs lint wheel clean test test-slow test-distributed
.PHONY: test-devices test-devices-slow test-oldest test-parity test-rest test-distributed-jax test-distributed-torch
.PHONY: test-simulated test-interpreted test-triton test-compiled test-cuda test-tpu bench bench-cuda bench-tpu

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) $(INSTALL) all $(CONSTRAINED)
	@touch $(VENV)/installed-demo $@

# A part of `all`. What is missing to it, the other targets add.
$(VENV)/installed-demo: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) $(INSTALL) demo $(CONSTRAINED)
	@touch $@

# Compilers for what is not here, beside the rest.
install-devices: $(VENV)/installed-devices install-torchtpu

$(VENV)/installed-devices: $(VENV)/installed
	@$(PYTHON) $(INSTALL) all,devices $(PEERS) $(CONSTRAINED)
	@$(BIN)/python -c "from parity_tests.losses.iree import IreeAdapter; IreeAdapter('tpu', 'vulkan-spirv')" 2>/dev/null \
	  || echo "Tests on a software GPU will be skipped. They need: apt-get install libvulkan1 mesa-vulkan-drivers"
	touch $@

install-torchtpu: $(if $(PYTHON_TORCHTPU),$(VENV_TORCHTPU)/installed)
ifeq ($(PYTHON_TORCHTPU),)
	@echo "TorchTPU is not installed, and its tests will be skipped: no python3.13 or python3.14; PYTHON_TORCHTPU names one"
endif

$(VENV_TORCHTPU)/installed: constraints-torchtpu.txt
	@{ $(PYTHON_TORCHTPU) -m venv $(VENV_TORCHTPU) && \
	  $(VENV_TORCHTPU)/bin/$(PIP) --requirement constraints-torchtpu.txt && touch $@; } || \
	  { rm -rf $(VENV_TORCHTPU); echo "TorchTPU cannot be installed here, and its tests will be skipped"; }

# From nothing, it installs what it needs and no more.
demo: $(VENV)/installed-demo
	$(BIN)/python -m examples.digits_parity
	@echo
	@echo "Open out/digits_parity/digits_parity.html. Next, a port that is not the same loss, and why:"
	@echo "  $(BIN)/lsce-parity compare torch:examples.torch_original_loss:label_smoothed_nll" \
	  "jax:examples.jax_ported_loss:first_try"

# Open Chinese fonts for examples/characters, into out/fonts: web fonts by `npm pack`, the others by `apt-get download`
# where there is Debian or Ubuntu, without root and without installing them (docs/hanzi.md).
fonts: install
	$(BIN)/python -m examples.characters.fonts

# In two halves, side by side where there are two cores. Each shows what it found when it is through.
test: install
	$(MAKE) --jobs=2 $(WHOLE_OUTPUT) test-parity test-rest

# The tests marked as slow, which `make test` leaves out.
test-slow: install
	$(MAKE) --jobs=2 $(WHOLE_OUTPUT) test-parity test-rest SELECTED="slow and not devices" EVIDENCE=

# The tests marked as distributed: losses whose classes and rows are divided over processes and virtual devices in many
# more ways than in `make test`. In two halves, too.
test-distributed: install
	$(MAKE) --jobs=2 $(WHOLE_OUTPUT) test-distributed-jax test-distributed-torch

OF_TORCH := torch or dtensor

test-distributed-jax: install
	$(BIN)/python -m pytest -m "distributed" -k "not ($(OF_TORCH))" parity_tests $(REST)

test-distributed-torch: install
	$(BIN)/python -m pytest -m "distributed" -k "$(OF_TORCH)" parity_tests $(REST)

# The tests marked as devices: losses on the arithmetic of devices that are not here, and programs that are made for
# them, in an interpreter, by IREE and by the compilers of TPUs and GPUs. No device is needed.
test-devices: install-devices
	$(MAKE) --jobs=2 $(WHOLE_OUTPUT) test-simulated test-interpreted \
	  $(if $(filter Linux,$(shell uname)),test-triton test-compiled)

test-simulated: install-devices
	$(BIN)/python -m pytest -m "devices and not slow" -k "$(SIMULATED)" parity_tests

test-interpreted: install-devices
	$(BIN)/python -m pytest -m "devices and not slow" -k "not ($(SIMULATED) or $(COMPILED))" parity_tests

# Triton's kernels in its interpreter, which is chosen for a whole process, and compiled for GPUs.
test-triton: install-devices
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "devices and not slow" parity_tests/suite/test_triton.py
	$(BIN)/python -m pytest -m "devices and not slow" parity_tests/suite/test_triton_compiled.py

# Programs compiled for TPUs and GPUs. libtpu and JAX's plugin for CUDA, 1.2 GB, have a folder of their own: they look for
# a device in each program that uses JAX. Where it finds none, the plugin prints a traceback, and libtpu leaves a timer
# that may end the process.
COMPILERS := $(abspath $(VENV))/compilers
WITH_COMPILERS := PYTHONPATH=$(COMPILERS)$(if $(PYTHONPATH),:$(PYTHONPATH))

test-compiled: $(COMPILERS)/installed
	$(WITH_COMPILERS) $(BIN)/python -m pytest -m "devices and not slow" parity_tests/suite/test_compiled.py \
	  parity_tests/suite/test_compiled_kernels.py parity_tests/suite/test_cost.py parity_tests/suite/test_scaling.py

# More of the same, which takes long: every case in every dtype.
test-devices-slow: install-devices $(COMPILERS)/installed
	$(WITH_COMPILERS) $(BIN)/python -m pytest -m "devices and slow" parity_tests

# The versions that the installed JAX was made with.
$(COMPILERS)/installed: $(VENV)/installed
	$(BIN)/$(PIP) --no-deps --upgrade --target $(COMPILERS) $$($(BIN)/python -c "$(REQUIRED)")
	touch $@

REQUIRED := from importlib.metadata import requires, version; \
  print(*(line.partition(';')[0].strip() for line in requires('jax') if line.startswith('libtpu')), \
  *('jax-cuda12-%s==%s' % (part, version('jax')) for part in ('plugin', 'pjrt')))

test-parity: install
	$(BIN)/python -m pytest -m "$(SELECTED)" $(EVIDENCE) parity_tests

test-rest: install
	$(BIN)/python -m pytest -m "$(SELECTED)" $(REST)

# On a machine with the device: runs everything there, and writes a kit that others can check (docs/devices.md).
# JAX_EXTRA=cuda12 is for older drivers.
test-cuda bench-cuda: JAX_EXTRA ?= cuda13
test-tpu bench-tpu: JAX_EXTRA ?= tpu

test-cuda test-tpu: test-%: install
	$(BIN)/$(PIP) 'jax[$(JAX_EXTRA)]'
	$(BIN)/python -m parity_tests kit out/kit-$* --device $* --force

# Ours and all that a user would take instead, on this CPU, into docs/benchmarks.md. Libraries that would change the
# versions of others get thin environments in out/bench-envs, which are kept. Leave the machine alone meanwhile.
bench: install
	$(BIN)/python -m benchmarks all --write $(BENCH_OPTIONS)

# On a machine with the device: ours and other libraries' losses, checked and timed (docs/gpu.md, docs/tpu.md). Looks for
# the device before it installs anything.
bench-cuda bench-tpu: bench-%:
	@$(PYTHON) -m benchmarks.present $*
	$(MAKE) install
	$(BIN)/$(PIP) 'jax[$(JAX_EXTRA)]'
	$(BIN)/python -m benchmarks device $* --install --write $(BENCH_OPTIONS)

# All tests with the lowest versions that pyproject.toml admits.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	$(MAKE) test-slow VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	$(MAKE) test-distributed VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	$(MAKE) test-devices VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Style, complexity, types, which package imports which (pyproject.toml), dependencies, spelling.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .
	$(BIN)/codespell $$(git ls-files '*.py' '*.md' '*.toml' '*.yml' '*.jinja' Makefile)

# The code of all pages and docstrings runs as tests, then the site is made from them: out/site/html/index.html. Every
# warning is an error, and every link, anchor and public name is checked. LINKS=external looks up the addresses of other
# sites, too, which needs a network.
docs: $(VENV)/installed-docs
	$(BIN)/python -m pytest README.md docs lsce_spec lsce_jax lsce_torch lsce_cost lsce_parity
	$(BIN)/python -m tools.site $(if $(LINKS),--$(LINKS))

$(VENV)/installed-docs: $(VENV)/installed
	@$(PYTHON) $(INSTALL) all,docs $(CONSTRAINED)
	touch $@

# Into dist/, the wheel from the sdist. Then each extra alone, in an environment of its own: up to 7 GB at a time where
# torch is the one for CUDA, 2 GB where it is the one for CPUs. EXTRAS="--extra jax --extra torch" checks these only.
wheel: install
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m tools.check_wheel dist $(EXTRAS)

clean:
	rm -rf $(VENV) $(VENV_TORCHTPU) .venv-oldest out dist
