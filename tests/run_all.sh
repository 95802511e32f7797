#!/usr/bin/env bash
# What `make test` runs: the notebooks export exactly vidlab/, every page executes, every test passes.
set -euo pipefail
cd "$(dirname "$0")/.."
# processes of one thread: on few cores that is faster than one with many, and nothing waits for a core that another holds;
# one more than cores, for there is always a test that waits; what hundreds of processes import is compiled once
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=
GLIBC_TUNABLES=$(python -c 'import os, vidlab; print(os.environ["GLIBC_TUNABLES"])')    # as in processes that vidlab starts
export GLIBC_TUNABLES
jobs=$(python -c 'from vidlab.machine import cores; print(max(2, min(8, cores())))')
OMP_NUM_THREADS=$jobs python tests/prepare.py
python -m pytest -q -n $((jobs + 1)) --dist worksteal --timeout 300 tests
