# Every target does its own set-up: a fresh clone and `make serve` are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
COMPAT := build/compat
BESIDE := --numprocesses auto --maxprocesses 8 --dist loadfile
# torch's CPU build, libgomp and friends spin while they wait; with several workers on a laptop that only costs.
export OMP_WAIT_POLICY ?= PASSIVE
# A cluster is a dozen processes: each would compile all of kvray anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: ab browser chaos compat peers prometheus help serve demo test test-fast test-long check format graph bench kernels clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

serve: $(VENV)/.serving kernels ## serve the demo model over the OpenAI API (ARGS="MODEL --port 9000 ...")
	@$(BIN)/kvray serve --host-memory auto $(ARGS)

demo: $(VENV)/.serving kernels ## start, hold a conversation of three turns, show where each prompt's tokens came from, exit
	@$(BIN)/kvray demo $(ARGS)

# What only computes runs side by side, clusters and hosts one after the other. 5: ARGS select none of them.
test: $(VENV)/.testing kernels ## one form of everything that a machine without a GPU can run
	@$(BIN)/python -m pytest -m "not alone and not long" $(BESIDE) $(ARGS); beside=$$?; \
	$(BIN)/python -m pytest -m "alone and not long" $(ARGS); alone=$$?; \
	case $$beside,$$alone in 0,0|0,5|5,0) ;; *) exit 1;; esac

test-fast: $(VENV)/.testing ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not alone and not long" $(BESIDE) --dist worksteal $(ARGS)

chaos: $(VENV)/.testing kernels ## ten minutes of random faults under eight clients; KVRAY_CHAOS_SEED draws others
	$(BIN)/python -m pytest -s -m long tests/cluster/test_chaos.py $(ARGS)

test-long: $(VENV)/.testing kernels ## what make test leaves out: more of each kind, for an hour or so
	$(BIN)/python -m pytest -m long $(ARGS)

compat: $(VENV)/.testing kernels $(COMPAT)/.installed ## other people's clients against a real server, and docs/COMPATIBILITY.md (needs npm; ARGS="--client litellm")
	@PYTHONPATH=. $(BIN)/python tests/compat/run.py --environments $(COMPAT) $(ARGS)

browser: $(VENV)/.testing ## what tests of pages in a browser want: Debian's chromium, playwright, axe-core (needs npm)
	command -v chromium >/dev/null || apt-get install --yes --no-install-recommends chromium
	$(PIP) -e '.[dev,browser]'
	npm install --prefix build/browser --no-audit --no-fund --silent axe-core@4.14.1

check: $(VENV)/.testing ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

format: $(VENV)/.testing ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

graph: $(VENV)/.testing ## who imports whom, in DOT: the rooms, then the engine's storeys
	@$(BIN)/import-linter drawgraph --show-import-totals messages kvcache transport text engine prefill decode kvrouter cluster
	@$(BIN)/import-linter drawgraph engine

ab: $(VENV)/.benching kernels ## with and without routing by cache, disaggregation, tiers: 15 minutes, docs/ab.md (ARGS=--quick: one minute)
	@$(BIN)/python benchmarks/ab.py $(ARGS)

bench: $(VENV)/.testing kernels ## every benchmark's quick form, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

kernels: $(VENV)/.serving ## build the C++ kernels, checksum and block index for this machine (cached; torch and numpy serve without)
	@if command -v $${CXX:-g++} >/dev/null 2>&1; then $(BIN)/python -m kvrouter.build; $(BIN)/python -m engine.kernels.cpu.build; \
	else echo "no C++ compiler: plain torch kernels, numpy checksums and a block index in Python will be used"; fi

# Nothing of it is ever installed beside kvray itself.
$(COMPAT)/.installed: tests/compat/requirements.txt tests/compat/older.txt tests/compat/package.json
	$(PYTHON) -m venv $(COMPAT)/python
	$(COMPAT)/python/bin/python -m pip install --quiet --disable-pip-version-check -r tests/compat/requirements.txt
	$(PYTHON) -m venv $(COMPAT)/older
	$(COMPAT)/older/bin/python -m pip install --quiet --disable-pip-version-check -r tests/compat/older.txt
	cp tests/compat/package.json $(COMPAT)
	npm install --prefix $(COMPAT) --no-audit --no-fund --silent
	@touch $@

prometheus: ## Debian's prometheus and promtool, with which tests scrape and try the alert rules (wants root)
	apt-get install --yes --no-install-recommends prometheus

peers: $(COMPAT)/.installed ## tools that measure and evaluate servers, for make compat to run too (large; an environment each)
	for peer in guidellm aiperf lm-eval; do \
		$(PYTHON) -m venv $(COMPAT)/peers/$$peer && \
		$(COMPAT)/peers/$$peer/bin/python -m pip install --quiet -r tests/compat/peers/$$peer.txt || exit 1; \
	done

clean: ## forget the environment and all caches in this folder
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# What serving needs, and no more: a newcomer waits for it.
$(VENV)/.serving: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.benching: $(VENV)/.serving
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.testing: $(VENV)/.serving
	$(PIP) -e '.[dev]'
	@touch $@
