# Every target does its own set-up: a virtual environment in .venv, made with $(PYTHON).
PYTHON ?= python3
TEST_PROCESSES ?= 2
WORKDIR ?= runs/quickstart
OTHER_PYTHON ?= python3.12
# What the other line of jax could change: products, samples, updates, checkpoints, whole stages and their resuming.
CORE_TESTS = $(addprefix tests/test_,$(addsuffix .py,objectives views transformer sampling state checkpoint stages))

.PHONY: quickstart train test test-slow test-other wheel lint types docs clean

# Three texts explained by the shipped pair, which is then trained on for a few minutes.
quickstart: .venv/installed
	@mkdir -p $(WORKDIR)
	.venv/bin/nlae explain --model smollm2-135m --html $(WORKDIR)/explanations.html \
	  --text "The capital of France is Paris" \
	  --text "def mean(values): return sum(values) /" \
	  --text "Once upon a time there was a fox who"
	.venv/bin/nlae train --config experiments/quickstart.py --workdir $(WORKDIR)

# A pair from nothing.
train: .venv/installed
	.venv/bin/nlae train --config experiments/scratch.py --workdir runs/scratch

test: .venv/tested
	.venv/bin/python -m pytest -q -m "not slow" -n $(TEST_PROCESSES) --dist loadfile

test-slow: .venv/tested
	.venv/bin/python -m pytest -q -m slow -n $(TEST_PROCESSES) --dist loadfile

# The core's tests on the line of jax that Python 3.12 and later get.
test-other: setup.cfg
	.venv-other/bin/python -m pip --version >/dev/null 2>&1 || $(OTHER_PYTHON) -m venv .venv-other
	.venv-other/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	.venv-other/bin/python -m pytest -q -m "not slow" $(CORE_TESTS)

# Installs WHEEL, or else a wheel made here, in a new environment, and runs the tiny experiment with it.
wheel: .venv/installed
	rm -rf build/wheel
	$(if $(WHEEL),,.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .)
	.venv/bin/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check $(or $(WHEEL),build/wheel/nlae_jax-*.whl)
	cp experiments/tiny.py build/wheel
	cd build/wheel && venv/bin/nlae --help >/dev/null && venv/bin/nlae train --config tiny.py --workdir tiny

lint: .venv/tested
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache

types: .venv/tested
	.venv/bin/mypy
	MYPYPATH=experiments/smollm2 .venv/bin/mypy experiments/smollm2/*.py  # scripts, which no package holds

docs: .venv/documented
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
	@echo "documentation: build/docs/index.html"

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/tested: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

.venv/documented: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
