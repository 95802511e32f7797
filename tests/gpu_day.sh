#!/usr/bin/env bash
# All that we owe to a machine with one GPU, in under eight minutes: training steps in fp16 and bf16, the Triton scan against the reference and
# mamba-ssm, attention backends, loader beside the device, share of the peak, torch.compile. One table, printed and in DIR.
#   tests/gpu_day.sh [--out DIR] [--only steps scan ...]
# Without a GPU it says so and runs the same code on the CPU at tiny sizes. Exit status 1: a row says no.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then export PATH=$PWD/.venv/bin:$PATH; fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python tests/gpu_day.py "$@"
