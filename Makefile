# Two commands do everything on a machine that has only Python >= 3.11 and make:
#   make quickstart   create .venv, install, train the digits classifier on two workers
#   make test         the same set-up, then lint, type check and run the tests
# make docs builds the site of docs/ into site/.
PYTHON ?= python3
BIN := .venv/bin
UNIT = $(BIN)/pytest tests/unit --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
WITH_RAY = $(BIN)/pytest tests/integration tests/chaos tests/gpu --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: quickstart test lint format unit docs clean
.DELETE_ON_ERROR:

quickstart: .venv/.installed
	$(BIN)/raytorch train configs/quickstart.yaml

# The unit tests side by side, then those that start Ray, of which two at a time keep two cores busy. Both are run.
test: lint
	$(UNIT); unit=$$?; $(WITH_RAY); exit $$(( unit ? unit : $$? ))

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 raytorch jobs tests  # no file is read by the locale
	$(BIN)/mypy

unit: .venv/.installed
	$(UNIT)

# The variable silences an advertisement of the theme's next generation.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# uv installs in seconds what pip takes minutes for. Byte code is compiled once, here, so that the half-dozen Python
# processes of a run do not each compile torch and ray again when they start.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "raytorch needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch, ray and the rest into .venv, some GB: a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache site runs
