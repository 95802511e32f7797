"Runs that go on with another number of processes: the same batches, losses, schedules, averaged weights, best epoch and numbers as one that was never broken off."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from test_owner import shapes, small                            # noqa: F401 the fixture
from vidlab.core import read_json
from vidlab.data.clips import Order
from vidlab.tasks.base import generators
from vidlab.train import launch, make_config, run, start_folder

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('outputs')

# every process writes which clips its steps saw, and the run is asked to stop after some step
WATCH = """
import json, os, signal
if 'ELASTIC' in os.environ:
    import vidlab.learner as L
    step = L.Learner.one_step
    def one_step(self, batches):
        with open(os.path.join(os.environ['ELASTIC'], f'{self.step + 1}.{self.engine.process_index}'), 'w') as f: json.dump([b['sid'].tolist() for b in batches], f)
        step(self, batches)
        if self.step + 1 == int(os.environ['STOP_AFTER']): os.kill(os.getpid(), signal.SIGTERM)
    L.Learner.one_step = one_step
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    site = tmp_path/'site'
    site.mkdir()
    (site/'sitecustomize.py').write_text(WATCH)
    monkeypatch.setenv('PYTHONPATH', f'{site}{os.pathsep}{ROOT}')
    def go(cfg, stages, name):
        "Train with so many processes until after so many steps, again and again; (run, {step: clips of its batches})"
        seen, folder = tmp_path/name, None
        seen.mkdir()
        monkeypatch.setenv('ELASTIC', str(seen))
        for nproc, until in stages:
            monkeypatch.setenv('STOP_AFTER', str(until))
            folder = launch(cfg, nproc, str(folder.path) if folder else '')
        assert folder.status()['state'] == 'done'
        return folder, {s: order(seen, s) for s in sorted({int(p.stem) for p in seen.iterdir()})}
    return go


def order(seen, step):
    "The clips of a step: the parts of the processes side by side, one batch after the other"
    parts = [json.loads(p.read_text()) for p in sorted(seen.glob(f'{step}.*'), key=lambda p: int(p.suffix[1:]))]
    return [sum((p[i] for p in parts), []) for i in range(len(parts[0]))]


def rows(folder, kind, key): return {r['step']: r[key] for r in folder.metrics() if r['kind'] == kind and key in r}


@pytest.mark.long
@pytest.mark.parametrize('kind', ['retrieval', 'masked'])
def test_two_then_one_then_four_processes(shapes, watched, kind, warm_ranks):
    "Stopped in the middle of an epoch both times; a contrast over all processes, and masks that are drawn for every clip"
    more = dict(epochs=3, ema=.8, save_every=0, lr=3e-4, schedule='cosine', warmup=.3, seed=5)
    if kind == 'retrieval': cfg = small(shapes, batch_size=4, accum=1, **more)
    else:
        from vidlab.train import config_from
        cfg = config_from('shapes_videomamba_pretrain', data_path=str(shapes), teacher_weights='random', mask='tube', drop_path=0., max_frames=4, batch_size=4, eval_batch_size=8, workers=0, log_every=1, device='cpu',
                          precision='fp32', **more)
    whole, want = watched(cfg, [(1, 0)], 'whole')
    parts, got = watched(cfg, [(2, 3), (1, 6), (4, 0)], 'parts')
    assert got == want and len(got) == 12 and len(want[1][0]) == 4
    for key in ('loss', 'lr'):
        a, b = rows(whole, 'step', key), rows(parts, 'step', key)
        assert list(a) == list(b)
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)                # float32 sums in another order, carried through Adam
    key = dict(retrieval='t2v/MnR', masked='align')[kind]
    np.testing.assert_allclose(list(rows(whole, 'epoch', key).values()), list(rows(parts, 'epoch', key).values()), rtol=1e-3)
    for name in ('last/weights', 'last/ema', 'best/weights'):
        a, b = (load_file(f/'ckpt'/f'{name}.safetensors') for f in (whole, parts))
        moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a if a[k].is_floating_point()])
        assert (moved > 1e-4).float().mean() < .01, name
    assert read_json(whole/'ckpt'/'best'/'card.json')['step'] == read_json(parts/'ckpt'/'best'/'card.json')['step']


def test_every_number_of_processes_shares_one_order():
    one = [k for e in range(2) for b in _batches(e, 0, 1) for k in b]
    for world in (2, 4): assert one == [k for e in range(2) for joined in zip(*(_batches(e, r, world) for r in range(world))) for part in joined for k in part]
    with pytest.raises(ValueError, match=r'choose a multiple of 3, or a number of processes that divides it \(up to 3: 1, 2\)'): Order(16, 8, world=3)


def _batches(epoch, rank, world):
    o = Order(24, 8, shuffle=True, seed=3, drop_last=True, rank=rank, world=world)
    o.epoch = epoch
    return list(o)


@pytest.mark.slow
def test_batches_that_cannot_stay_the_same_are_refused(shapes):
    "17 clips in batches of 32: one process makes one of 17, two make one of 16"
    cfg = small(shapes, batch_size=32, epochs=1, val_split='', test_split='')
    folder = run(cfg)
    state = folder/'ckpt'/'last'/'state.pt'
    s = torch.load(state)
    assert s['joined'] == dict(clips=[16], batches=1, accum=1)
    torch.save(dict(s, world=3, joined=dict(clips=[15], batches=1, accum=1)), state)
    with pytest.raises(ValueError, match=r'15 clips, 1 in an epoch, and 1 processes here make 1 of 16 clips.*go on with 3 processes as before, or with another number that shares 15 clips evenly \(1, 3, 5, 15\)'):
        run(small(shapes, batch_size=32, epochs=2, val_split='', test_split=''), str(folder.path))
