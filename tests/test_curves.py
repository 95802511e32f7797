"""Losses of 20 steps of every `shapes` recipe, pinned for each version of torch: a change of numbers is seen, and then either explained or undone.

`python tests/test_curves.py` writes the values of the torch that is installed into curves.json, beside those of the others: do it for a new version of torch, or after a change that means to move
numbers, and say in the commit which recipes moved and why. Recipes run as they are, but in fp32 on one thread, from random weights, on a few small clips and at a twentieth of the rate: at the full one,
batches of four are so wild that another order of a sum is another loss after three steps."""
import dataclasses, functools, json, os, sys, tempfile
from pathlib import Path

import pytest, torch

HERE = Path(__file__).resolve().parent
if __name__ == '__main__': sys.path.insert(0, str(HERE.parent))
from vidlab.build import build_learner
from vidlab.config import config_from, list_recipes
from vidlab.core import RunFolder, seed_everything
from vidlab.data import shapes
from vidlab.learner import make_engine
from vidlab.registry import lookup

PINNED, STEPS = HERE/'curves.json', 20
VERSION = torch.__version__.split('+')[0]
WITHIN = 1.5e-5        # of the loss; other instructions (SSE, AVX2, AVX-512 of ATen, oneDNN and MKL) and two threads moved it by at most 4.7e-6, a rate 1.01 times as large by 1e-3 in most recipes, weight decay left out by 4e-5
NEWER = 2e-2           # for a version that has no values of its own yet
RECIPES = [r for r in list_recipes() if r.startswith('shapes_') and lookup('task', config_from(r).task).trains() and not r.endswith('_zeroshot')]
SIZES = dict(clips=dict(train=16, val=1, test=1), narrated=dict(train=16, val=1, test=1), long=dict(train=4, val=1, test=1))


def make_data(folder):
    "Clips without loss: what an encoder leaves out is its own affair, and moved losses by up to 2.5e-3"
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(shapes, 'encode', functools.partial(shapes.encode, crf=0))
        return shapes.make_shapes(folder, kinds=tuple(SIZES), sizes=SIZES)


def curve(recipe, data, folder): # 20 losses
    cfg = config_from(recipe)
    size = 2 if cfg.options.get('kind') == 'long' else 4
    random = {k: 'random' for k in ('weights', 'text_weights', 'teacher_weights') if cfg.options.get(k) == 'shapes'}
    cfg = config_from(recipe, data_path=str(data), val_split='', test_split='', start='', precision='fp32', device='cpu', workers=0, check=False, batch_size=size, epochs=5 if size == 4 else 10, log_every=100,
                      lr=cfg.lr/20, **random)
    seed_everything(cfg.seed)
    torch.set_num_threads(1)
    learn = build_learner(cfg, RunFolder(folder), make_engine('fp32', 'cpu'))
    learn.raw_task.train()
    out = []
    while len(out) < STEPS:
        for batch in learn.train.epoch(learn.epoch):
            learn.one_step([batch])
            learn.step += 1
            out.append(float(learn.out['loss']))
        learn.epoch += 1
    return out[:STEPS]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('curves'))


def pinned(): # values, limit, what to say
    known = json.loads(PINNED.read_text())
    if VERSION in known: return known[VERSION], WITHIN, f'of torch {VERSION}'
    nearest = max(known, key=lambda v: tuple(int(x) for x in v.split('.')[:2]))
    return known[nearest], NEWER, f'of torch {nearest}, since {VERSION} has none of its own; `python tests/test_curves.py` adds them'


@pytest.fixture
def threads():
    "The number of threads is put back"
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.mark.long
@pytest.mark.usefixtures('threads')
@pytest.mark.parametrize('recipe', RECIPES)
def test_losses_are_those_that_were_pinned(recipe, data, tmp_path):
    want, limit, said = pinned()
    assert recipe in want, f'{recipe} has no values {said}: `python tests/test_curves.py` writes them'
    got = curve(recipe, data, tmp_path)
    off = [abs(a - b)/max(abs(b), 1e-6) for a, b in zip(got, want[recipe], strict=True)]
    step = next((i for i, o in enumerate(off) if o > limit), None)
    assert step is None, f'{recipe}: step {step} has loss {got[step]:.8g}, pinned is {want[recipe][step]:.8g} ({said}): see the head of this file'


def test_every_recipe_is_pinned():
    known = json.loads(PINNED.read_text())
    for version, curves in known.items():
        assert set(curves) == set(RECIPES), (version, set(RECIPES) ^ set(curves))
        assert all(len(c) == STEPS and len(set(c)) > 1 for c in curves.values())


if __name__ == '__main__':
    known = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    with tempfile.TemporaryDirectory() as d:
        home = make_data(Path(d)/'data')
        known[VERSION] = {r: [float(f'{x:.8g}') for x in curve(r, home, Path(d)/r)] for r in RECIPES}
    lines = {v: ',\n'.join(f'  {json.dumps(r)}: {json.dumps(c)}' for r, c in sorted(curves.items())) for v, curves in sorted(known.items())}
    PINNED.write_text('{\n' + ',\n'.join(f'{json.dumps(v)}: {{\n{text}\n}}' for v, text in lines.items()) + '\n}\n')
    print(f'{len(RECIPES)} recipes of torch {VERSION} in {PINNED.name}')
