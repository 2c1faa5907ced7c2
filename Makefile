# Everything runs in .venv, which the first target that needs it makes. Nothing outside this folder is touched.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test lint bench clean

quickstart: .venv/ready
	$(BIN)/lorica quickstart

test: .venv/ready
# A process a core, each of one thread; a file's tests stay together, since they share what is costly to make.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check lorica tests
	$(BIN)/mypy

# As in: make bench BENCH="--quick --only step"
bench: .venv/ready
	$(BIN)/python benchmarks/bench.py $(BENCH)

# torch first and by its exact version: a range could draw a newer release with gigabytes of CUDA packages.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch .venv/ready

clean:
	rm -rf .venv build *.egg-info
