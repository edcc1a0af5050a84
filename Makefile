# Every target makes what it needs: the first one creates .venv (about 5 minutes), later ones reuse it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Threads that spin while they wait cost more than they bring on few cores; large arrays are kept instead of returned.
FAST := OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/.installed ## train on generated scenes, evaluate, and write a page of pictures
	$(FAST) $(BIN)/python -m pmpseg.demo

test: .venv/.test ## run the test suite, a process a core
	OMP_NUM_THREADS=1 $(FAST) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: .venv/.lint ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove .venv and all runs
	rm -rf .venv runs

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/.test: .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/.lint: .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[lint]'
	@touch $@
