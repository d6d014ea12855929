# `make run` and `make test` need nothing but Python 3.11-3.13 and pip: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check format

run: .venv/installed
	$(BIN)/python jobs/multitask.py jobs/recipes/embedded.yaml

# Two processes of about the same length: tests on the session's Ray, and all the others.
test: .venv/installed
	$(BIN)/python -m pytest -m "(own_cluster or not ray) and not gpu" --durations 15 $(ARGS) > .venv/other_tests.log 2>&1 & others=$$!; \
	$(BIN)/python -m pytest -m "ray and not own_cluster and not gpu" --durations 15 $(ARGS); ray=$$?; \
	wait $$others; others=$$?; cat .venv/other_tests.log; \
	test $$others -eq 0 -a $$ray -eq 0

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
