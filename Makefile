# Every target sets itself up: the first run makes .venv and installs what constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
PARITY := .venv-parity/bin
TPU := .venv-tpu/bin
CONSTRAIN := $(if $(shell $(PYTHON) -c 'import sys; print("y" if sys.version_info[:2] == (3, 11) else "")'),-c constraints.txt)

.PHONY: demo test test-slow test-parity test-fault-rows test-faults plans audit format clean

demo: .venv/ready
	$(BIN)/python -m sft_jax.cli.demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not parity"

test-slow: .venv/ready .venv-parity/ready
	$(BIN)/python -m pytest -q -m "slow and not parity"
	$(PARITY)/python -m pytest -q -m "slow and parity"

test-parity: .venv-parity/ready
	$(PARITY)/python -m pytest -q -m "parity and not slow"

# One after the other, alone: their processes take both of two cores
test-fault-rows: .venv/ready
	$(BIN)/python -m pytest -q -m fault_row

# Trials of a row of docs/reliability.md until there are N, such as make test-faults ROW=flip N=2000
test-faults: .venv/ready
	$(BIN)/python tests/faults/count.py $(ROW) $(N)

# Known holes in what constraints.txt pins; asks the network.
audit: .venv/ready
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --no-deps --disable-pip -r constraints.txt

# The table of docs/scaling.md, with the TPU compiler, which needs no TPU. Minutes a case; what is current is left
plans: .venv-tpu/ready
	$(TPU)/python benchmarks/plans.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-parity .venv-tpu build runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAIN) -e '.[test]'
	touch $@

# Not what constraints.txt pins, but the newest jax and libtpu that this Python gets.
.venv-tpu/ready: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	$(TPU)/python -m pip install --quiet -e '.[tpu]'
	touch $@

# torch first, alone: whatever depends on it then takes this build.
.venv-parity/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install --quiet torch==2.13.0
	$(PARITY)/python -m pip install --quiet $(CONSTRAIN) transformers==5.23.0 peft==0.21.2 qwix==0.1.8 -e '.[test]'
	touch $@
