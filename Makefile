# `make demo` and `make test` make all they need; `make bench` keeps its peers in an environment of its own.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin

.PHONY: demo test long check bench clean

demo: $(VENV)/ready
	$(BIN)/python examples/digits.py

# Each test is small: threads would cost more than they bring, and two workers use both cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not long"

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

$(BENCH)/ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e ".[data,sim,train]" -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) runs
