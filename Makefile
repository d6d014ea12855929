# `make run` and `make test` need nothing but Python 3.11-3.13 and pip: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check format

run: .venv/installed
	$(BIN)/python jobs/multitask.py jobs/recipes/embedded.yaml

# The fast tests run beside those that start Ray, which mostly wait: one after the other takes a third longer.
test: .venv/installed
	$(BIN)/python -m pytest -m "not ray and not slow and not gpu" $(ARGS) > .venv/fast_tests.log 2>&1 & fast=$$!; \
	$(BIN)/python -m pytest -m "(ray or slow) and not gpu" $(ARGS); rest=$$?; \
	wait $$fast; fast=$$?; cat .venv/fast_tests.log; \
	test $$fast -eq 0 -a $$rest -eq 0

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
