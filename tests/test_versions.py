"Tested versions for each Python: every requirement has one, and a Python that does not fit is told so in one line."
import configparser, re, subprocess, sys
from pathlib import Path
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINES = (ROOT/'constraints.txt').read_text().splitlines()
OLDEST, NEWEST = (int(o) for o in re.match(r'# Python 3\.(\d+) to 3\.(\d+); ', LINES[0]).groups())
PINS = [Requirement(line) for line in LINES if not line.startswith('#')]

def required():
    "Everything that `make env` asks for"
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    return [Requirement(r) for r in (cfg['DEFAULT']['requirements'] + ' ' + cfg['DEFAULT']['dev_requirements']).split()]

def pins_for(minor):
    "name -> version on Linux with Python 3.minor"
    env = default_environment() | dict(python_version=f'3.{minor}', python_full_version=f'3.{minor}.5', sys_platform='linux', os_name='posix')
    chosen = [p for p in PINS if p.marker is None or p.marker.evaluate(env)]
    assert len({p.name for p in chosen}) == len(chosen), 'two versions of one package'
    return {p.name: next(iter(p.specifier)).version for p in chosen}

@pytest.mark.parametrize('minor', range(OLDEST, NEWEST + 1))
def test_every_requirement_has_a_tested_version_within_its_bounds(minor):
    pins = pins_for(minor)
    for r in required():
        name = re.sub(r'[-_.]+', '-', r.name).lower()
        assert name in pins, f'{r.name}: run `make constraints`'
        assert pins[name] in r.specifier, f'{r} and {pins[name]}: run `make constraints`'

def test_the_oldest_python_is_that_of_the_package():
    assert f'min_python = 3.{OLDEST}\n' in (ROOT/'settings.ini').read_text()

def asked(version, *args, here=ROOT):
    "What `which_python.py` says to an interpreter of that version"
    code = (f'import sys; sys.version_info = {(*version, "final", 0)!r}; '
            f'sys.version = {".".join(map(str, version))!r} + " (main)"; sys.argv = {["which_python.py", *args]!r}; __file__ = {str(here/"tests"/"which_python.py")!r}; '
            f'exec(open(__file__).read())')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    return r.returncode, r.stderr.strip()

def test_a_python_that_does_not_fit_is_told_so(tmp_path):
    (tmp_path/'tests').mkdir()
    for name in ('tests/which_python.py', 'constraints.txt'): (tmp_path/name).write_text((ROOT/name).read_text())
    assert asked((3, OLDEST, 1), here=tmp_path) == asked((3, NEWEST, 0), here=tmp_path) == (0, '')
    code, said = asked((3, OLDEST - 1, 4), here=tmp_path)
    assert code == 1 and said.startswith(f'vidlab needs Python 3.{OLDEST} or newer, and this is 3.{OLDEST - 1}.4') and '\n' not in said
    code, said = asked((3, NEWEST + 1, 0), here=tmp_path)
    assert code == 1 and re.search(rf'too new: \S+ has no file for it yet.*make PYTHON=python3.{NEWEST}', said) and '\n' not in said
    assert asked((3, NEWEST + 1, 0), 'any', here=tmp_path)[0] == 0
    (tmp_path/'.venv').mkdir(); (tmp_path/'.venv'/'pyvenv.cfg').write_text(f'home = /usr\nversion = 3.{OLDEST}.9\n')
    code, said = asked((3, NEWEST, 0), here=tmp_path)
    assert code == 1 and f'.venv was made with Python 3.{OLDEST}' in said and f'make PYTHON=python3.{OLDEST}' in said
    assert asked((3, NEWEST, 0), 'apart', here=tmp_path)[0] == 0
