"""One-line faults that a page or a test must catch: apply each to a copy of the project and see whether its guard fails.

    python tests/mutants.py                          all of them
    python tests/mutants.py ema-never-updated -j 2   some, two at a time
    python tests/mutants.py --module learner --list  what there is

Exit code: 0 all were caught, 1 some survived, 2 the list or a guard is broken (a text that is not there exactly once, a guard that fails without a fault).
"""
import argparse, ast, contextlib, functools, json, os, re, shutil, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib             # Python 3.10; pytest brings it

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT/'tests'/'mutants.toml'
PAGE = 'import pathlib, sys; from nbdev.test import test_nb; from nbdev.config import get_config; sys.exit(not test_nb(pathlib.Path(sys.argv[1]), skip_flags=get_config().tst_flags.split())[0])'
COPIED = ('vidlab', 'nbs', 'tests', 'data_tools', 'settings.ini', 'pyproject.toml', 'setup.py', 'README.md')


@dataclass
class Mutant:
    "A fault: `old` stands once in `module` and once in the cells it is exported from"
    id:str       # words joined by hyphens
    module:str   # e.g. 'data.sample'
    old:str      # the right line, or a part of it
    new:str      # the fault
    why:str      # what goes wrong in a run
    caught_by:list # guards: 'page', another page's file name, or a test file with pytest's options

    @property
    def guards(self): return [page_of(self.module).relative_to(ROOT/'nbs').as_posix() if g == 'page' else g for g in self.caught_by]


def load(path=LIST) -> list: # of Mutant
    "The list"
    rows = tomllib.loads(Path(path).read_text(encoding='utf-8'))['mutant']
    return [Mutant(**{**r, 'caught_by': [r['caught_by']] if isinstance(r['caught_by'], str) else r['caught_by']}) for r in rows]

def page_of(module, root=ROOT) -> Path:
    "The page that exports a module"
    *folder, name = module.split('.')
    found = [*(root/'nbs').glob(f'[0-9][0-9]_{module}.ipynb'), *(root/'nbs').joinpath(*folder).glob(f'[0-9][0-9]_{name}.ipynb')] if folder else [*(root/'nbs').glob(f'[0-9][0-9]_{name}.ipynb')]
    if len(found) != 1: raise ValueError(f'module {module!r}: {len(found)} pages export it')
    return found[0]

def module_file(module, root=ROOT) -> Path: return (root/'vidlab'/module.replace('.', '/')).with_suffix('.py')

@functools.lru_cache
def _text(page): # without the outputs, which are most of it
    nb = json.loads(page.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'code': c['outputs'] = []
    return json.dumps(nb)

def exported(cell): return cell['cell_type'] == 'code' and re.search(r'^#\|\s*exporti?\b', ''.join(cell['source']), re.M)

def changed(m:Mutant, root=ROOT) -> tuple: # text of the module, text of the page
    "Both places with the fault in them; a text that is not there exactly once is an error"
    code, page = module_file(m.module, root).read_text(encoding='utf-8'), json.loads(_text(page_of(m.module, root)))
    cells = [c for c in page['cells'] if exported(c) and m.old in ''.join(c['source'])]
    seen = code.count(m.old), sum(''.join(c['source']).count(m.old) for c in cells)
    if seen != (1, 1): raise ValueError(f'{m.id}: {m.old!r} stands {seen[0]} times in vidlab.{m.module} and {seen[1]} times in its page, not once')
    if m.new == m.old: raise ValueError(f'{m.id}: the fault changes nothing')
    source = ''.join(cells[0]['source']).replace(m.old, m.new)
    cells[0]['source'] = source.splitlines(True)
    code = code.replace(m.old, m.new)
    for text in (code, source): ast.parse(text)
    return code, json.dumps(page)

def copy_project(to:Path):
    "The project and the cache, so that no fault writes into the real one"
    for name in COPIED:
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.pytest_cache'))
        else: shutil.copy(ROOT/name, to/name)
    cache = Path(os.environ.get('VIDLAB_CACHE') or Path.home()/'.cache'/'vidlab')
    if cache.exists(): shutil.copytree(cache, to/'cache')

@contextlib.contextmanager
def room(base:Path, new:dict): # path within the project -> text
    "A place with the project's files, linked from a copy, but for some that are new"
    with tempfile.TemporaryDirectory(prefix='mutant-', ignore_cleanup_errors=True) as d:
        where = Path(d)
        shutil.copytree(base, where, copy_function=os.link, dirs_exist_ok=True)
        for name, text in new.items():
            (where/name).unlink()
            (where/name).write_text(text, encoding='utf-8')
        yield where

def guard(name:str, where:Path, seconds:float) -> tuple: # 'passes' | 'fails' | 'hangs', end of what was said
    "Run one page or test file in a copy of the project"
    if name.endswith('.ipynb'): command = [sys.executable, '-c', PAGE, f'nbs/{name}']
    else: command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *name.split(' ')]
    env = {**os.environ, 'PYTHONPATH': str(where), 'VIDLAB_CACHE': str(where/'cache'), 'VIDLAB_OUTPUTS': str(where/'outputs'), 'PYTHONDONTWRITEBYTECODE': '1'}
    env.setdefault('OMP_NUM_THREADS', '1')
    with subprocess.Popen(command, cwd=where, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as p:
        try: said = p.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)                    # with what it started
            return 'hangs', f'longer than {seconds:g} s'
    return ('fails' if p.returncode else 'passes'), said.strip()[-1500:]

def run(m:Mutant, base:Path, seconds:float) -> tuple: # 'caught' | 'survived', the guard that caught it, what it said
    code, page = changed(m)
    with room(base, {module_file(m.module).relative_to(ROOT): code, page_of(m.module).relative_to(ROOT): page}) as where:
        for g in m.guards:
            state, said = guard(g, where, seconds)
            if state != 'passes': return 'caught', g, said
    return 'survived', '', ''

def without_fault(name:str, base:Path, seconds:float) -> tuple:
    with room(base, {}) as where: return guard(name, where, seconds)

def chosen(mutants, ids, module):
    known = {m.id for m in mutants}
    for i in ids:
        if i not in known: raise ValueError(f'unknown mutant {i!r}. Known: {", ".join(sorted(known))}')
    return [m for m in mutants if (not ids or m.id in ids) and (not module or m.module == module)]

def main(argv=None) -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('ids', nargs='*', help='mutants to run; none: all')
    ap.add_argument('--module', help='only those of one module')
    ap.add_argument('-j', '--jobs', type=int, default=1, help='how many at a time')
    ap.add_argument('--seconds', type=float, default=300, help='a guard that takes longer has caught the fault')
    ap.add_argument('--list', action='store_true', help='only list them')
    ap.add_argument('--trust', action='store_true', help='do not first see every guard pass without a fault')
    ap.add_argument('-v', action='store_true', help='show what the guards said')
    a = ap.parse_args(argv)
    try:
        mutants = chosen(load(), a.ids, a.module)
        for m in mutants: changed(m)
    except ValueError as e: print(e, file=sys.stderr); return 2
    if a.list:
        for m in mutants: print(f'{m.id:40} {m.module:18} {", ".join(m.guards)}')
        return 0
    with tempfile.TemporaryDirectory(prefix='mutants-') as d, ThreadPoolExecutor(a.jobs) as pool:
        base = Path(d)
        copy_project(base)
        guards = [] if a.trust else sorted({g for m in mutants for g in m.guards})
        for g, (state, said) in zip(guards, pool.map(lambda g: without_fault(g, base, a.seconds), guards)):
            if state != 'passes': print(f'{g} {state} without any fault:\n{said}', file=sys.stderr); return 2
        left, t = [], time.time()
        for m, (state, by, said) in zip(mutants, pool.map(lambda m: run(m, base, a.seconds), mutants)):
            print(f'{state:9} {m.id:40} {by or m.module}', flush=True)
            if a.v and said: print('    ' + said.replace('\n', '\n    '))
            if state == 'survived': left.append(m)
    print(f'{len(mutants) - len(left)} of {len(mutants)} caught in {time.time() - t:.0f} s')
    for m in left: print(f'survived: {m.id}, vidlab.{m.module}: {m.why}')
    return bool(left)


if __name__ == '__main__': sys.exit(main())
