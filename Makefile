# make demo | test | serve | lint | audit | lock | clean. Everything is installed into .venv, once: the stamps there make a re-run instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1

.PHONY: demo serve test lint audit lock clean

demo: $(VENV)/installed
	$(BIN)/python -m app.demo

serve: $(VENV)/installed
	$(BIN)/jamba-rag serve

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pip check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known vulnerabilities of what the images hold and of what is installed. Fails as well when the advisories cannot be asked,
# unless AUDIT=--lenient; further options go to pip-audit: AUDIT='--ignore-vuln ID' for one that does not concern us.
audit: $(VENV)/installed $(VENV)/audit
	$(BIN)/python .ci/audit.py $(VENV)/audit/bin/pip-audit $(VENV)/lib/python*/site-packages $(AUDIT)

$(VENV)/audit: | $(BIN)/python
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --retries 1 --timeout 20 pip-audit==2.10.1 || rm -rf $@

# Exact versions for the images. What is pinned stays as long as pyproject.toml allows it; LOCK=--upgrade takes the newest.
lock: | $(VENV)/lock
	$(VENV)/lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate --quiet $(LOCK) \
		--custom-compile-command 'make lock' --output-file deploy/constraints.txt

$(VENV)/lock: | $(BIN)/python
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet uv==0.13.9

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .schemathesis .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# One pip command for all of it: a torch that another package asks for, without our pin, is a CUDA build of several GB.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV), which takes some minutes the first time"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $(VENV)/installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
