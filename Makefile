# `make run` and `make test` need nothing but Python 3.11-3.13 and pip: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check format

run: .venv/installed
	$(BIN)/python jobs/multitask.py jobs/recipes/embedded.yaml

# Three processes of about the same length: tests on the session's Ray and of compiled layers, those that start long jobs, and
# all the others. They wait a lot; three keep two cores busy.
TESTS := $(BIN)/python -m pytest --durations 15 $(ARGS)
test: .venv/installed
	$(TESTS) -m "own_processes and not gpu" > .venv/own_processes.log 2>&1 & own=$$!; \
	$(TESTS) -m "not own_processes and not ray and not compiled and not gpu" > .venv/without_ray.log 2>&1 & without=$$!; \
	$(TESTS) -m "(ray or compiled) and not own_processes and not gpu"; ray=$$?; \
	wait $$own; own=$$?; wait $$without; without=$$?; \
	cat .venv/own_processes.log .venv/without_ray.log; \
	test $$ray -eq 0 -a $$own -eq 0 -a $$without -eq 0

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
