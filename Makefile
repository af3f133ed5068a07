# Everything runs in an environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench bench-against bench-compare performance breadth format clean

demo: $(VENV)/demo
	$(BIN)/layertap demo --out demo-out

test: $(VENV)/dev
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NAME=results/cpu-2-cores keeps the results where docs/performance.md is written from.
NAME ?= latest
bench: $(VENV)/dev
	mkdir -p $(dir benchmarks/$(NAME))
	$(BIN)/python -m pytest benchmarks --ignore benchmarks/bench_against.py --benchmark-only --benchmark-json=benchmarks/$(NAME).json
	$(BIN)/python benchmarks/performance.py benchmarks/$(NAME).json

# The same job by what one would pick instead: make bench-against
bench-against: $(VENV)/dev
	$(BIN)/pip install -e '.[against]'
	mkdir -p $(dir benchmarks/$(NAME))
	$(BIN)/python -m pytest benchmarks/bench_against.py --benchmark-only --benchmark-json=benchmarks/$(NAME)-against.json
	$(BIN)/python benchmarks/performance.py benchmarks/$(NAME)-against.json

# Whether this tree is slower than a revision: make bench-compare BASE=main
bench-compare: $(VENV)/dev
	$(BIN)/python benchmarks/compare.py $(BASE)

performance: $(VENV)/dev
	$(BIN)/python benchmarks/performance.py

breadth: $(VENV)/dev
	$(BIN)/python tests/breadth.py --write

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[demo]'
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[dev]'
	touch $@ $(VENV)/demo
