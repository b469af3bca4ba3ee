# Each target sets up .venv by itself first; that takes a moment where nothing changed.
PYTHON ?=
TORCH_INDEX ?=
METHOD ?= mnclglf
DATASET ?= mnist5k
RECIPE ?= quick
SEED ?= 0
OUT ?= runs/$(run_name)
RUN ?= $(call as_typed,OUT)
DATA_DIR ?=
ARGS ?=
QUICK ?=
# bench_loaders measures for minutes: a quick run leaves it out.
BENCH ?= $(if $(filter bench/%,$(value ARGS)),,bench/ $(if $(QUICK),--ignore=bench/bench_loaders.py))

# A value that was given is taken as it was typed, with its blanks, quotes and $; ARGS alone is text for the shell.
# Not exported: for that make would expand the $ of a value.
unexport PYTHON TORCH_INDEX METHOD DATASET RECIPE SEED OUT RUN DATA_DIR ARGS
as_typed = $(if $(filter file,$(origin $(1))),$($(1)),$(value $(1)))
quoted = '$(subst ','\'',$(call as_typed,$(1)))'

# folder:/a b/my photos becomes folder-my-photos, as in runs/folder-my-photos-quick-seed0.
empty :=
blank := $(empty) $(empty)
one_word = $(subst $$,-,$(subst ",-,$(subst ',-,$(subst $(blank),-,$(call as_typed,$(1))))))
folder_name = $(or $(lastword $(filter-out . ..,$(subst /, ,$(patsubst folder:%,%,$(1))))),images)
dataset_name = $(if $(filter folder:%,$(1)),folder-$(call folder_name,$(1)),$(1))
method_name = $(if $(filter-out mnclglf,$(1)),$(1)-)
run_name = $(call method_name,$(call one_word,METHOD))$(call dataset_name,$(call one_word,DATASET))-$(call one_word,RECIPE)-seed$(call one_word,SEED)

BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup train report test test-slow test-gpu bench bench-compare faults gpu-day check-aot check lock docs clean

help: ## this list
	@echo 'make TARGET [NAME=VALUE ...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## make .venv for this machine; PYTHON, TORCH_INDEX (see CONTRIBUTING.md)
	@python=$$($(SHELL) tools/find_python.sh $(call quoted,PYTHON)) && \
	"$$python" tools/setup_environment.py --torch-index=$(call quoted,TORCH_INDEX)

train: setup ## pre-train, then logistic regression and k-NN; METHOD, DATASET, RECIPE, SEED, OUT, DATA_DIR, ARGS
	$(BIN)/mnclglf train --method $(call quoted,METHOD) --dataset $(call quoted,DATASET) --recipe $(call quoted,RECIPE) --seed $(call quoted,SEED) --out $(call quoted,OUT) $(if $(value DATA_DIR),--data-dir $(call quoted,DATA_DIR)) $(value ARGS)
	$(BIN)/mnclglf logistic $(call quoted,OUT)
	$(BIN)/mnclglf knn $(call quoted,OUT)

report: setup ## write the report of a run again; RUN
	$(BIN)/mnclglf report $(call quoted,RUN)

test: setup ## run the tests, one process per core; ARGS go to pytest
	$(BIN)/python -m pytest -n auto --dist worksteal $(value ARGS)

test-slow: setup ## run the tests marked slow (over ten seconds), which `make test` leaves out
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not aot" $(value ARGS)

test-gpu: setup ## run the tests that need a GPU; ARGS go to pytest
	MNCLGLF_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(value ARGS)

bench: setup ## measure, save and draw in bench/results/; BENCH, ARGS go to pytest; QUICK=1 takes 5 minutes
	@mkdir -p bench/results
	MNCLGLF_BENCH_QUICK=$(QUICK); export MNCLGLF_BENCH_QUICK; \
	saved="bench/results/$$(date -u +%Y%m%d-%H%M%S).json" && \
	$(BIN)/python -m pytest $(BENCH) --benchmark-json="$$saved" -W "ignore:Not saving anything" $(value ARGS) && \
	if [ -e "$$saved" ]; then $(BIN)/python -m bench.draw "$$saved"; fi

bench-compare: setup ## list ratios that fell since the last results; ARGS may name two files
	$(BIN)/python -m bench.compare $(value ARGS)

faults: setup ## attack real runs (kills, disks, signals ...) and print one table; ARGS=kills takes one part
	$(BIN)/python -m bench.faults --out bench/results/faults.md $(value ARGS)

gpu-day: setup ## all that only a GPU can tell, in nine minutes, into bench/results/gpu-day.md; ARGS=--rehearse on a CPU
	$(BIN)/python -m bench.gpu_day $(value ARGS)

check-aot: setup ## compile every kernel for sm_80, sm_89 and sm_90; make test does sm_86
	$(BIN)/python -m pytest tests/kernels/test_aot.py -m aot $(value ARGS)

check: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/basedpyright --pythonpath $(BIN)/python -p pyright-basic.json

# uv in an environment of its own: only this target uses it. The --universal of its answers holds for every Python.
COMPILE = build/uv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" $(value ARGS)
lock: setup ## write locks/ anew from setup.py and constraints.txt; ARGS=--upgrade takes the newest of what they leave open
	$(BIN)/python -m venv build/uv && build/uv/bin/python -m pip install -q --disable-pip-version-check uv
	$(COMPILE) -c constraints.txt --extra dev --extra docs --extra mnist5k --extra dali-cuda13 setup.py -o locks/base.txt
	echo setuptools | $(COMPILE) -c locks/base.txt - -o locks/build.txt
	for name in faiss-cpu faiss-gpu; do echo "$$name" | $(COMPILE) -c constraints.txt -c locks/base.txt - -o "locks/$$name.txt" || exit; done

docs: setup ## build the documentation into build/docs/; warnings are errors
	$(BIN)/python -m sphinx -E -W -n --keep-going -q -b html docs build/docs $(value ARGS)
	@printf 'documentation: %s/build/docs/index.html\n' "$$(pwd)"

clean: ## delete .venv, caches and build products; runs/ stays
	rm -rf .venv build dist *.egg-info kernels/build kernels/dist kernels/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
