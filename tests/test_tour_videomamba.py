"The tour of VideoMamba, which trains several models, on a few clips."
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
from vidlab.core import read_json
from vidlab.data.shapes import make_shapes

PAGE = Path(__file__).parents[1]/'nbs'/'tour'/'videomamba.ipynb'

def source(cell): return ''.join(cell['source'])

def test_parameters_are_annotated_literals():
    import ast
    cell = next(c for c in json.loads(PAGE.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    body = ast.parse(source(cell)).body
    assert all(isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant) for n in body)
    assert {n.target.id for n in body} == {'epochs', 'pretrain_epochs', 'long', 'long_epochs', 'batch_size', 'workers', 'data_path'}

@pytest.mark.long
def test_papermill_tour(tmp_path):
    "Every training of the page, once over a few clips"
    root = make_shapes(tmp_path/'shapes', kinds=('clips', 'long'), sizes=dict(clips=dict(train=8, val=6, test=6), long=dict(train=4, val=4, test=4)))
    few = dict(epochs=1, pretrain_epochs=1, long_epochs=1, batch_size=4, workers=0, data_path=root)
    out = tmp_path/'tour.ipynb'
    r = subprocess.run([sys.executable, '-m', 'papermill', str(PAGE), str(out), '--no-progress-bar', *(x for k, v in few.items() for x in ('-p', k, str(v)))],
                       capture_output=True, text=True, cwd=PAGE.parents[2], env={**os.environ, 'VIDLAB_OUTPUTS': str(tmp_path/'outputs')})
    assert r.returncode == 0, r.stderr[-3000:]
    done = {p.parent.name: p for p in (tmp_path/'outputs').glob('*/*') if not (p/'profile.json').exists()}
    short = {'shapes_probe', 'shapes_videomamba', 'shapes_videomamba_pretrain', 'shapes_videomamba_ft'}
    assert set(done) == short | {'shapes_long', 'shapes_long_probe', 'shapes_long_regression', 'shapes_long_regression_probe'}
    assert all(read_json(p/'status.json')['state'] == 'done' and read_json(p/'config.json')['epochs'] == 1 for p in done.values())
    assert str(done['shapes_videomamba_pretrain']) in read_json(done['shapes_videomamba_ft']/'config.json')['start']
    page = out.read_text()
    for word in ('VideoMamba after pretraining', 'mean squared error', 'kept MiB'): assert word in page, word
    assert sum('image/png' in o.get('data', {}) for c in json.loads(page)['cells'] for o in c.get('outputs', [])) >= 12
