# mmlm: everything runs in .venv, which the first target that needs it makes (about 3 minutes).

PYTHON ?= python3
STORY  ?= demo
MINUTES ?= 60
WORKERS ?= 2
BIN    := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DAGSTER_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: help venv demo test check faults slow fuzz bench ui clean
.DEFAULT_GOAL := help

help: ## show this
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

venv: .venv/.ready ## the environment, in .venv

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mmlm needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`; try: make PYTHON=python3.11 venv" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "making the environment in .venv: about 3 minutes and 2.9 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,pipelines]'
	@touch $@
	@echo "the environment is ready"

demo: venv ## the whole story on the built-in corpus (about 4 minutes; then look at runs/demo)
	@$(BIN)/mmlm run $(STORY)

test: check ## make check, then the tests, as many at once as WORKERS (2)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: venv ## format, lint, types, who may import whom
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

faults: venv ## kill it in every stage, and see it recover (slow)
	@command -v strace >/dev/null || { test "`id -u`" = 0 && command -v apt-get >/dev/null && apt-get install -y -qq strace >/dev/null; } \
	  || echo "no strace here: the cells that need it skip themselves (on Debian or Ubuntu: apt-get install strace)"
	@$(BIN)/python -m pytest -m slow tests/faults

slow: venv ## the other slow tests: whole runs, every ZeRO stage, ranks killed while they train
	@$(BIN)/python -m pytest -m slow --ignore=tests/faults

fuzz: venv ## an hour of broken input for every reader and decoder; MINUTES=5 TARGETS="parquet chat" for less
	@$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) $(if $(TARGETS),--targets $(TARGETS))

bench: venv ## ours against peers, side by side
	@found=`ls benchmarks/[a-z]*.py 2>/dev/null`; test -n "$$found" || echo "no benchmarks yet"; mkdir -p runs/bench; \
	for file in $$found; do name=`basename $$file .py`; echo "benchmark $$name"; \
	  $(BIN)/python -m benchmarks.$$name --json runs/bench/$$name.json || exit 1; done

ui: venv ## Dagster's page (port 3000) beside MLflow's (port 5000), until Ctrl-C
	@$(BIN)/python -m pipelines.ui

clean: ## remove caches; .venv and runs stay
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
