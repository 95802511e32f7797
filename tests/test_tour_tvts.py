"The tour of TVTS on a few clips, and what it stands on: pretraining, then each way to use the checkpoint."
import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vidlab.core import read_json
from vidlab.data.shapes import make_shapes
from vidlab.results import load_eval
from vidlab.train import config_from, run, run_eval

PAGE = Path(__file__).parents[1]/'nbs'/'tour'/'tvts.ipynb'
OWN = {'epochs', 'caption_epochs', 'down_epochs', 'batch_size', 'workers', 'data_path'}

@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips', 'narrated'), sizes=dict(clips=dict(train=8, val=6, test=6), narrated=dict(train=8, val=4, test=4)))

pytestmark = pytest.mark.usefixtures('outputs')

def weights(folder): return load_file(folder/'ckpt'/'best'/'weights.safetensors')
def metrics(folder): return read_json(folder/'eval'/'test.json')['metrics']

def test_pretraining_and_what_follows(shapes):
    "`latest:` finds the checkpoint, the encoder goes over whole, a probe leaves it as it is"
    few = dict(data_path=str(shapes), workers=0, text='clip:tiny', text_weights='random', device='cpu')
    down = dict(data_path=str(shapes), workers=0, epochs=1, batch_size=4, device='cpu')
    first = run(config_from('shapes_tvts', epochs=1, batch_size=4, **few))
    assert {'places', 'sorted'} <= set(metrics(first))
    encoder = {k.removeprefix('video_model.'): v for k, v in weights(first).items() if k.startswith('video_model.')}
    second = run(config_from('shapes_tvts_captions', epochs=1, batch_size=4, **few))
    t2v, v2v = (run_eval(config_from(r, **few)) for r in ('shapes_tvts_zeroshot', 'shapes_tvts_v2v'))
    assert metrics(t2v)['videos'] == metrics(v2v)['clips'] == 6 and 't2v/R1' in metrics(t2v) and 'v2v/R1' in metrics(v2v)
    sims = [load_eval(f)['arrays']['sim'] for f in (t2v, run_eval(config_from('shapes_tvts_zeroshot', start='', **few)))]
    assert not torch.allclose(*sims)                                  # the weights are not those it starts with
    probe, ft = (run(config_from(r, **down)) for r in ('shapes_tvts_probe', 'shapes_tvts_ft'))
    for f in (second, t2v, v2v, probe, ft): assert read_json(f/'config.json')['start'] == str(first.path)
    assert all(torch.equal(v, weights(probe)[k]) for k, v in encoder.items()) and set(weights(probe)) - set(encoder) == {'head.weight', 'head.bias'}
    assert not torch.equal(encoder['blocks.0.attn.qkv.weight'], weights(ft)['blocks.0.attn.qkv.weight'])
    assert 0 <= metrics(probe)['top1'] <= 100 and 0 <= metrics(ft)['top1'] <= 100

def test_parameters_are_annotated_literals():
    cell = next(c for c in json.loads(PAGE.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    body = ast.parse(''.join(cell['source'])).body
    assert all(isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant) for n in body)
    assert {n.target.id for n in body} == OWN

@pytest.mark.long
def test_papermill_tour(shapes, tmp_path):
    "Every training of the page, once over a few clips"
    out, few = tmp_path/'tour.ipynb', dict(epochs=1, caption_epochs=1, down_epochs=1, batch_size=4, workers=0, data_path=shapes)
    r = subprocess.run([sys.executable, '-m', 'papermill', str(PAGE), str(out), '--no-progress-bar', *(x for k, v in few.items() for x in ('-p', k, str(v)))], capture_output=True, text=True, cwd=PAGE.parents[2])
    assert r.returncode == 0, r.stderr[-3000:]
    runs = [p for p in (tmp_path/'outputs').glob('*/*') if (p/'config.json').exists() and not (p/'profile.json').exists()]
    assert all(read_json(p/'status.json')['state'] == 'done' for p in runs)
    (first,) = [p for p in runs if p.parent.name == 'shapes_tvts' and (p/'metrics.jsonl').exists()]
    (second,) = [p for p in runs if p.parent.name == 'shapes_tvts_captions']
    stage = {'': 0, str(first): 1, str(second): 2}
    starts = Counter((p.parent.name, stage[read_json(p/'config.json')['start']]) for p in runs)
    uses = {('shapes_tvts_' + r, s): n for r, n in dict(zeroshot=2, v2v=1, probe=1).items() for s in (0, 1, 2)}
    assert starts == {('shapes_tvts', 0): 2, ('shapes_tvts_captions', 1): 1, ('shapes_tvts_ft', 0): 1, ('shapes_tvts_ft', 1): 1, **uses}
    page = json.loads(out.read_text())
    text = json.dumps(page)
    for word in ('word is empty', 'too short for 4 pieces', 'attention to the own piece', 'fine-tuning, top-1', 'and captions'): assert word in text, word
    assert sum(any(k.startswith('image/') for k in o.get('data', {})) for c in page['cells'] for o in c.get('outputs', [])) >= 10
    assert PAGE.stat().st_size < 900_000
