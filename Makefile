# `make demo` and `make test` do all the set-up themselves. Other interpreters and folders: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINNED := -c constraints.txt

.PHONY: demo test lint bench faults clean

demo: $(VENV)/installed
	$(BIN)/lutetia demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

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
	$(BIN)/python -m pip install --quiet $(PINNED) --no-build-isolation --editable '.[demo,dev]'
	touch $@

faults: $(VENV)/installed
	$(BIN)/python -m benchmarks faults $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
