# What a contributor does here. `make help` lists it.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n auto
EXTRAS := daytona-sdk,docker,litellm,mini-swe-agent,pydantic-ai

.DEFAULT_GOAL := help
.PHONY: help install install-all demo test test-all cov check format diagrams bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.core ## a .venv with the package and what its fast tests need

install-all: .venv/.all ## the same with every extra that the tests use

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --editable . --group dev
	@touch $@

.venv/.all: .venv/.core
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --editable '.[$(EXTRAS)]' --group dev
	@touch $@

demo: install ## both transports solve the demo task, isolated, metered, verified and drawn
	$(BIN)/python -m orchestrator.demo

test: install ## everything that needs no further download: a few minutes on two cores
	$(PYTEST) -m 'not agents and not daytona and not hosts and not litellm and not slow'

test-all: install-all ## everything; ROLLOUT_REQUIRE=agents makes a missing real agent a failure
	$(PYTEST)

cov: install ## branch coverage of the machine and its handlers, which is 100 %
	$(PYTEST) -m 'not agents and not daytona and not hosts and not litellm and not slow' --cov=states --cov-branch --cov-report=term-missing --cov-fail-under=100

check: install ## format, lint, strict types, diagrams as the table draws them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m orchestrator.diagram --check diagrams

format: install ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

diagrams: install ## draw diagrams/ from the table
	$(BIN)/python -m orchestrator.diagram --write diagrams

bench: install ## measure, compare with a floor or a peer, and fail on a miss
	$(BIN)/python tests/bench/run.py

clean: ## forget what was built and run
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
