# `make demo` and `make test` make all they need; `make bench` keeps its peers in an environment of its own, and
# `make matrix` the oldest and the newest torch.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
# The oldest Python that is promised, if it is here.
OLDEST_PYTHON ?= $(firstword $(shell command -v python3.10) $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)

.PHONY: demo test other-blas matrix long check bench clean

demo: $(VENV)/ready
	$(BIN)/python examples/digits.py

# Each test is small: threads would cost more than they bring, and two workers use both cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not long"

# Solvers, adjoints and state spaces with products that other processors would make.
other-blas: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -m "not long" -p other_blas --timeout=1200 \
		tests/test_solvers.py tests/test_pitfalls_solvers.py tests/test_solver_family.py \
		tests/test_adjoints.py tests/test_pitfalls_gradients.py tests/test_statespace.py

# All of ROWS, by default every row of tests/matrix.py; it goes on after one that fails.
matrix: $(VENV)/ready
	$(BIN)/python tests/matrix.py $(ROWS)

long: $(VENV)/ready
	$(BIN)/python -m pytest -m long

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --doctest-modules src/implicitdl -p no:cacheprovider

bench: $(BENCH)/ready
	$(BENCH)/bin/python benchmarks/run.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

.venv-oldest/ready: pyproject.toml tests/oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c tests/oldest.txt -e ".[test]"
	touch $@

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade torch torchvision -e ".[test]"
	touch $@

$(BENCH)/ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e ".[data,sim,train]" -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) .venv-oldest .venv-newest runs
