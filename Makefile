# Two commands are all the set-up there is: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
# Install a torch of your own choice into .venv first and it is kept; TORCH only fills the gap.
TORCH ?= torch==2.13.0
EDITORS := yaml-language-server@1.18.0
TEST := $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-slow coverage lint format docs bench zoo clean

# Two tiny experts, their merge, what it gains, and its report. Needs the package alone.
demo: $(VENV)/.core
	$(BIN)/merge-cli demo out/demo --overwrite

test: $(VENV)/.installed $(VENV)/editors
	$(TEST)

# Which lines the tests run, and the least covered files. Before Python 3.12, counting lines takes
# half as much again as the tests.
coverage: $(VENV)/.installed $(VENV)/editors
	$(TEST) --cov --cov-report=

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site is build/site. Material's advertisement of its successor is not part of the build.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed
	$(BIN)/python scripts/bench.py --size 0.5B

# Trains the model family again, from text in Debian packages: about an hour (scripts/zoo/README.md).
zoo: $(VENV)/.installed
	$(BIN)/python scripts/zoo/build.py --out zoo

# A torch that is there is kept.
$(VENV)/.torch: | $(VENV)/bin/python
	@$(BIN)/python -c "import torch" 2>/dev/null || \
		{ echo "Installing $(TORCH) into $(VENV): minutes, a large download ..."; $(PIP) "$(TORCH)"; }
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

# What a user installs.
$(VENV)/.core: pyproject.toml | $(VENV)/.torch
	@echo "Installing merge-cli and what it needs into $(VENV) ..."
	@$(PIP) -e .
	@touch $@

# The same, and what tests, checks and documentation need: minutes.
$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	@echo "Installing merge-cli and what tests, checks and documentation need: minutes ..."
	@$(PIP) -e ".[dev]"
	@touch $(VENV)/.core $@

# What tests/whole/test_editors.py opens recipes with; without npm those tests are skipped.
$(VENV)/editors: $(VENV)/.installed
	if command -v npm >/dev/null; then \
	  npm install --silent --no-fund --no-audit --prefix $@ $(EDITORS) || rm -rf $@; fi

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
