# Everything a developer does with this repository; `make` alone lists the targets.
# Needs python3 (3.11 or newer, with venv), gcc and git. After the first time all of it works offline,
# `make lock` apart.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup engine demo test check lint-units fuzz chaos mutate bench wheel lock proto docs clean

PYTHON ?= python3
UV ?= uv
BIN := .venv/bin
ENGINE := smollm2-135m-instruct
ENGINE_STORE := build/engines
ROBOT ?= warehouse
FUZZ_S ?= 600
CHAOS ?= 100
MUTATE ?=
MUTATE_S ?= 3600
MUTATE_JOBS ?= 2
BENCHMARKS = $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))
CODE = $(wildcard edge_agent tests benchmarks examples docs hatch_build.py)
SCRIPTS = .ci/run $(shell find . \( -name .venv -o -name build -o -name dist -o -name node_modules \) -prune -o -name '*.sh' -print)
SHELLCHECK = $(or $(wildcard $(BIN)/shellcheck),$(shell command -v shellcheck),@echo "no shellcheck here, unchecked:")
UNITS = $(wildcard systemd/*.service systemd/*.socket)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

setup: .venv/.stamp proto  ## the locked environment in .venv, generated code, an editable install

.venv/.stamp: requirements.lock pyproject.toml hatch_build.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edge-agent needs Python 3.11 or newer")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'Installing the locked packages into .venv (some 155 MB to download the first time).'
	$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

proto: .venv/.stamp  ## generate edge_agent/v1 where a proto has changed
	@$(BIN)/python hatch_build.py

docs: setup  ## write docs/api.md anew from the protos and docs/api.yaml
	$(BIN)/python docs/generate_api.py

engine: setup
	$(BIN)/edge-agent engines install $(ENGINE) --store $(ENGINE_STORE)

demo: engine  ## a simulated robot gives goals to a daemon of its own (ROBOT=quadruped|arm|ros2_operator)
	$(BIN)/python examples/robots/show.py --robot $(ROBOT) --start-daemon --engines-dir $(ENGINE_STORE)

test: engine check  ## every check and every test, two files at a time
	$(BIN)/pytest -q -n 2 --dist loadfile

check: setup lint-units  ## format, lint, types, protos, import rules, shell scripts, units
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/buf lint proto
	$(SHELLCHECK) $(SCRIPTS)
	$(BIN)/pytest -q tests/conventions/test_imports.py

# systemd-analyze returns 0 for an unknown key and not 0 for a program that is only on the device:
# so what it says decides, not what it returns.
lint-units:
	@if command -v systemd-analyze >/dev/null && [ -n "$(UNITS)" ]; then \
	  said=$$(systemd-analyze verify --man=no $(UNITS) 2>&1 | grep -v ' is not executable: ' || true); \
	  if [ -n "$$said" ]; then echo "$$said"; exit 1; fi; fi

fuzz: setup  ## send any message to every call for ten minutes (FUZZ_S=600)
	EDGE_AGENT_FUZZ_S=$(FUZZ_S) $(BIN)/pytest tests/integration/test_any_message.py

chaos: setup  ## many more histories of the models, and kills (CHAOS=100 times as many as in `make test`)
	EDGE_AGENT_CHAOS=$(CHAOS) $(BIN)/pytest --timeout 0 tests/unit/scheduling tests/integration/test_crash.py \
	  tests/unit/test_ledger_model.py tests/integration/test_ledger_power_cut.py \
	  tests/integration/test_ledger_kill.py tests/unit/test_durable_model.py tests/unit/test_robot_model.py

mutate: setup  ## put small bugs into what decides: its tests must notice (MUTATE='queue budget')
	$(BIN)/python tests/mutation/mutate.py --limit-s $(MUTATE_S) --jobs $(MUTATE_JOBS) $(MUTATE)

bench: engine  ## run every benchmark; the last JSON line of each goes to build/bench.jsonl
	@mkdir -p build; : > build/bench.jsonl; failed=''; \
	for bench in $(BENCHMARKS); do \
	  echo "== $$bench"; \
	  $(BIN)/python "$$bench" | tee build/bench.out || failed="$$failed $$bench"; \
	  { grep '^{' build/bench.out || true; } | tail -n 1 >> build/bench.jsonl; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

lock:  ## resolve requirements.lock anew from pyproject.toml (needs uv and the network)
	$(UV) pip compile pyproject.toml --extra embedded --group dev \
	  --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	  --quiet --output-file requirements.lock

clean:  ## remove everything that make has made
	rm -rf .venv build dist edge_agent/v1 .mypy_cache .pytest_cache .ruff_cache .hypothesis
