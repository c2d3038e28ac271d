# Each target makes its own environment; a fresh clone needs nothing installed by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0 "triton==3.7.*"
	$(BIN)/pip install -q -e ".[test,report]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/mfa-kernels demo --out demo

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-disable-gc --benchmark-columns=median,rounds --benchmark-sort=name

clean:
	rm -rf $(VENV) demo
