#!/usr/bin/env bash
# What `make constraints` runs: one version of every package for each Python, the newest that fit together, into constraints.txt.
# Python 3.10 is the oldest; the newest is the last one for which every package has a ready-made file.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --disable-pip-version-check uv
oldest=$(sed -n 's/^min_python *= *3\.//p' settings.ini)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
compile() { uv pip compile --quiet --all-extras --no-annotate --no-header "$@" setup.py; }
compile --universal --python-version "3.$oldest" --no-emit-package setuptools --output-file "$tmp/all" > /dev/null
newest=$oldest
while compile --python-version "3.$((newest + 1))" --only-binary :all: --constraint "$tmp/all" --output-file "$tmp/one" > /dev/null 2> "$tmp/why"
do newest=$((newest + 1)); done
grep -q 'no wheels' "$tmp/why" || { cat "$tmp/why" >&2; exit 1; }          # no network is no answer
missing=$(tr '\n' ' ' < "$tmp/why" | sed -nE 's/.*Because ([A-Za-z0-9_.=-]+) has no wheels.*/\1/p')
{ echo "# Python 3.$oldest to 3.$newest; 3.$((newest + 1)): ${missing:-a package} has no file for it"
  echo "# Versions that are tested together; \`make env\` installs by them. Written by \`make constraints\`: not to be edited."
  cat "$tmp/all"; } > constraints.txt
head -1 constraints.txt
