"What CONTRIBUTING.md says is followed to the letter in a copy of the project: its pages are typed in, exported and executed, its commands run."
import json, os, re, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import encode
from vidlab.data.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
PARTS = dict(re.findall(r'^### Add a ([\w ]+)\n(.*?)(?=^### |\Z)', TEXT, re.S | re.M))
SMALL = 'epochs=1 batch_size=4 eval_batch_size=6 workers=0 device=cpu'
MORE = {'model': f'data_path=shapes {SMALL}', 'task': f'data_path=shapes weights=random {SMALL}', 'data set': f'weights=random {SMALL}'}


def blocks(text, *kinds): return re.findall(rf'^```({"|".join(kinds)})\n(.*?)^```', text, re.S | re.M)

def cell(i, kind, text):
    made = dict(cell_type='markdown' if kind == 'markdown' else 'code', id=f'cell{i}', metadata={}, source=text)
    return made if kind == 'markdown' else dict(made, execution_count=None, outputs=[])

def page_of(part): return re.search(r'`(nbs/\S+\.ipynb)`', part)[1]

@pytest.fixture
def copy(tmp_path):
    "The project with the three pages, exported; a small embedded data set, and the gates"
    top = tmp_path
    for d in ('nbs', 'vidlab', 'data_tools'): shutil.copytree(ROOT/d, top/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/f, top/f)
    for part in PARTS.values():
        cells = [cell(i, *b) for i, b in enumerate(blocks(part, 'markdown', 'python'))]
        kernel = dict(kernelspec=dict(name='python3', language='python', display_name='Python 3 (ipykernel)'))
        (top/page_of(part)).write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
        for name, (_, text) in zip(re.findall(r'`(\w+\.yaml)`', part), blocks(part, 'yaml')): (top/name).write_text(text)
    call(top, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    call(top, '-c', 'from vidlab.config import write_parameters; write_parameters("nbs/runs/train.ipynb")')
    make_shapes(top/'made', kinds=('clips',), sizes=dict(clips=dict(train=16, val=4, test=6))).rename(top/'shapes')
    lines = [f'{i} {("red", "blue")[i//2 % 2]} {("opens", "closes")[i % 2]} {split}' for i, split in enumerate(['train']*12 + ['test']*4)]
    for i in range(len(lines)): encode(top/'gates'/'videos'/f'{i}.mp4', n=12, light=lambda t, i=i: 20*t if i % 2 else 240 - 20*t)
    (top/'gates'/'list.txt').write_text('\n'.join(lines) + '\n')
    return top

def call(top, *args):
    env = {k: v for k, v in os.environ.items() if k != 'VIDLAB_OUTPUTS'}
    r = subprocess.run([sys.executable, *args], cwd=top, capture_output=True, text=True, env={**env, 'PYTHONPATH': str(top), 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, f'{args}\n{r.stdout[-2500:]}\n{r.stderr[-2500:]}'
    return r.stdout


def test_there_are_three():
    assert list(PARTS) == ['model', 'task', 'data set'] == list(MORE)
    for part in PARTS.values(): assert blocks(part, 'python') and blocks(part, 'sh')

def test_the_names_are_free():
    "Nothing in the project is called like an example, so that `make test` passes with it"
    for part in PARTS.values():
        page = ROOT/page_of(part)
        others = [p.stem for p in page.parent.glob('*.ipynb') if p != page]
        assert not [n for n in others if n[:2] == page.stem[:2] or n[3:] == page.stem[3:]]

@pytest.mark.long
def test_three_pages_to_type_in(copy):
    for what, part in PARTS.items():
        call(copy, '-c', f'from nbdev.test import nbdev_test; nbdev_test(path="{page_of(part)}", n_workers=0)')
        for line in ''.join(text for _, text in blocks(part, 'sh')).splitlines():
            _, *words = shlex.split(line)
            if words[0] == 'make_manifest': call(copy, '-m', 'data_tools.make_manifest', *words[1:])
            if words[0] == 'train': call(copy, '-c', 'import sys; from vidlab.cli import main; sys.exit(main())', *words, *MORE[what].split())
    states = [(p.parents[1].name, json.loads(p.read_text())['state']) for p in (copy/'outputs').glob('*/*/status.json')]
    assert sorted(states) == [('diffnet', 'done'), ('half_order', 'done'), ('half_order', 'done'), ('shapes_tdsclip', 'done')]
