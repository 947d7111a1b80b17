# `make demo` and `make test` do all the set-up themselves. Other interpreters and folders: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINNED := -c constraints.txt
FAST := tests/test_walls.py tests/test_docs.py tests/system tests/protocol/schema tests/protocol/blobs tests/protocol/rpc \
	tests/protocol/test_claims.py tests/protocol/test_services.py tests/node/machine tests/node/services/test_standby_policy.py \
	tests/node/runtime/test_replication_policy.py tests/node/test_settings.py tests/node/test_schedule.py \
	tests/coordinator/acceptance tests/coordinator/ledger tests/coordinator/web tests/fuzz/test_round_trips.py \
	tests/fuzz/test_claims_machine.py tests/simulation/test_shrink.py tests/simulation/test_swarm.py \
	tests/models/experts tests/models/test_randomness.py

.PHONY: demo test test-fast lint bench reference faults clean

demo: $(VENV)/installed
	$(BIN)/lutetia demo $(ARGS)

# A process that crashes is not started again: pytest-xdist 3.8 then waits for ever at the end (with --dist loadfile).
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

# The inner loop: decisions, documents and parsers, without a p2pd or a process of its own.
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(FAST) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: docs pictures

# The site, in build/site; a broken link fails. It works without a network.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The drawings, from their text sources; needs Graphviz's `dot`.
pictures: $(patsubst %.dot,%.svg,$(wildcard docs/images/*.dot))

docs/images/%.svg: docs/images/%.dot
	dot -Tsvg $< -o $@

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

# torch goes in first and alone, at its pin: asked for as a range by another package, an index may answer with a newer build and
# several GB of CUDA libraries. Where pip finds a CPU build of the same version (torch==2.13.0+cpu), it prefers that.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Lutetia needs Python 3.11 or newer; run: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINNED) setuptools wheel torch
	$(BIN)/python -m pip install --quiet $(PINNED) --no-build-isolation --editable '.[dev]'
	touch $@

# The run's page, from its sources; needs Node. The result is committed, so that nothing else does.
.PHONY: page
page:
	cd coordinator/web/frontend && npm ci --silent --no-audit --no-fund && npm run --silent check && npm run --silent build

# The pages of docs/reference, from the code.
reference: $(VENV)/installed
	$(BIN)/python -m docs.generate

faults: $(VENV)/installed
	$(BIN)/python -m benchmarks faults $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
