"The profile of time: what every condition shows, and models whose answer is known"
import json
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vidlab.core import read_json
from vidlab.data.shapes import make_shapes
from vidlab.profile import CONDITIONS, STILLS, conditions, profile_summary, profile_table, shown_as
from vidlab.train import config_from, run_eval, run_profile


@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips', 'narrated'), sizes={k: dict(train=4, val=4, test=12) for k in ('clips', 'narrated')})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9))
def test_places_are_frames_of_the_clip(n, sid):
    for name, places in conditions().items():
        p = np.asarray(places(n, sid))
        assert p.shape == (n,) and p.min() >= 0 and p.max() < n, name
        if name in STILLS: assert len(set(p)) == 1
        if name.startswith('shuffled') or name == 'reversed': assert sorted(p) == list(range(n))
    assert CONDITIONS['double speed'](n, sid)[-1] == n - 1 and CONDITIONS['half the speed'](n, sid)[-1] == (n - 1)//2


def test_a_batch_is_left_as_it_was():
    b = dict(video=torch.arange(12).reshape(2, 6, 1, 1, 1), video_mask=torch.ones(2, 6).bool(), sid=torch.tensor([3, 4]), text=torch.ones(2, 5))
    seen = shown_as(b, CONDITIONS['reversed'])
    assert seen['video'][0].flatten().tolist() == [5, 4, 3, 2, 1, 0] and b['video'][0].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert seen['text'] is b['text']


def of(shapes, recipe, **kw):
    base = dict(data_path=str(shapes), val_split='', workers=0, device='cpu', precision='fp32', max_frames=4, eval_batch_size=5)
    return config_from(recipe, **base, **kw)


def test_frames_averaged_know_no_order(shapes):
    "The same numbers to the last digit in any order, and those of the evaluation"
    cfg = of(shapes, 'shapes_meanP', preset='tiny', clip='tiny', weights='random')
    folder, task, seen, rows = run_profile(cfg, shuffles=2)
    t = profile_table(task, seen, rows)
    assert t['value'][['as it is', 'reversed', 'shuffled']].nunique() == 1 and t['p']['reversed'] == 1
    assert t['within pair']['as it is'] == t['within pair']['reversed'] and t['value']['as it is'] == pytest.approx(read_json(run_eval(cfg)/'eval'/'test.json')['metrics']['t2v/R1'])
    _, task0, seen0, rows0 = run_profile(cfg, shuffles=0)
    assert 'shuffled' not in profile_table(task0, seen0, rows0).index and list(profile_summary(task0, seen0, rows0)) == ['several frames', 'order alone decides']
    said = read_json(folder/'profile.json')
    assert said['summary']['order']['value'] == 0 and said['metric'] == 't2v/R1' and said['protocol']['split'] == 'test' and folder.status()['state'] == 'done'


@pytest.mark.slow
@pytest.mark.parametrize('recipe,kw', [('shapes_videomamba', dict(preset='tiny', depth=2)), ('shapes_tvts', dict(preset='tiny', weights='random'))])
def test_other_tasks_have_one(shapes, recipe, kw):
    "A classifier over time answers otherwise when the frames are turned around; transcripts and their clips are profiled, too"
    folder, task, seen, rows = run_profile(of(shapes, recipe, **kw), shuffles=1)
    t = profile_table(task, seen, rows)
    assert set(t.index) >= {'as it is', 'reversed', 'shuffled', 'best single frame'} and t['value'].between(0, 100).all()
    arrays = [next(v for v in seen[w]['arrays'].values() if v.is_floating_point() and v.ndim == 2) for w in ('as it is', 'reversed')]
    assert not torch.equal(*arrays)
