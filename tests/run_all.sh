#!/usr/bin/env bash
# What `make test` runs: the notebooks export exactly vidlab/, every page executes, every test passes.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q tests/test_project.py
nbdev_test --n_workers 2 --timing
python -m pytest -q tests --ignore tests/test_project.py
