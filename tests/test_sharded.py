"A model in parts on several processes equals one in one piece; checkpoints in parts, whole again by one call; checkpoints that are written while training goes on."
import json, threading, time
from pathlib import Path

import pytest
import torch
import warm

import kills
from sharded_ranks import SYSTEMS
from test_owner import shapes, small                            # noqa: F401 the fixture
from vidlab.ckpt import find_checkpoint, load_checkpoint
from vidlab.core import read_json
from vidlab.learner import Learner, make_engine
from vidlab.train import launch, make_config, run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('outputs')


def ranks(tmp_path, *what):
    "What two processes found"
    out = {}
    for line in '\n'.join(warm.ranks([ROOT/'tests'/'sharded_ranks.py', tmp_path, *what])).splitlines():
        if line.startswith('found '): out |= json.loads(line[6:])
    assert set(out) == set(what)
    return out


def equals(found):
    "Four clipped steps: losses and weights to 1e-5, and the weights have moved farther than that; blocks were units; the last checkpoint is in one piece"
    for s, f in found.items():
        assert f['loss'] < 1e-5 and f['norm'] < 1e-5 and f['weights'] < 1e-5 < f['moved'] and f['units'] > 2 and f['whole'], (s, f)


@pytest.mark.slow
def test_a_system_in_parts_equals_one_in_one_piece(tmp_path):
    "And a number without dimensions, whose gradient is another in each process"
    found = ranks(tmp_path, 'clip4clip', 'single')
    assert found.pop('single') == dict(same=True, learns=True)
    equals(found)


@pytest.mark.long
def test_every_system_in_parts_equals_one_in_one_piece(tmp_path): equals(ranks(tmp_path, *SYSTEMS))


@pytest.mark.long
def test_checkpoints_in_parts_and_whole_lead_to_the_same(tmp_path):
    "Stopped in the middle of the second epoch, in parts or in one piece, and gone on with either way; also where they are written while training goes on"
    for found in ranks(tmp_path, 'parts', 'async').values():
        for way, f in found.items(): assert f['loss'] < 1e-5 and f['weights'] < 1e-4 and f['parts'] == way.startswith('fsdp'), (way, f)


@pytest.mark.long
def test_a_run_in_parts(shapes, warm_ranks):
    "Two processes with evaluation, best epoch and test numbers; then one process goes on with it"
    kw = dict(epochs=2, seed=3)
    one, two = run(small(shapes, **kw)), launch(small(shapes, parallel='fsdp', async_save=True, save_every=1, **kw), 2)
    for name in ('last', 'best'):
        a, b = (load_checkpoint(f/'ckpt'/name) for f in (one, two))
        assert 'parts' not in b and a['weights'].keys() == b['weights'].keys()
        moved = torch.cat([(a['weights'][k] - b['weights'][k]).abs().flatten() for k in a['weights'] if a['weights'][k].is_floating_point()])
        assert (moved > 1e-4).float().mean() < .01
    assert read_json(one/'eval'/'test.json')['metrics'] == read_json(two/'eval'/'test.json')['metrics']
    more = run(small(shapes, **dict(kw, epochs=3)), str(two.path))
    assert more.status()['state'] == 'done' and more.status()['epoch'] == 3


def test_what_a_model_in_parts_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"parallel 'fsdp': set ema=0, compile=False, optimizer=adamw, or parallel=ddp"): make_config(parallel='fsdp', ema=.9, compile=True, optimizer='bertadam')
    with pytest.raises(ValueError, match="did you mean 'fsdp'"): make_config(parallel='fsdp2')
    assert make_config(parallel='fsdp').parallel == 'fsdp'

# ---------------------------------------------------------------------------------------------------- written while training goes on


def learner(folder, **kw):
    torch.manual_seed(0)
    task = kills.Toy()
    return Learner(task, torch.optim.AdamW(task.parameters(), lr=.1), kills.Rows(), folder, 4, make_engine(device='cpu'), save_every=1, **kw)


def same(a, b):
    a, b = (load_checkpoint(p/'ckpt'/'last') for p in (a, b))
    return all(torch.equal(a['weights'][k], b['weights'][k]) for k in a['weights']) and str(a['state']) == str(b['state'])


def test_what_is_written_aside_is_what_would_have_been_written(tmp_path):
    "Every checkpoint, not only the last one; with averaged weights"
    class Copy:
        def __init__(self): self.steps = {}
        def after_step(self, learn):
            learn.save()
            learn.written()
            self.steps[learn.step] = load_checkpoint(learn.folder/'ckpt'/'last')
    a, b = Copy(), Copy()
    learner(tmp_path/'a', ema=.5, cbs=[a]).fit()
    learner(tmp_path/'b', ema=.5, cbs=[b], async_save=True).fit()
    assert a.steps.keys() == b.steps.keys() and len(a.steps) > 4
    for s in a.steps:
        for part in ('weights', 'ema'): assert all(torch.equal(a.steps[s][part][k], b.steps[s][part][k]) for k in a.steps[s][part]), s
        assert str(a.steps[s]['state']) == str(b.steps[s]['state'])
    assert same(tmp_path/'a', tmp_path/'b')


def test_the_optimiser_waits_for_the_copy_and_the_next_save_for_the_file(tmp_path, monkeypatch):
    "A copy and a disk that are slow change nothing in what is written"
    import vidlab.learner as L
    copied, save, busy, seen = L._copied, L.save_checkpoint, [], {}
    def slow_copy(o, into=None):
        if isinstance(o, dict) and 'optimizer' in o: time.sleep(.05)
        return copied(o, into)
    def slow_save(path, weights, card, *args, **kw):
        busy.append(threading.current_thread() is threading.main_thread())
        seen.setdefault(card['step'], []).append({k: v.clone() for k, v in weights.items()})
        time.sleep(.1)
        return save(path, weights, card, *args, **kw)
    monkeypatch.setattr(L, '_copied', slow_copy)
    monkeypatch.setattr(L, 'save_checkpoint', slow_save)
    learner(tmp_path/'a').fit()
    now = {s: w for s, (w, *_) in seen.items()}
    assert all(busy) and len(now) > 10
    busy.clear(), seen.clear()
    learner(tmp_path/'b', async_save=True).fit()
    assert same(tmp_path/'a', tmp_path/'b') and busy and not any(busy) and seen.keys() == now.keys()
    for s, written in seen.items(): assert all(torch.equal(w[k], now[s][k]) for w in written for k in w), s


def test_an_error_while_writing_ends_the_run(tmp_path, monkeypatch):
    import vidlab.learner as L
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(L, 'save_checkpoint', full)
    learn = learner(tmp_path, async_save=True)
    with pytest.raises(OSError, match='No space left'): learn.fit()
    assert learn.folder.status()['state'] == 'failed' and 'No space left' in learn.folder.status()['reason'] and find_checkpoint(tmp_path/'ckpt'/'last') is None


@pytest.mark.long
def test_a_step_waits_for_little_of_a_save(tmp_path):
    "120 MiB of weights and states: what `save` and the optimiser wait for, against a save that is waited for; medians of turns"
    def big(folder, **kw):
        learn = learner(folder, **kw)
        learn.raw_task.model.add_module('big', torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(10)]))
        learn.opt.add_param_group(dict(params=list(learn.raw_task.model.big.parameters())))
        for p in learn.raw_task.parameters(): p.grad = torch.ones_like(p)
        learn.opt.step()
        return learn
    now, aside = big(tmp_path/'a'), big(tmp_path/'b', async_save=True)
    x, stall, whole = torch.randn(256, 1024), [], []
    for _ in range(7):
        t = time.perf_counter()
        now.save()
        whole.append(time.perf_counter() - t)
        t = time.perf_counter()
        aside.save()
        began = time.perf_counter() - t
        aside.raw_task.model.big(x).sum().backward()
        t = time.perf_counter()
        aside.copied.wait()
        stall.append(began + time.perf_counter() - t)
        aside.written()
    ratio = sorted(stall)[3]/sorted(whole)[3]
    assert ratio < .05, (stall, whole)


@pytest.mark.long
def test_a_step_waits_for_little_of_a_save_in_parts(tmp_path):
    "96 MiB in each of two processes: `save` itself, with the end of the one before, and what the optimiser waits for"
    found = ranks(tmp_path, 'stall')['stall']
    assert found['stall'] < .05*found['whole'], found


def test_the_newest_of_those_that_stay(tmp_path):
    learner(tmp_path, keep_every=1, keep_last=2).fit()
    assert sorted(p.name for p in (tmp_path/'ckpt').iterdir()) == ['epoch3', 'epoch4', 'last']
