"The project holds together: pages and modules in sync, layers point down, pages clean, import quiet."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUNS = [p for p in PAGES if p.parent.name == 'runs']

def cells(page): return json.loads(page.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])

def exporting():
    "module -> page, for every page with a `default_exp`; the face of a package, pkg.__init__, is called pkg"
    out = {}
    for p in PAGES:
        for c in cells(p):
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M): out.setdefault(m[1].removesuffix('.__init__'), []).append(p)
    return out

MODULES = exporting()

def test_one_page_per_module():
    assert MODULES, 'no page exports anything'
    assert {m: [p.name for p in ps] for m, ps in MODULES.items() if len(ps) > 1} == {}

def test_page_names():
    "pkg/NN_mod.ipynb, or NN_pkg.mod.ipynb, exports pkg.mod, and no number is used twice in a folder"
    for m, (p,) in MODULES.items():
        folder = '.'.join(p.relative_to(ROOT/'nbs').parent.parts)
        assert '.'.join(filter(None, [folder, re.sub(r'^\d\d_', '', p.stem)])) == m and p.stem[:2].isdigit(), f'{p.name} exports {m}'
    numbers = [(p.parent, p.stem[:2]) for (p,) in MODULES.values()]
    assert len(set(numbers)) == len(numbers), sorted(numbers)

def test_export_in_sync(tmp_path):
    "Exporting and cleaning afresh gives exactly vidlab/ and nbs/"
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', 'nbs', 'pyproject.toml'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip('not a git checkout')
    for f in out.stdout.split('\n'):
        if f and (ROOT/f).exists():
            (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).write_bytes((ROOT/f).read_bytes())
    both = 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()'
    subprocess.run([sys.executable, '-c', both], cwd=tmp_path, check=True, capture_output=True)
    new = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path/'vidlab').rglob('*.py')}
    old = {p.relative_to(ROOT): p.read_text() for p in (ROOT/'vidlab').rglob('*.py')}
    assert sorted(map(str, new)) == sorted(map(str, old)), 'a module without a page, or a page without its module: run `make export`'
    assert [str(k) for k in new if new[k] != old[k]] == [], 'differs from its page: run `make export`'
    pages = [p.relative_to(tmp_path) for p in (tmp_path/'nbs').rglob('*.ipynb')]
    assert [str(p) for p in pages if (tmp_path/p).read_bytes() != (ROOT/p).read_bytes()] == [], 'not clean: run `make export`'

# Imports point down, or to a smaller number in the same folder; a folder stands at a place among the pages above it (design: layers).
FOLDERS = {'.': (), 'data': (10,), 'data/sets': (10, 18), 'models': (30,), 'tasks': (38,), 'widgets': (80,)}
def place(page): return (*FOLDERS[page.parent.relative_to(ROOT/'nbs').as_posix()], int(page.stem[:2]))
NUMBER = {m: place(p) for m, (p,) in MODULES.items()}
def module_file(package, module):
    "The file of a module, or of the face of a package, below a package folder"
    path = package/module.replace('.', '/')
    return path/'__init__.py' if path.is_dir() else path.with_suffix('.py')

def at(module): return '.'.join(f'{n:02}' for n in NUMBER[module])

def resolve(node, module):
    "Absolute names, without `vidlab.`, that an import statement in `module` may mean; '' is the package itself"
    if isinstance(node, ast.Import): names = [a.name for a in node.names]
    else:
        inside = ['vidlab', *module.split('.'), *(['__init__'] if is_package(f'vidlab.{module}') else [])]
        base = '.'.join([*(inside[:-node.level] if node.level else []), *([node.module] if node.module else [])])
        names = [meant(base, a.name) for a in node.names]
    return [n.partition('.')[2] for n in names if n.split('.')[0] == 'vidlab']

def meant(base, name):
    "The module that `from base import name` imports: a module of the package, or what its face offers"
    inner, face = f'{base}.{name}', base.partition('.')[2]
    if not is_package(base): return base
    return base if face in NUMBER and inner.partition('.')[2] not in NUMBER else inner

def is_package(name):
    inside = name.partition('.')[2]
    return name == 'vidlab' or name.startswith('vidlab.') and any(m.startswith(inside + '.') for m in MODULES)

def imported(path, module):
    "vidlab modules that a file imports at any depth of its code, or reaches as attributes of the package"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)): yield from resolve(node, module)
        if isinstance(node, ast.Attribute) and re.fullmatch(r'vidlab(\.\w+)+', name := ast.unparse(node)) and name.partition('.')[2] in NUMBER: yield name.partition('.')[2]
        if isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in ('import_module', '__import__') and node.args and isinstance(node.args[0], ast.Constant):
            if str(node.args[0].value).startswith('vidlab.'): yield node.args[0].value.partition('.')[2]

NOT_MODULES = {'__version__'}                       # of the package itself
BY_NAME = {('registry', 'models')}                  # the registry imports the folder, and knows no model

UNKNOWN_TO = dict(viz=('data', 'models', 'tasks'), results=('data.shapes', 'models'), explain=('data.shapes', 'models')) # module -> what it knows nothing of

def breaches(package, module):
    "What is wrong with the imports of one module of a package folder"
    for dep in imported(module_file(package, module), module):
        if dep in NOT_MODULES | {''} or (module, dep) in BY_NAME: continue
        if dep not in NUMBER: yield f'{module} imports vidlab.{dep}, which no page exports'
        elif NUMBER[dep] > NUMBER[module]: yield f'{module} ({at(module)}) imports {dep} ({at(dep)})'
        if module.startswith('models.') and (dep.startswith(('models.', 'data.')) or dep.split('.')[0] == 'tasks'): yield f'{module} imports {dep}'
        if module.startswith('data.') and dep.startswith('models.'): yield f'{module} imports {dep}'
        if any(f'{dep}.'.startswith(f'{word}.') for word in UNKNOWN_TO.get(module, ())): yield f'{module} imports {dep}'

@pytest.mark.parametrize('module', sorted(MODULES))
def test_layers(module): assert list(breaches(ROOT/'vidlab', module)) == []

def test_every_import_is_seen():
    "As many as a plain search over the lines finds"
    for m in MODULES:
        path = module_file(ROOT/'vidlab', m)
        text = path.read_text(encoding='utf-8')
        lines = re.findall(r'^\s*(?:from (?:\.+\w*[\w.]*|vidlab[\w.]*) import|import vidlab)', text, re.M)
        assert len(list(imported(path, m))) >= len(lines), m

PLANTED = [ # module, a line, what must be said; '': nothing
    ('models.stan', 'from .clip4clip import CLIP4Clip', 'models.stan imports models.clip4clip'),
    ('models.stan', 'from ..models.clip4clip import CLIP4Clip', 'models.stan imports models.clip4clip'),
    ('models.stan', 'from . import clip4clip', 'models.stan imports models.clip4clip'),
    ('models.stan', 'import vidlab.models.clip4clip', 'models.stan imports models.clip4clip'),
    ('models.stan', 'from vidlab.models import clip4clip as other', 'models.stan imports models.clip4clip'),
    ('models.stan', 'def f():\n    from vidlab.models.clip4clip import CLIP4Clip', 'models.stan imports models.clip4clip'),
    ('models.clip4clip', 'from .stan import STAN', 'models.clip4clip (30.30) imports models.stan (30.31)'),
    ('models.stan', 'from ..tasks import Task', 'models.stan imports tasks'),
    ('models.stan', 'from .. import tasks', 'models.stan imports tasks'),
    ('models.stan', 'from vidlab import tasks', 'models.stan imports tasks'),
    ('models.stan', 'from ..tasks.base import Task', 'models.stan imports tasks.base'),
    ('tasks.base', 'from .retrieval import RetrievalTask', 'tasks.base (38.10) imports tasks.retrieval (38.20)'),
    ('tasks.sorting', 'from . import same_class', 'tasks.sorting (38.60) imports tasks.same_class (38.70)'),
    ('tasks.sorting', 'from . import RetrievalTask', 'tasks.sorting (38.60) imports tasks (39)'),
    ('tasks', 'from ..learner import Learner', 'tasks (39) imports learner (40)'),
    ('evaluate', 'from .tasks import RetrievalTask', ''),
    ('viz', 'from .tasks import RetrievalTask', 'viz imports tasks'),
    ('viz', 'from .data.clips import Clips', 'viz imports data.clips'),
    ('results', 'from .data.shapes import MOTIONS', 'results imports data.shapes'),
    ('models.stan', 'from ..train import run', 'models.stan (30.31) imports train (50)'),
    ('models.stan', 'from ..data.sample import clip_times', 'models.stan imports data.sample'),
    ('models.stan', 'from ..data import sample', 'models.stan imports data.sample'),
    ('models.stan', 'import importlib; importlib.import_module("vidlab.data.sample")', 'models.stan imports data.sample'),
    ('data.sample', 'from ..models.stan import STAN', 'data.sample imports models.stan'),
    ('data.sample', 'from .. import models', 'data.sample imports vidlab.models, which no page exports'),
    ('data.sample', 'from .clips import Clips', 'data.sample (10.10) imports data.clips (10.15)'),
    ('core', 'from . import clip', 'core (00) imports clip (20)'),
    ('losses', 'class A:\n    def f(self):\n        import vidlab.metrics as m', 'losses (23) imports metrics (24)'),
    ('losses', 'import vidlab\ndef f(): return vidlab.train.run()', 'losses (23) imports train (50)'),
    ('losses', 'from .nowhere import x', 'losses imports vidlab.nowhere, which no page exports'),
]

@pytest.mark.parametrize('module,line,said', PLANTED, ids=lambda v: re.sub(r'\s+', ' ', v))
def test_planted_breach(module, line, said, tmp_path):
    shutil.copytree(ROOT/'vidlab', tmp_path/'vidlab', ignore=shutil.ignore_patterns('__pycache__'))
    page = module_file(tmp_path/'vidlab', module)
    page.write_text(page.read_text(encoding='utf-8') + '\n' + line + '\n', encoding='utf-8')
    found = list(breaches(tmp_path/'vidlab', module))
    assert said in found if said else found == []

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_page(page):
    nb = json.loads(page.read_text(encoding='utf-8'))
    ids = [c.get('id') for c in nb['cells']]
    assert None not in ids and len(set(ids)) == len(ids), 'cell ids are missing or repeat'
    assert nb['metadata'].get('kernelspec', {}).get('name') == 'python3', 'no kernel: papermill cannot run it'
    assert page.stat().st_size < 1 << 20, 'over 1 MB: show less'
    for c in nb['cells']:
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', f'stored error: {o.get("evalue")}'
            assert not any('widget-view' in k for k in o.get('data', {})), 'a widget whose kernel is gone: JupyterLab shows an error in place of its picture'
            text = json.dumps(o.get('text', '')) + json.dumps({k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')})
            assert not re.search(r'(?<![\w.~])/(home|root|work|Users|tmp)/', text), f'a machine path in an output: {text[:200]}'
    first = source(nb['cells'][0])
    assert nb['cells'][0]['cell_type'] == 'markdown' and re.match(r'# \S.*\n', first + '\n'), 'the first cell is a title'

@pytest.mark.parametrize('page', [p for p in PAGES if p.parent.name in ('tour', 'runs')], ids=lambda p: p.stem)
def test_what_looks_like_parameters_is_found_by_papermill(page):
    "A cell of annotated literals and nothing else carries the tag: without it papermill writes its values above, and they are lost"
    def literals(c):
        body = ast.parse(source(c)).body if c['cell_type'] == 'code' and not source(c).lstrip().startswith(('%', '!', '#|')) else []
        return body and all(isinstance(n, ast.AnnAssign) for n in body)
    assert [source(c)[:60] for c in cells(page) if literals(c) and 'parameters' not in c['metadata'].get('tags', [])] == []

@pytest.mark.parametrize('page', RUNS, ids=lambda p: p.stem)
def test_run_page(page):
    "papermill finds one parameters cell of annotated literals; no definitions in a run page"
    tagged = [c for c in cells(page) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for node in ast.parse(source(tagged[0])).body:
        assert isinstance(node, ast.AnnAssign), f'line {node.lineno}: only `name:type = literal  # meaning`'
        ast.literal_eval(node.value)
    for c in cells(page):
        if c['cell_type'] == 'code' and not source(c).startswith('%'):
            assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(ast.parse(source(c)))), 'definitions belong to an exported page'

def test_import_is_quiet():
    "Importing the package and every module prints nothing and does not initialise CUDA"
    code = ('import sys, torch, vidlab, pkgutil, importlib\n'
            'assert not [m for m in sys.modules if m.split(".")[0] in ("open_clip", "decord", "av", "matplotlib", "pandas", "torchvision")]\n'
            'import vidlab.core\n'
            'for m in pkgutil.walk_packages(vidlab.__path__, "vidlab."): importlib.import_module(m.name)\n'
            'assert not torch.cuda.is_initialized()')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert (r.returncode, r.stdout, r.stderr) == (0, '', '')

def test_core_needs_only_torch_and_numpy():
    "`import vidlab` and `vidlab.core` work where nothing else is installed"
    code = ('import sys\n'
            'allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "vidlab"}\n'
            'import torch, numpy\n'
            'class Only:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        top = name.split(".")[0]\n'
            '        if top in ("open_clip", "decord", "av", "pandas", "timm", "accelerate", "torchvision", "matplotlib", "fastcore", "pyarrow", "einops", "yaml"): raise ImportError(top)\n'
            'sys.meta_path.insert(0, Only())\n'
            'import vidlab, vidlab.core, vidlab.registry, vidlab.attend, vidlab.ckpt')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr

def test_readme_is_the_index_page():
    from nbconvert import MarkdownExporter
    body, _ = MarkdownExporter().from_filename(str(ROOT/'nbs'/'index.ipynb'))
    assert (ROOT/'README.md').read_text(encoding='utf-8').strip() == body.strip(), 'README.md is not nbs/index.ipynb: run `make export`'
