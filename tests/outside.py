"A copy of the project with pages more in it, as somebody from outside would add them."
import json, re, shutil, sys
from pathlib import Path

import warm

ROOT = Path(__file__).parents[1]

def write_page(path, module, text):
    "A notebook of a title, `default_exp` and exported cells"
    doc, text = re.match(r'\s*"""(.*?)"""\n(.*)', text, re.S).groups()
    code = [f'#| default_exp {module}', *('#| export\n' + c.strip() for c in text.split('#---'))]
    cell = lambda i, kind, s: dict(cell_type=kind, id=f'cell{i}', metadata={}, source=s, **({} if kind == 'markdown' else dict(execution_count=None, outputs=[])))
    cells = [cell(0, 'markdown', f'# {module}\n\n> {doc}'), *(cell(i, 'code', c) for i, c in enumerate(code, 1))]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), nbformat=4, nbformat_minor=5)))

def add_pages(root, pages):
    "Copy the project to `root`, add pages (path below nbs -> module, text), export; the names of the module files that changed"
    for d in ('nbs', 'vidlab', 'data_tools'): shutil.copytree(ROOT/d, root/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'setup.py', 'pyproject.toml'):
        if (ROOT/f).exists(): shutil.copy(ROOT/f, root/f)
    before = {p: p.read_bytes() for p in (root/'vidlab').rglob('*.py')}
    for path, (module, text) in pages.items(): write_page(root/'nbs'/path, module, text)
    warm.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=root, check=True, capture_output=True)
    return {p.name for p in (root/'vidlab').rglob('*.py') if before.get(p) != p.read_bytes()}
