"Long videos: windows as samples of one video, numbers to predict, decoding that seeks."
import time
import numpy as np
import pytest
import torch
from torch import nn
from vidlab.core import rng
from vidlab.data.annots import Manifest
from vidlab.data.clips import Clips, Loader, Unread, collate
from vidlab.data.decode import read_frames
from vidlab.data.files import VideoError
from vidlab.data.index import index_video
from vidlab.data.sample import SegmentSampler, windows
from vidlab.data.shapes import make_shapes
from vidlab.tasks import merge_views


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    root = make_shapes(tmp_path_factory.mktemp('s'), kinds=('long',), sizes=dict(long=dict(train=4, val=1, test=1)))
    return Manifest.read(root/'long'/'train.csv')


def clips(m, **kw): return Clips(m, SegmentSampler(4), size=16, **kw)


def test_windows_of_a_video_are_views_of_one_sample(rows):
    w = rows.windows(40, 30)
    seconds = rows.durations()
    assert len(w) == sum(len(windows(d, 40, 30)) for d in seconds.tolist()) > 2*len(rows)
    ds = clips(w, unit='clip')
    assert len(ds) == len(w) == len(clips(w)) and ds.n_clips == len(rows)
    items = [ds[i] for i in range(len(ds))]
    assert len({(s['sid'], s['view']) for s in items}) == len(ds) and {s['sid'] for s in items} == set(range(len(rows)))
    for i, s in enumerate(items):                                   # frames of the window and no others; the video's label and target
        row, video = w.row(i), rows.row(s['sid'])
        assert row['start'] - .5 <= s['frame_time'].min() and s['frame_time'].max() <= row['end'] + .5
        assert (s['label'], s['target']) == (video['label'], video['target'])
    both = clips(w, unit='clip', views=(2, 3))
    keys = {(int(b['sid']), int(b['view'])) for b in (both[i] for i in range(0, len(both), 5))}
    assert len(both) == 6*len(w) and len(keys) == len(range(0, len(both), 5))
    assert len({both[6*i]['view'] for i in range(3)}) == 3


def test_evaluation_averages_over_all_windows(rows):
    w = rows.windows(40, 30)
    ds, gen = clips(w, unit='clip'), torch.Generator().manual_seed(0)
    b = collate([ds[i] for i in range(len(ds))])
    logits = torch.randn(len(ds), 4, generator=gen)
    sids, prob, y = merge_views(dict(sid=b['sid'], view=b['view'], logits=logits, label=b['label']))
    assert len(sids) == len(rows)
    for s in sids.tolist(): torch.testing.assert_close(prob[s], logits[b['sid'] == s].softmax(1).mean(0))
    one = clips(rows.windows(40, 30, first=True), unit='clip')      # the published score: the first window alone
    assert len(one) == len(rows)
    for i in range(len(one)): assert torch.equal(one[i]['video'], ds[int(np.flatnonzero(ds.sids == i)[0])]['video'])


def test_training_takes_every_window(rows):
    w = rows.windows(40, 30)
    for unit in ('row', 'clip'):
        dl = Loader(clips(w, unit=unit, train=True, seed=2), 4, shuffle=True, seed=2)
        got = [(int(s), int(v), float(t)) for b in dl.epoch(1) for s, v, t in zip(b['sid'], b['view'], b['target'])]
        assert len(set(got)) == len(w)
    again = clips(w, train=True, seed=2)
    assert torch.equal(again[(1, 3)]['video'], clips(w, unit='clip', train=True, seed=2)[(1, 3)]['video'])


def test_windows_survive_a_file_and_times_outside_are_named(rows, tmp_path):
    w = rows.windows(40, 30)
    back = Manifest.read(w.write(tmp_path/'w.jsonl'), root=rows.root, missing='keep')
    assert back.hash() == w.hash() and len(clips(back, unit='clip')) == len(w)
    gone = Manifest.build(dict(id=['a'], path=rows.column('path').to_pylist()[:1], start=[900], end=[960], label=[0]), rows.root)
    with pytest.raises(VideoError, match='00000.mp4.*no frame lies within 900.0..960.0 s'): clips(gone)[0]
    assert isinstance(clips(gone, train=True)[0], Unread)
    listed = Manifest.build(dict(path=rows.column('path').to_pylist()[:1], duration=['100']), rows.root).windows(60, 16)
    assert listed.column('end').tolist() == [e for _, e in windows(100, 60, 16)]


def test_targets_reach_the_batch_as_float32(rows):
    b = next(iter(Loader(clips(rows), 3)))
    assert b['target'].dtype == torch.float32 and b['target'].tolist() == pytest.approx(rows.column('target')[:3].tolist())
    assert 'target' not in next(iter(Loader(clips(Manifest.build(dict(path=rows.column('path').to_pylist()), rows.root)), 2)))


@pytest.mark.parametrize('decoder', ['pyav', 'decord'])
def test_a_window_at_the_end_is_not_decoded_from_the_beginning(rows, decoder):
    ix = index_video(rows.row(0)['path'])
    idx = SegmentSampler(4)(ix.n, ix.fps, ix.times, ix.times[-1] - 10, ix.times[-1])
    def cpu(i): t = time.process_time(); read_frames(ix, i, decoder); return time.process_time() - t
    assert min(cpu(idx) for _ in range(3)) < .5*min(cpu(np.arange(ix.n)) for _ in range(3))
