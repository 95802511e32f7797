"The profile of time: what every condition shows, and models whose answer is known"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vidlab.core import RunFolder, read_json, write_json
from vidlab.data.shapes import make_shapes
from vidlab.data.manifest import Manifest
from vidlab.models.clip4clip import CLIP4Clip
from vidlab.profile import CONDITIONS, STILLS, conditions, profile_by, profile_columns, profile_summary, profile_table, shown_as, time_profile
from vidlab.registry import create_model
from vidlab.stats import Shown
from vidlab.tasks import Evaluation, RecognitionTask, RegressionTask, RetrievalTask, SameClassTask
from vidlab.train import config_from, kept_profile, run_eval, run_profile


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
    assert t['within pair']['as it is'] == t['within pair']['reversed'] and float(t['value']['as it is']) == pytest.approx(read_json(run_eval(cfg)/'eval'/'test.json')['metrics']['t2v/R1'])
    _, task0, seen0, rows0 = run_profile(cfg, shuffles=0)
    assert 'shuffled' not in profile_table(task0, seen0, rows0).index and list(profile_summary(task0, seen0, rows0)) == ['several frames', 'order alone decides', 'turns with the film']
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


# ------------------------------------------------------------------------------------------------- frames seen once
HEADS = ('meanP', 'seqLSTM', 'seqTransf', 'tightTransf', 'mug')

def sides(model, clips=5, frames=4):
    "Loaders of noise for retrieval; of one clip the last frames are padding"
    g, i = torch.Generator().manual_seed(0), torch.arange(clips)
    video = torch.randint(0, 256, (clips, frames, 3, model.card.size, model.card.size), dtype=torch.uint8, generator=g)
    words, mask = torch.randint(1, 400, (clips, 6), generator=g), torch.ones(clips, frames).bool()
    mask[1, 3:] = False
    part = lambda j: dict(video=video[j], video_mask=mask[j], sid=j, view=0*j, label=j % 3, target=j.float())
    return dict(video=[part(i[:3]), part(i[3:])], text=[dict(text=words, text_mask=words > 0, sid=i, view=0*i)])

def pictures_of(model): # list that grows by the number of pictures whenever the tower runs
    seen = []
    encode = model.clip.encode_image
    model.clip.encode_image = lambda x, **kw: (seen.append(len(x)), encode(x, **kw))[1]
    return seen

@pytest.mark.parametrize('head', HEADS)
def test_frames_encoded_once_say_the_same(head, monkeypatch):
    torch.manual_seed(0)
    model = create_model('clip4clip', preset='tiny', head=head, max_frames=4)
    if head in ('seqTransf', 'tightTransf', 'seqLSTM'):
        for p in model.parameters(): p.data += .1*torch.randn_like(p)                  # so that the order matters
    task = RetrievalTask(model)
    seen = pictures_of(model)
    once = time_profile(task, sides(model), shuffles=2)
    assert sum(seen) == 5*4
    monkeypatch.setattr(CLIP4Clip, 'framewise', False)
    del seen[:]
    each = time_profile(task, sides(model), shuffles=2)
    assert sum(seen) == 5*4*len(conditions(2))
    for w in each: torch.testing.assert_close(once[w]['arrays']['sim'], each[w]['arrays']['sim'], rtol=1e-4, atol=1e-4)
    if head == 'meanP': assert torch.equal(once['as it is']['arrays']['sim'], once['reversed']['arrays']['sim'])          # to the last bit
    apart = (each['as it is']['arrays']['sim'] - each['reversed']['arrays']['sim']).abs().max()
    assert (apart < 1e-3) == (head in ('meanP', 'mug')), apart


def test_frames_seen_with_their_neighbours_are_encoded_anew():
    "A patch over three frames: what is rearranged are the pixels"
    model = create_model('clip4clip', preset='tiny', patch='3d', max_frames=4)
    seen = pictures_of(model)
    time_profile(RetrievalTask(model), sides(model), shuffles=0)
    assert not model.framewise and sum(seen) == 5*4*len(CONDITIONS)


# ------------------------------------------------------------------------------------------- tasks of which the answer is known
def known(tmp_path, n=24):
    "Rows of clips and their reverse, in pairs; the label is the direction"
    for i in range(n): (tmp_path/f'{i}.mp4').touch()
    rows = Manifest.build(dict(id=[f'c{i}' for i in range(n)], path=[f'{i}.mp4' for i in range(n)], label=[i % 2 for i in range(n)], pair=[f'p{i//2}' for i in range(n)],
                               motion=['one', 'other']*(n//2)), tmp_path)
    rows.by = 'motion'
    g = torch.Generator().manual_seed(1)
    ramp, level = torch.linspace(0, 1, 6), .2*torch.rand(n//2, generator=g).repeat_interleave(2)
    dots = torch.where(torch.arange(n)[:, None] % 2 == 0, ramp, ramp.flip(0)) + level[:, None]
    i = torch.arange(n)
    video = dots[..., None, None, None].expand(n, 6, 3, 2, 2).contiguous()
    return rows, dict(video=[dict(video=video[j], video_mask=torch.ones(len(j), 6).bool(), sid=j, view=0*j, label=j % 2, target=(j % 2).float()) for j in i.split(7)])

class Toy(torch.nn.Module):
    "Brightness of the frames: their mean, or the last minus the first"
    card = type('Card', (), dict(classes=2, mean=(0.,)*3, std=(1.,)*3, name='toy'))()
    framewise = True
    def __init__(self, timed, classes=2):
        super().__init__()
        self.w, self.timed = torch.nn.Parameter(torch.zeros(1)), timed
        self.card = type('Card', (), dict(classes=classes, mean=(0.,)*3, std=(1.,)*3, name='toy'))()
    def frame_features(self, video): return video.flatten(2).mean(2, keepdim=True)
    def encode_video(self, video, mask=None):
        x = (video if video.ndim == 3 else self.frame_features(video))[..., 0]
        d = x[:, -1] - x[:, 0] if self.timed else x.sort(1).values.mean(1)        # sorted: the same sum to the last bit
        return torch.stack([d, -d], 1) if self.timed else torch.stack([d, 1 - d], 1)
    def forward(self, b):
        x = self.encode_video(b['video'], b['video_mask'])
        return dict(logits=x if self.card.classes == 2 else -x[:, :1])

def made(kind, timed):
    if kind == 'recognition': return RecognitionTask(Toy(timed), classes=['down', 'up'][::-1])
    return RegressionTask(Toy(timed, 1)) if kind == 'regression' else SameClassTask(Toy(timed, 0))

@pytest.mark.parametrize('kind', ['recognition', 'regression', 'same_class'])
@pytest.mark.parametrize('timed', [False, True])
def test_what_is_blind_to_order_and_what_is_not(kind, timed, tmp_path):
    "A bag of frames has the same number in any order and 50 within a pair; a model of the direction turns with the film"
    rows, loaders = known(tmp_path)
    task = made(kind, timed)
    seen = time_profile(task, loaders, rows)
    t, short, by = profile_table(task, seen, rows), profile_summary(task, seen, rows), profile_by(task, seen, rows)
    same = t['value'][['as it is', 'reversed', 'shuffled']].astype(float)
    assert (same.max() - same.min() < 1e-9) == (not timed)
    assert t['blind to order'][['as it is', 'reversed', 'shuffled']].tolist() == [task.column(task.monitor).show(float(t['value'].iloc[0]))]*3
    assert t['blind to order']['first frame'] == '' and all('±' in str(v) for v in [*t['value'], *t['against'], *by.to_numpy().ravel()])
    if not timed:
        assert t['p'][['reversed', 'shuffled']].tolist() == [1, 1] and short['order'].value == 0
    if kind != 'recognition':
        assert 'within pair' not in t and 'turns with the film' not in short
        return
    pair = t['within pair']
    assert all('±' in str(v) for v in pair) and (float(pair['as it is']), float(pair['reversed'])) == ((100, 0) if timed else (50, 50))
    assert short['turns with the film'].value == (100 if timed else 0) and short['turns with the film'].half > 0 and short['turns with the film'].groups == 12
    assert float(t['value']['reversed']) == (0 if timed else 50) and task.within_pairs(Evaluation(seen['as it is']['arrays'], rows)).groups == 12


def test_a_profile_is_kept_with_its_run(shapes):
    "Measured once; again when the weights or what is measured change"
    f = run_eval(of(shapes, 'shapes_meanP', preset='tiny', clip='tiny', weights='random'))
    first = kept_profile(f, shuffles=1)
    at = f/'profile'/'test.json'
    when = at.stat().st_mtime_ns
    assert kept_profile(f, shuffles=1) == first == read_json(at) and at.stat().st_mtime_ns == when
    t = profile_columns({'a': first, 'b': first})
    assert {'as it is', 'reversed', 'shuffled', 'best single frame', 'order alone decides'} <= set(t) and all(isinstance(v, Shown) for v in t.to_numpy().ravel())
    assert float(t['as it is']['a']) == pytest.approx(read_json(f/'eval'/'test.json')['metrics']['t2v/R1'])
    said = read_json(f/'eval'/'test.json')
    write_json(f/'eval'/'test.json', dict(said, protocol=dict(said['protocol'], weights=dict(sha256='other'))))
    kept_profile(f, shuffles=1)
    assert at.stat().st_mtime_ns > when
