# make demo: train, attack and certify on the embedded digits.  make test: every check.
# Both need python3.11, pip and make, and install the rest into .venv by themselves. Where the package
# index offers only CUDA builds of torch and none is wanted:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3.11
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-ray docs format clean

demo: $(VENV)/.installed
	$(BIN)/holdfast train digits

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# A sweep on a Ray cluster of two nodes on this machine; installs Ray.
test-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[ray]"
	HOLDFAST_RAY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/experiments/test_ray.py

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/build.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
