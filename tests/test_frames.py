"Kept frames: the pixels of a decoder in every epoch, for any number of workers; nothing decoded twice; a bounded file that is not left behind."
import gc, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
import multiprocessing as mp
from pathlib import Path
import numpy as np
import pytest
import torch
import vidlab.data.clips as clips_page
from vidlab.data.annots import Manifest
from vidlab.data.clips import Clips, Loader
from vidlab.data.decode import read_frames
from vidlab.data.frames import FrameCache
from vidlab.data.index import index_video
from vidlab.data.sample import SegmentSampler
from vidlab.data.shapes import make_shapes
from vidlab.train import make_config, run

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp('s'), kinds=('clips',), sizes=dict(clips=dict(train=13, val=4, test=1)))

@pytest.fixture
def decoded(monkeypatch):
    "Numbers of the frames that were decoded in this process"
    seen, real = [], clips_page.read_frames
    monkeypatch.setattr(clips_page, 'read_frames', lambda ix, idx, *a, **kw: seen.extend(np.unique(idx).tolist()) or real(ix, idx, *a, **kw))
    return seen

def clips(root, **kw): return Clips(Manifest.read(root/'clips'/'train.csv'), SegmentSampler(4), 32, train=True, augment='rrc flip', **kw)

def batches(ds, epochs, workers=0):
    dl = Loader(ds, 4, workers, shuffle=True)
    try: return [b for e in range(epochs) for b in dl.epoch(e)]
    finally: dl.close()

def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x: assert torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k] == y[k], k

@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_those_without(root, tmp_path, workers):
    "With random frames and crops, from before the first frame is kept until nothing is decoded any more"
    ds, plain = clips(root), batches(clips(root), 3)
    ds.frames = FrameCache(.05, tmp_path)
    for _ in range(2): same(batches(ds, 3, workers), plain)
    assert int(ds.frames.used[0]) > 0

def test_a_frame_is_decoded_once(root, tmp_path, decoded):
    ds = clips(root)
    ds.frames = FrameCache(.05, tmp_path)
    batches(ds, 12)
    n = len(decoded)
    assert n*64*64*3 == int(ds.frames.used[0]) and n < 12*13*4/2
    batches(ds, 12)
    assert len(decoded) == n

def test_more_than_fits_is_decoded_every_time(root, tmp_path, decoded):
    ds, plain = clips(root), batches(clips(root), 2)
    decoded.clear()
    ds.frames = FrameCache(10*64*64*3/2**30, tmp_path)
    same(batches(ds, 2), plain)
    assert int(ds.frames.used[0]) == 10*64*64*3 and len(decoded) > 52
    assert os.stat(ds.frames.path).st_blocks*512 < 2**20

def test_a_file_that_changed_is_another(tmp_path, root):
    src = sorted((root/'clips'/'train').glob('*.mp4'))
    p = tmp_path/'a.mp4'
    p.write_bytes(src[0].read_bytes())
    kept, read = FrameCache(.01, tmp_path), lambda: kept.read(ix := index_video(p), [0, 5], lambda want: read_frames(ix, want))
    first = read()
    p.write_bytes(src[1].read_bytes())
    os.utime(p, ns=(1, 1))
    assert np.array_equal(read(), read_frames(index_video(src[1]), [0, 5])) and not np.array_equal(read(), first)

def test_views_and_pictures(root, tmp_path, decoded):
    "Crops of an evaluation decode once, pictures of a folder are told apart"
    from PIL import Image
    for i in range(6): Image.fromarray(np.full((40, 48, 3), 40*i, np.uint8)).save(tmp_path/f'{i}.png')
    kept, ix = FrameCache(.01, tmp_path), index_video(tmp_path)
    for _ in range(2): assert kept.read(ix, [5, 1, 1], lambda want: read_frames(ix, want))[:, 0, 0, 0].tolist() == [200, 40, 40]
    m = Manifest.read(root/'clips'/'val.csv')
    ds, plain = (Clips(m, SegmentSampler(4), 32, views=(2, 3)) for _ in range(2))
    ds.frames = kept
    for i in (0, 4, 5): assert torch.equal(ds[i]['video'], plain[i]['video'])

def _fill(path_of, kept, out):
    ix = index_video(path_of)
    for _ in range(3): out.put(kept.read(ix, range(0, 12), lambda want: read_frames(ix, want)).sum(dtype=np.int64))

def test_processes_and_threads_write_at_once(root, tmp_path):
    files = sorted((root/'clips'/'train').glob('*.mp4'))[:3]
    kept, context = FrameCache(.05, tmp_path), mp.get_context('fork')
    out = context.Queue()
    ps = [context.Process(target=_fill, args=(f, kept, out)) for f in files for _ in range(2)]
    for p in ps: p.start()
    found = [out.get(timeout=100) for _ in range(18)]
    for p in ps: p.join()
    def read(f): return kept.read(ix := index_video(f), range(15), lambda want: read_frames(ix, want)).sum(dtype=np.int64)
    with ThreadPoolExecutor(4) as pool: again = list(pool.map(read, files*4))
    right = [read_frames(index_video(f), range(15)).sum(dtype=np.int64) for f in files]
    assert again == right*4
    assert sorted(found) == sorted(6*[read_frames(index_video(f), range(12)).sum(dtype=np.int64) for f in files])
    assert int(kept.used[0]) == 3*15*64*64*3

def test_nothing_is_left_behind(tmp_path):
    "By one that ends, nor, when the next begins, by one that was killed; one that is in use stays"
    kept, mine = FrameCache(.001, tmp_path), lambda: sorted(p.name for p in tmp_path.glob('frames-*'))
    code = f'from vidlab.data.frames import FrameCache; k = FrameCache(.001, {str(tmp_path)!r}); print(k.path, flush=True); input()'
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = Path(p.stdout.readline().strip())
    p.kill()
    p.wait()
    assert other.exists() and len(mine()) == 2
    third = FrameCache(.001, tmp_path)
    assert mine() == sorted([Path(kept.path).name, Path(third.path).name])
    del kept, third
    gc.collect()
    assert mine() == []

def test_a_run_and_its_evaluation_share_one(root, outputs, decoded):
    base = dict(model='probe', task='recognition', data='shapes', data_path=str(root), clip='random', sampler='segment', max_frames=4, epochs=3, batch_size=4,
                eval_batch_size=4, lr=1e-2, workers=0, log_every=1, device='cpu', random_frames=False, test_split='')
    found = lambda f: [(r.get('loss'), r.get('top1')) for r in f.metrics() if r['kind'] in ('step', 'epoch')]
    kept = run(make_config(**base, cache_frames=.05))
    n = len(decoded)
    assert n <= (13 + 4)*4
    assert found(run(make_config(**base))) == found(kept)
    assert len(decoded) > 3*n

def test_one_that_begins_is_not_swept_by_another(tmp_path, monkeypatch):
    "Another process begins between the making of the file and its lock"
    real, others = os.truncate, []
    code = f'from vidlab.data.frames import FrameCache; FrameCache(.0001, {str(tmp_path)!r})'
    def slow(*args):
        others.append(subprocess.Popen([sys.executable, '-c', code]))
        time.sleep(3)
        real(*args)
    monkeypatch.setattr(os, 'truncate', slow)
    kept = FrameCache(.0001, tmp_path)
    assert others[0].wait(timeout=60) == 0 and os.path.exists(kept.path)

@pytest.mark.parametrize('room,said', [(0, 'has some'), (1e6, 'ask for less, or let VIDLAB_CACHE')])
def test_a_room_that_cannot_be_had(tmp_path, room, said):
    with pytest.raises(ValueError, match=said): FrameCache(room, tmp_path)
    assert not list(tmp_path.iterdir())
