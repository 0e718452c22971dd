# Every target sets up what it needs. PYTHON is the interpreter that the environments are made from.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OLD := .venv-4.57
# Two processes with a thread each: a file's tests stay together and share their fixtures.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

IS_PYTHON_NEW = import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or later, and $(PYTHON) \
	is %d.%d. Name a later one: make PYTHON=python3.12" % sys.version_info[:2])

.PHONY: demo test test-4.57 test-all check style bench gpu-day fuzz eval-nano clean

# pip shows what it downloads: torch alone takes minutes. The clone itself becomes the package nemotron_vl.
$(VENV)/.run: requirements.txt pyproject.toml
	@$(PYTHON) -c '$(IS_PYTHON_NEW)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -r requirements.txt
	$(VENV)/bin/pip install --no-deps -e .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(VENV)/bin/pip install -r requirements-dev.txt
	touch $@

$(OLD)/.run: requirements-4.57.txt $(VENV)/.dev
	rm -rf $(OLD)
	$(VENV)/bin/pip install --no-deps --target $(OLD) -r requirements-4.57.txt
	touch $@

demo: $(VENV)/.run  ## chat about a bundled image
	$(PY) -m tools.demo

test: $(VENV)/.dev  ## the fast suite, on the pinned transformers 5
	$(PYTEST) -m "not slow and not gpu"

test-4.57: $(OLD)/.run  ## the fast suite, on transformers 4.57
	PYTHONPATH="$(CURDIR)/$(OLD)" $(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.dev $(OLD)/.run  ## the slow tests too, on both
	$(PYTEST) -m "slow and not gpu"
	PYTHONPATH="$(CURDIR)/$(OLD)" $(PYTEST) -m "slow and not gpu"

check: $(VENV)/.dev $(OLD)/.run  ## style, structure, and the fast suite on both versions
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m tools.lint
	$(MAKE) test test-4.57

fuzz: $(VENV)/.dev  ## hostile images and prompts for as long as you like; see tests/fuzz.py
	$(PY) -m tests.fuzz

eval-nano: $(VENV)/.dev  ## 1,000 held-out documents; needs the fonts of the extra `nano`
	$(VENV)/bin/pip install -e ".[nano]"
	$(PY) -m evaluation.nano --documents 1000 --out evaluation/results/nano.json

style: $(VENV)/.dev  ## rewrite the files the way `check` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev  ## measure what fits this machine, into benchmarks/results/
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.run

gpu-day: $(VENV)/.dev  ## measure what needs a GPU, into docs/performance.md; three calls of at most ten minutes
	-$(PY) -m benchmarks.gpu_day --call 1
	-$(PY) -m benchmarks.gpu_day --call 2
	-$(PY) -m benchmarks.gpu_day --call 3
	$(PY) -m benchmarks.gpu_day --render

clean:
	rm -rf $(VENV) $(OLD) .pytest_cache .ruff_cache .hypothesis .build build *.egg-info
