# make demo: train, attack and certify on the embedded digits.  make test: every check.
# Both need python3.11, pip and make, and install the rest into .venv by themselves: 5.3 GB on Linux, where the
# package index offers CUDA builds of torch alone, and 1.6 GB without CUDA:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3.11
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-device test-lowest test-wheel test-ray docs results format clean

demo: $(VENV)/.installed
	$(BIN)/holdfast train digits

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not device"

# What takes long: killed runs, two processes, every command of the documentation.
test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# Every family on a device that is not the CPU, and what a step of each hot loop asks of it: a device for tests over
# host memory, which g++ compiles first.
test-device: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m device tests/device

# The lowest versions that pyproject.toml promises. torch alone is that of constraints.txt: of earlier ones package
# indexes have CUDA builds only, gigabytes that no check should fetch.
test-lowest:
	rm -rf $(VENV)-lowest
	$(PYTHON) -m venv $(VENV)-lowest
	$(PYTHON) .ci/lowest.py > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -c $(VENV)-lowest/lowest.txt .
	$(call from_an_empty_folder,$(VENV)-lowest)

# The wheel, away from the checkout that it was built from.
test-wheel:
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir $(VENV)-wheel/dist .
	$(VENV)-wheel/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt $(VENV)-wheel/dist/*.whl
	$(call from_an_empty_folder,$(VENV)-wheel)

define from_an_empty_folder
mkdir $(1)/empty
cd $(1)/empty && unset PYTHONPATH && ../bin/holdfast list recipes && ../bin/holdfast train digits training.epochs=2
rm -rf $(1)
endef

# A sweep on a Ray cluster of two nodes on this machine; installs Ray.
test-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[ray]"
	HOLDFAST_RAY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/experiments/sweeps/test_ray.py

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/build.py

# Every table and figure of docs/results.md anew; ONLY=digits makes those whose name begins so. Reuses what is trained.
results: $(VENV)/.installed
	$(BIN)/python docs/results.py $(ONLY)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-wheel

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A .venv that was there before may be of an old Python, or made by uv, which puts no pip into it.
define usable
@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(VENV) is of an older Python than 3.11: make clean removes it, VENV=... names another"; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || \
	{ echo "$(VENV) has no pip, and its Python cannot install it: make clean removes it, VENV=... names another"; \
	exit 1; }
@echo "installing into $(VENV): gigabytes, and minutes, the first time"
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(usable)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(usable)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
