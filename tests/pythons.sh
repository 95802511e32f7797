#!/usr/bin/env bash
# Every Python at hand, each with an environment and an empty cache of its own: the start of the embedded data, export check, one page
# of each layer, the fast tests, the smallest training. A table at the end.
#   tests/pythons.sh [3.12 3.13 ...]       only these
# Environments and logs lie in $VIDLAB_PYTHONS (default ~/.cache/vidlab/pythons); environments are kept, 7 GB each.
set -uo pipefail
cd "$(dirname "$0")/.."
root=${VIDLAB_PYTHONS:-$HOME/.cache/vidlab/pythons}
pages="00_core data/11_decode 23_losses models/30_clip4clip 40_learner 54_results"
export OMP_NUM_THREADS=1

interpreters() {       # minor version and path of each, the newest patch of a minor version first
    { for n in $(seq 8 20); do command -v "python3.$n"; done; command -v python3
      ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/*/bin/python3
    } 2>/dev/null | sort -u | while read -r p; do
        "$p" -c 'import sys; v = sys.version_info; sys.prefix == sys.base_prefix and v[0] == 3 and print("3.%d %d %s" % (v[1], v[2], sys.executable))' 2>/dev/null
    done | sort -t. -k2,2n -k3,3n | sort -s -k1,1V -k2,2nr | awk '!seen[$1]++ {print $1, $3}'
}

step() {               # name of a step, command: a cell of the table
    local name=$1 t=$SECONDS; shift
    echo "   $version $name" >&2
    if "$@" > "$log/$name.log" 2>&1; then printf '%s' "ok $((SECONDS - t)) s"; else printf '%s' "FAILED ($log/$name.log)"; fi
}

export_check() { python -m pytest -q -p no:cacheprovider tests/test_project.py; }
some_pages() { local failed=0; for p in $pages; do nbdev-test "nbs/$p.ipynb" || failed=1; done; return $failed; }
start_from() { python -c 'from vidlab.data.shapes import make_shapes; from vidlab.tinyclip import tiny_clip; make_shapes(); tiny_clip()'; }
fast_tests() { python -m pytest -q -p no:cacheprovider -n 2 --dist worksteal --timeout 300 -m 'not slow' tests --ignore tests/test_project.py; }
training() { papermill --no-progress-bar nbs/runs/train.ipynb "$log/train.ipynb" -p recipe shapes_meanP -p epochs 1; }
versions() { python -c 'import importlib.metadata as m; print(*(f"{p} {m.version(p)}" for p in ("torch", "av", "numpy")), sep=", ")'; }

table="Python | versions | install | start | export | pages | fast tests | training"
failed=0
while read -r version python; do
    if [ $# -gt 0 ] && [[ " $* " != *" $version "* ]]; then continue; fi
    log=$root/$version; mkdir -p "$log"
    if ! line=$("$python" tests/which_python.py apart 2>&1); then table+=$'\n'"$version | refused: ${line%%. Name*}"; continue; fi
    [ -x "$log/env/bin/python" ] || "$python" -m venv "$log/env"
    row=$(
        export PATH=$log/env/bin:$PATH VIDLAB_CACHE=$log/cache VIDLAB_OUTPUTS=$log/outputs
        rm -rf "$VIDLAB_CACHE" "$VIDLAB_OUTPUTS"
        made=$(step install pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[dev]')
        [[ $made == ok* ]] || { echo "$version | | $made"; exit; }
        python -m ipykernel install --sys-prefix --name python3 > /dev/null 2>&1
        echo "$version | $(versions) | $made | $(step start start_from) | $(step export export_check) | $(step pages some_pages) | $(step tests fast_tests) | $(step training training)"
    )
    [[ $row == *FAILED* ]] && failed=1
    echo "$row" >&2
    table+=$'\n'$row
done < <(interpreters)
column -t -s '|' <<< "$table"
exit $failed
