"Kept features: the numbers of a run on pixels, nothing decoded twice, nothing taken for what it is not."
import os
import numpy as np
import pytest
import torch
import vidlab.data.clips as clips_page
from vidlab.build import build_task, load_manifest, make_clips, make_loader, weights_hash
from vidlab.core import cache_dir
from vidlab.data.features import FrameFeatures, features_key, fill
from vidlab.data.shapes import make_shapes
from vidlab.learner import make_engine
from vidlab.train import launch, make_config, run

pytestmark = pytest.mark.usefixtures('outputs', 'cache')

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    "A small embedded data set: 16 train, 8 val, 8 test clips"
    return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=16, val=8, test=8)))

def config(shapes, **kw):
    base = dict(model='probe', task='recognition', data='shapes', data_path=str(shapes), clip='random', sampler='segment', max_frames=4, epochs=2, batch_size=8,
                eval_batch_size=8, lr=1e-2, workers=0, log_every=1, device='cpu', random_frames=False, keep_features=True)
    return make_config(**{**base, **kw})

def found(folder):
    steps = [r['loss'] for r in folder.metrics() if r['kind'] == 'step']
    return steps + [r['top1'] for r in folder.metrics() if 'top1' in r]

@pytest.fixture
def decoded(monkeypatch):
    "The files that were decoded"
    seen, real = [], clips_page.read_frames
    monkeypatch.setattr(clips_page, 'read_frames', lambda ix, *a, **kw: seen.append(ix.path) or real(ix, *a, **kw))
    return seen

# ------------------------------------------------------------------------------------------------------ runs

def test_a_run_on_kept_features_is_that_on_pixels_and_decodes_each_clip_once(shapes, decoded):
    kept = run(config(shapes))
    assert len(decoded) == 32                                       # 16 + 8 + 8, once each
    again = run(config(shapes, lr=2e-2))
    assert len(decoded) == 32
    plain = run(config(shapes, keep_features=False))
    assert len(decoded) > 64
    np.testing.assert_allclose(found(kept), found(plain), rtol=1e-4)
    assert not np.allclose(found(kept)[1:4], found(again)[1:4], rtol=1e-4)      # the comparison can fail

def test_retrieval(shapes, decoded):
    kw = dict(model='clip4clip', task='retrieval', head='seqTransf', temporal_layers=1, freeze='visual', lr=1e-3, test_split='')
    losses = lambda folder: [r['loss'] for r in folder.metrics() if r['kind'] == 'step']
    kept, plain = run(config(shapes, **kw)), run(config(shapes, keep_features=False, **kw))
    np.testing.assert_allclose(losses(kept), losses(plain), rtol=1e-3)

@pytest.mark.long
def test_two_processes_on_kept_features(shapes, decoded, warm_ranks):
    kw = dict(model='clip4clip', task='retrieval', head='seqTransf', temporal_layers=1, freeze='visual', lr=1e-3, test_split='', seed=43)
    losses = lambda folder: [r['loss'] for r in folder.metrics() if r['kind'] == 'step']
    np.testing.assert_allclose(losses(launch(config(shapes, **kw), 2)), losses(run(config(shapes, **kw))), rtol=1e-3)

# ------------------------------------------------------------------------------------------------------ keys

def test_other_weights_frames_or_files_are_other_features(shapes):
    def key(ds, task): return features_key(ds, dict(weights=weights_hash(task.model)))
    def made(**kw):
        cfg = config(shapes, **kw)
        task = build_task(cfg)
        return make_clips(cfg, 'train', task.model.card, train=True), task
    torch.manual_seed(0)
    ds, task = made()
    first = key(ds, task)
    with torch.no_grad(): task.model.fc.weight.add_(1)              # the head is not what sees the frames
    assert key(ds, task) == first
    for other in (dict(max_frames=3), dict(sampler='dense', window=5), dict(resize='pillow'), dict(decoder='pyav')):
        assert key(made(**other)[0], task) != first, other
    with torch.no_grad(): task.model.clip.visual.proj[0, 0] += 1
    assert key(ds, task) != first
    with torch.no_grad(): task.model.clip.visual.proj[0, 0] -= 1
    path = ds.manifest.row(0)['path']
    was = os.stat(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    try: assert key(ds, task) != first
    finally: os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

# ------------------------------------------------------------------------------- what is stopped, what is damaged

def test_what_was_stopped_goes_on(shapes, tmp_path):
    cfg = config(shapes)
    ds, seen = make_clips(cfg, 'train', 32, train=True), []
    def colour(batch, stop=0):
        if stop and len(seen) >= stop: raise KeyboardInterrupt
        seen.extend(batch['sid'].tolist())
        return batch['video'].float().mean((-2, -1))
    kept = FrameFeatures(tmp_path/'kept', len(ds.manifest))
    with pytest.raises(KeyboardInterrupt): fill(ds, kept, lambda b: colour(b, 8), {}, batch_size=4)
    fill(ds, FrameFeatures(tmp_path/'kept', len(ds.manifest)), colour, {}, batch_size=4)
    assert sorted(seen) == list(range(16))                          # none twice, none left out
    want = ds[11]
    ds.kept = kept
    assert torch.equal(ds[11]['video'], want['video'].float().mean((-2, -1))) and torch.equal(ds[11]['video_mask'], want['video_mask'])

def test_a_file_that_cannot_be_read_is_left_out_of_training(shapes, tmp_path, decoded):
    import shutil
    shutil.copytree(shapes, tmp_path/'s')
    row = load_manifest(config(tmp_path/'s'), 'train').row(3)
    with open(row['path'], 'r+b') as f: f.truncate(400)
    with pytest.warns(UserWarning, match='left out'):
        folder = run(config(tmp_path/'s', batch_size=5, check=False, epochs=1, test_split='', val_split=''))
    assert (folder/'unread.json').exists() and folder.status()['state'] == 'done'

# ----------------------------------------------------------------------------------------------------- refused

def test_what_cannot_be_kept_is_refused_before_work(shapes):
    with pytest.raises(ValueError, match='random_frames=False'): config(shapes, random_frames=True)
    with pytest.raises(ValueError, match="augment='none', repeats=1"): config(shapes, augment='rrc', repeats=2)
    with pytest.raises(ValueError, match='mixup=0.0'): config(shapes, mixup=.8)
    with pytest.raises(ValueError, match="freeze='visual'"): run(config(shapes, model='clip4clip', task='retrieval'))
    with pytest.raises(ValueError, match='several frames at once'): run(config(shapes, model='tdsclip'))
    assert not list(cache_dir('features').iterdir())

def test_workers_and_one_process_give_the_same(shapes):
    cfg = config(shapes, workers=1)
    task = build_task(cfg)
    dl = make_loader(cfg, make_clips(cfg, 'val', task.model.card), make_engine(), task=task)
    assert dl.workers == 0
    shapes_of = next(iter(dl))['video'].shape
    assert tuple(shapes_of) == (8, 4, 64)
