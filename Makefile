# Each target sets up .venv by itself first; that takes a moment where nothing changed.
PYTHON ?= python3.11
TORCH_INDEX ?=
DATASET ?= mnist5k
RECIPE ?= quick
SEED ?= 0
OUT ?= runs/$(DATASET)-$(RECIPE)-seed$(SEED)
RUN ?= $(OUT)
DATA_DIR ?=
ARGS ?=
QUICK ?=
# bench_loaders measures for minutes: a quick run leaves it out.
BENCH ?= $(if $(filter bench/%,$(ARGS)),,bench/ $(if $(QUICK),--ignore=bench/bench_loaders.py))

BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup train report test test-slow test-gpu bench bench-compare gpu-day check-aot check docs clean

help: ## this list
	@echo 'make TARGET [NAME=VALUE ...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## make .venv for this machine; PYTHON, TORCH_INDEX (see CONTRIBUTING.md)
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "setup: there is no $(PYTHON); install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/setup_environment.py --torch-index="$(TORCH_INDEX)"

train: setup ## pre-train, then k-NN and logistic regression; DATASET, RECIPE, SEED, OUT, DATA_DIR, ARGS
	$(BIN)/mnclglf train --method mnclglf --dataset $(DATASET) --recipe $(RECIPE) --seed $(SEED) --out "$(OUT)" $(if $(DATA_DIR),--data-dir "$(DATA_DIR)") $(ARGS)
	$(BIN)/mnclglf knn "$(OUT)"
	$(BIN)/mnclglf logistic "$(OUT)"

report: setup ## write the report of a run again; RUN
	$(BIN)/mnclglf report "$(RUN)"

test: setup ## run the tests, one process per core; ARGS go to pytest
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: setup ## run the tests marked slow (over ten seconds), which `make test` leaves out
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not aot" $(ARGS)

test-gpu: setup ## run the tests that need a GPU; ARGS go to pytest
	MNCLGLF_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

bench: setup ## measure, save and draw in bench/results/; BENCH, ARGS go to pytest; QUICK=1 takes 5 minutes
	@mkdir -p bench/results
	MNCLGLF_BENCH_QUICK=$(QUICK); export MNCLGLF_BENCH_QUICK; \
	saved="bench/results/$$(date -u +%Y%m%d-%H%M%S).json" && \
	$(BIN)/python -m pytest $(BENCH) --benchmark-json="$$saved" -W "ignore:Not saving anything" $(ARGS) && \
	if [ -e "$$saved" ]; then $(BIN)/python -m bench.draw "$$saved"; fi

bench-compare: setup ## list ratios that fell since the last results; ARGS may name two files
	$(BIN)/python -m bench.compare $(ARGS)

gpu-day: setup ## all that only a GPU can tell, in nine minutes, into bench/results/gpu-day.md; ARGS=--rehearse on a CPU
	$(BIN)/python -m bench.gpu_day $(ARGS)

check-aot: setup ## compile every kernel for sm_80, sm_89 and sm_90; make test does sm_86
	$(BIN)/python -m pytest tests/kernels/test_aot.py -m aot $(ARGS)

check: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/basedpyright --pythonpath $(BIN)/python -p pyright-basic.json

docs: setup ## build the documentation into build/docs/; warnings are errors
	$(BIN)/python -m sphinx -E -W -n --keep-going -q -b html docs build/docs $(ARGS)
	@echo 'documentation: $(CURDIR)/build/docs/index.html'

clean: ## delete .venv, caches and build products; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
