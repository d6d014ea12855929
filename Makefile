# `make run` and `make test` need nothing but Python 3.11-3.13 and pip: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check format

run: .venv/installed
	$(BIN)/python jobs/multitask.py jobs/recipes/embedded.yaml

# Two processes, as many as the cores of a small machine (tests/conftest.py says what goes to which).
test: .venv/installed
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup --no-loadscope-reorder --durations 25 $(ARGS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=platform $(BIN)/lint-imports --no-logo

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
