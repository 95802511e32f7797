#!/usr/bin/env bash
# What the newest of everything breaks, beyond the tested versions and beyond our own upper bounds, by name:
# all requirements are taken newest at once, and where tests fail, one after the other.
#   [PYTHON=python3.13] tests/newest.sh
# The environment and the logs lie in $VIDLAB_PYTHONS/newest (default ~/.cache/vidlab/pythons/newest).
set -uo pipefail
cd "$(dirname "$0")/.."
root=${VIDLAB_PYTHONS:-$HOME/.cache/vidlab/pythons}/newest
mkdir -p "$root"
export OMP_NUM_THREADS=1
python=${PYTHON:-python3}
"$python" tests/which_python.py any apart || exit 2
[ -x "$root/env/bin/python" ] || "$python" -m venv "$root/env"
export PATH=$root/env/bin:$PATH
pip() { python -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING' >&2); }
version() { python -c "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$1"; }
tests() { python -m pytest -q -p no:cacheprovider -n 2 --dist worksteal --timeout 300 -m 'not slow' -rfE "$@" > "$root/$log.log" 2>&1; }
failures() { grep -E '^(FAILED|ERROR) ' "$root/$log.log" | sed -E 's/^[A-Z]+ //; s/ - .*//' | sort -u; }

pip install --constraint constraints.txt -e '.[dev]' || exit 2
python -m ipykernel install --sys-prefix --name python3 > /dev/null 2>&1
python -m pip freeze --exclude-editable > "$root/tested.txt" 2> /dev/null
python -c 'from vidlab.data.shapes import make_shapes; from vidlab.tinyclip import tiny_clip; make_shapes(); tiny_clip()'     # what many tests start from
names=$(python -c "
import configparser, re
c = configparser.ConfigParser(delimiters=['=']); c.read('settings.ini'); c = c['DEFAULT']
print(*(re.match(r'[\w-]+', r)[0] for r in (c['requirements'] + ' ' + c['dev_requirements']).split()))")
declare -A tested newest
for n in $names; do tested[$n]=$(version "$n"); done

log=all
pip install --upgrade --upgrade-strategy eager $names || exit 2
for n in $names; do newest[$n]=$(version "$n"); done
changed=$(for n in $names; do [ "${tested[$n]}" = "${newest[$n]}" ] || echo "$n"; done)
echo "newer than tested: $(for n in $changed; do printf '%s %s (tested %s), ' "$n" "${newest[$n]}" "${tested[$n]}"; done)"
echo "and, brought along: $(python -m pip freeze --exclude-editable 2> /dev/null | grep -vxFf "$root/tested.txt" | grep -viE "^(${names// /|})==" | xargs)"
if tests tests; then echo "the newest of everything: all fast tests pass"; exit 0; fi
broken=$(failures)
if [ -z "$broken" ]; then tail -5 "$root/all.log"; broken=tests; fi
echo "with the newest of everything $(wc -w <<< "$broken") tests fail ($root/all.log); one by one:"
for n in $changed; do
    case $n in                                                  # one does not load the other's previous version
        torch) wanted="torch==${newest[torch]} torchvision==${newest[torchvision]}" ;;
        torchvision) grep -qx torch <<< "$changed" && continue; wanted="torchvision==${newest[torchvision]}" ;;
        *) wanted="$n==${newest[$n]}" ;;
    esac
    pip install -r "$root/tested.txt" 2> /dev/null
    log=$n
    pip install --upgrade $wanted 2> "$root/$n.pip"
    along=$(for m in $names; do [ "$m" = "$n" ] || [ "$(version "$m")" = "${tested[$m]}" ] || printf ' %s %s' "$m" "$(version "$m")"; done)
    said="$n ${newest[$n]}${along:+ (brings$along)}"
    if tests $broken; then echo "   $said: nothing"
    else echo "   $said breaks $(failures | wc -l) tests: $(failures | head -3 | tr '\n' ' ')"; grep -m1 -E '^E  +[A-Za-z.]+(Error|Exception)' "$root/$n.log"; fi
    grep -h 'requires' "$root/$n.pip" | sed 's/^/      /' | head -3
done
pip install -r "$root/tested.txt"
exit 1
