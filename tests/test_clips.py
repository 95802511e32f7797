"Clips and loaders with real files: a hang and a killed worker are named, one order for any number of workers and processes."
import os, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
import warm
from vidlab.data.annots import Manifest
from vidlab.data.clips import Clips, Loader, Mixed, TooManyUnread
from vidlab.data import decode
from vidlab.data.decode import register_decoder
from vidlab.data.files import VideoError
from vidlab.data.sample import GridSampler, SegmentSampler
from vidlab.data.shapes import make_shapes

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    root = make_shapes(tmp_path_factory.mktemp('s'), kinds=('clips',), sizes=dict(clips=dict(train=13, val=1, test=1)))
    return Manifest.read(root/'clips'/'train.csv')

class Sleepy:
    "Hangs on one file"
    def refuses(self, ix): return None
    def read(self, ix, idx, size):
        if str(ix.path).endswith('00007.mp4'): time.sleep(600)
        return np.zeros((len(idx), 64, 64, 3), np.uint8)

class Dying(Sleepy):
    "Takes its process along on one file"
    def read(self, ix, idx, size):
        if str(ix.path).endswith('00007.mp4'): os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((len(idx), 64, 64, 3), np.uint8)

class Broken(Sleepy):
    "Reads nothing"
    def read(self, ix, idx, size): raise VideoError(ix.path, 'decode', 'no luck')

@pytest.fixture(autouse=True)
def decoders(monkeypatch):
    "Known during these tests only"
    monkeypatch.setattr(decode, '_decoders', dict(decode._decoders))
    for name, d in dict(sleepy=Sleepy, dying=Dying, broken=Broken).items(): register_decoder(name)(d)

@pytest.mark.slow
@pytest.mark.parametrize('decoder,word', [('sleepy', 'hung'), ('dying', 'died')])
def test_a_hang_or_crash_in_a_worker_is_contained_and_named(rows, decoder, word):
    ds = Clips(rows, SegmentSampler(4), size=32, train=True, decoder=decoder)
    ds.check()
    dl, t = Loader(ds, 4, workers=2, timeout=8), time.time()
    with pytest.raises(VideoError, match=f'00007.mp4.*{word}'): list(dl)
    assert time.time() - t < 30

def test_a_killed_worker_is_noticed_at_once(rows):
    "Not after the time limit for a hung one"
    dl = Loader(Clips(rows, SegmentSampler(4), size=32, train=True, decoder='dying'), 4, workers=2, timeout=200)
    next(iter(Loader(Clips(rows, SegmentSampler(4), size=32), 4, workers=1)))                      # the server is up
    t = time.time()
    with pytest.raises(VideoError, match='00007.mp4.*died of SIGKILL'): list(dl)
    assert time.time() - t < 100

class Telling(Sleepy):
    "Frames that say what the worker knows: its threads, a limit, a variable"
    def read(self, ix, idx, size):
        out = np.zeros((len(idx), 64, 64, 3), np.uint8)
        threads = len(os.listdir('/proc/self/task'))
        out[:] = [threads, decode.LIMITS.packets % 251, int(os.environ['VIDLAB_TEST'])]
        return out

def test_workers_are_told_the_surroundings(rows, monkeypatch):
    "Decoders, limits and variables as they are when a loader starts, though the server is older; no warning about threads and forks"
    register_decoder('telling')(Telling)
    for value in (7, 9):
        monkeypatch.setenv('VIDLAB_TEST', str(value)); monkeypatch.setattr(decode.LIMITS, 'packets', 1_000_000 + value)
        dl = Loader(Clips(rows, SegmentSampler(4), size=64, decoder='telling'), 4, workers=2, timeout=60)
        assert not dl.forks
        with warnings.catch_warnings():
            warnings.simplefilter('error', DeprecationWarning)
            got = next(iter(dl))['video']
        dl.close()
        assert got[:, :, 1].unique().tolist() == [(1_000_000 + value) % 251] and got[:, :, 2].unique().tolist() == [value]

def test_the_server_has_one_thread(rows):
    from multiprocessing import forkserver
    next(iter(Loader(Clips(rows, SegmentSampler(4), size=32), 4, workers=1)))
    assert len(os.listdir(f'/proc/{forkserver._forkserver._forkserver_pid}/task')) == 1

def test_columns_are_mapped_and_not_copied(rows):
    "What a worker gets is the data set, its large columns in a file"
    import pickle
    from multiprocessing import reduction
    from vidlab.data import clips as C
    ds = Clips(rows.select(list(range(13))*2000), SegmentSampler(4), size=32, train=True)
    box = C._Shipment(ds); box.pack()
    assert len(box.data) < 200_000 and sum(b - a for a, b in box.spans) > 1_000_000
    fd = type('Fd', (), dict(detach=lambda self: os.dup(box.file.fileno())))()
    got = C._unpack(box.state, box.data, fd, box.spans)
    assert len(got) == len(ds) and got.manifest.row(25_999) == ds.manifest.row(25_999)
    assert np.array_equal(got.sids, ds.sids) and not got.sids.flags.owndata
    assert torch.equal(got[17]['video'], ds[17]['video'])

SCRIPT = '''
import sys, warnings
warnings.simplefilter('error', DeprecationWarning)
print('this script runs')
from vidlab.data.annots import Manifest
from vidlab.data.clips import Clips, Loader
from vidlab.data.sample import SegmentSampler
{own}
ds = {kind}(Manifest.read({csv!r}), SegmentSampler(2), size=32{more})
dl = Loader(ds, 4, workers=2, timeout=60)
print('forks', dl.forks, sum(len(b['sid']) for b in dl))
'''

OWN = {'class': 'class Mine(Clips): pass\nwarnings.simplefilter("default")', 'decoder': '''
warnings.simplefilter("default")
from vidlab.data.decode import PyAV, register_decoder
@register_decoder('mine')
class Mine(PyAV): pass
'''}

@pytest.mark.slow
@pytest.mark.parametrize('own', [None, 'class', 'decoder'])
def test_a_script_without_a_guard(rows, tmp_path, own):
    "No `if __name__ == '__main__'` is needed, and nothing runs twice; what only the script itself knows still works"
    csv = str(Path(rows.root)/'train.csv')
    code = SCRIPT.format(csv=csv, kind='Mine' if own == 'class' else 'Clips', own=OWN.get(own, ''), more=", decoder='mine'" if own == 'decoder' else '')
    (tmp_path/'script.py').write_text(code)
    r = (warm if own else subprocess).run([sys.executable, tmp_path/'script.py'], capture_output=True, text=True, timeout=200, env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1])))
    assert r.returncode == 0 and r.stdout.split('\n')[:2] == ['this script runs', f'forks {bool(own)} 13'], r.stderr

@pytest.mark.slow
@pytest.mark.parametrize('own', [None, 'class'])
def test_nothing_outlives_a_killed_process(rows, tmp_path, own):
    "Neither workers nor their server, forked one way or the other; they would hold files, memory and the terminal"
    code = SCRIPT.format(csv=str(Path(rows.root)/'train.csv'), kind='Mine' if own else 'Clips', own=OWN.get(own, ''), more='')
    (tmp_path/'script.py').write_text(code.split('print(\'forks')[0] + """
import os, time
it = iter(dl); next(it)
from multiprocessing import forkserver
print(*[w.pid for w in dl.dl._iterator._workers], forkserver._forkserver._forkserver_pid or '', flush=True)
time.sleep(100)""")
    p = (warm if own else subprocess).Popen([sys.executable, tmp_path/'script.py'], stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1])))
    p.stdout.readline()
    pids = p.stdout.readline().split()
    assert len(pids) == (2 if own else 3)
    p.kill(); p.wait()
    t = time.time()
    while any(alive(pid) for pid in pids) and time.time() - t < 20: time.sleep(.1)
    assert not [pid for pid in pids if alive(pid)]

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False

@pytest.mark.parametrize('sampler', [SegmentSampler(4), GridSampler(6, rate=4, order=2)])
def test_one_order_for_any_workers_and_ranks(rows, sampler):
    "1, 2 and 4 ranks with 0 and 2 workers give one sequence, with the same random draws"
    def epoch(workers, world, e=3):
        out = []
        for rank in range(world):
            dl = Loader(Clips(rows, sampler, size=32, train=True, seed=7), 4, workers=workers, shuffle=True, drop_last=True, seed=7, rank=rank, world=world)
            out.append([(b['sid'], b['video']) for b in dl.epoch(e)]); dl.close()
        return [(torch.cat([o[i][0] for o in out]), torch.cat([o[i][1] for o in out])) for i in range(3)]
    want = epoch(0, 1)
    for workers, world in ((2, 1), (0, 2), (2, 2), (0, 4)):
        for (s, v), (t, w) in zip(want, epoch(workers, world)): assert torch.equal(s, t) and torch.equal(v, w)
    assert not torch.equal(torch.cat([s for s, _ in want]), torch.cat([s for s, _ in epoch(0, 1, e=4)]))

def test_one_caption_per_clip_is_drawn_anew_each_epoch(tmp_path, rows):
    r = rows.row(0)
    lines = ['id,path,text'] + [f'a,{os.path.basename(r["path"])},caption {i}' for i in range(20)]
    p = os.path.join(os.path.dirname(r['path']), 'many.csv')
    with open(p, 'w') as f: f.write('\n'.join(lines))
    ds = Clips(Manifest.read(p), SegmentSampler(2), size=16, unit='clip', train=True)
    said = [ds[(e, 0)]['caption'] for e in range(8)]
    assert len(ds) == 1 and len(set(said)) > 2 and said == [ds[(e, 0)]['caption'] for e in range(8)]
    assert 'text' not in Clips(Manifest.read(p), SegmentSampler(2), size=16, unit='clip')[0]
    text = Clips(Manifest.read(p), SegmentSampler(2), size=16, unit='text')
    assert [text[i]['view'] for i in (0, 19)] == [0, 19] and 'video' not in text[0]

@pytest.mark.filterwarnings('ignore:left out')
def test_a_whole_unreadable_batch_stops_training(rows):
    with pytest.raises(TooManyUnread, match='no luck'): list(Loader(Clips(rows, SegmentSampler(4), size=32, train=True, decoder='broken'), 4))
    with pytest.raises(VideoError, match='no luck'): list(Loader(Clips(rows, SegmentSampler(4), size=32, decoder='broken'), 4))

def two_sets(rows, **kw):
    "Clips of four frames and single frames, in two loaders"
    opts = lambda decoder: dict(train=True, seed=7, decoder=decoder)
    sets = dict(clips=Clips(rows, SegmentSampler(4, 'inclusive'), size=32, augment='rrc-s40', **opts(kw.get('first', 'auto'))),
                stills=Clips(rows.select(range(9)), SegmentSampler(1), size=16, **opts(kw.get('second', 'auto'))))
    how = dict(shuffle=True, drop_last=True, seed=7, workers=kw.get('workers', 0), rank=kw.get('rank', 0), world=kw.get('world', 1), timeout=kw.get('timeout', 60))
    return Mixed({k: Loader(ds, 4, **how) for k, ds in sets.items()}, seed=7)

def test_mixed_loaders_take_turns_in_one_order(rows):
    "Whole batches of one set, each batch once, the same for any workers and ranks, exact from any batch on"
    def run(e=2, start=0, **kw):
        dl = two_sets(rows, **kw)
        try: return [(b['source'], b['sid'], b['video']) for b in dl.epoch(e, start)]
        finally: dl.close()
    same = lambda a, b: [s for s, *_ in a] == [s for s, *_ in b] and all(torch.equal(i, j) for p, q in zip(a, b) for i, j in zip(p[1:], q[1:]))
    whole = run()
    assert len(whole) == len(two_sets(rows)) == 5 and [s for s, *_ in whole].count('stills') == 2
    for name, n in (('clips', 12), ('stills', 8)):
        sids = torch.cat([sid for s, sid, _ in whole if s == name])
        assert len(sids) == len(set(sids.tolist())) == n
    assert same(whole, run(workers=2))
    for start in range(6): assert same(whole[start:], run(start=start)), start
    both = [run(rank=r, world=2) for r in (0, 1)]
    assert same(whole, [(a[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])) for a, b in zip(*both)])
    orders = {tuple(two_sets(rows).turns(e)) for e in range(12)}
    assert len(orders) > 4 and all(sum(o) == 2 for o in orders)

def test_mixed_goes_on_after_an_epoch_was_left(rows):
    dl = two_sets(rows, workers=1)
    want = [b['sid'].tolist() for b in dl.epoch(1)]
    for b in dl.epoch(0): break
    assert [b['sid'].tolist() for b in dl.epoch(1)] == want
    assert dl.blame(RuntimeError('DataLoader worker (pid(s) 1, 2) exited unexpectedly')) is None      # not ours
    assert [b['sid'].tolist() for b in dl.epoch(1)] == want
    dl.close()

def test_mixed_names_the_file_of_the_loader_that_died(rows):
    dl = two_sets(rows, workers=1, second='dying', timeout=20)
    try:                                                   # torch raises wherever the main thread is: here or in either loader
        for _ in dl.epoch(0): time.sleep(.3)
    except Exception as e: said = dl.blame(e) or e
    assert isinstance(said, VideoError) and '00007.mp4' in str(said) and 'died' in str(said)
    assert all(d.dl._iterator is None for d in dl.loaders.values())

# ---- recognition: views, repeats, sides, folders --------------------------------------------------------------------

class Counted(Sleepy):
    "Grey frames with their number, and how often they were asked for"
    reads = []
    def read(self, ix, idx, size):
        Counted.reads.append(list(idx))
        out = np.zeros((len(idx), 40, 60, 3), np.uint8)
        out[:] = np.asarray(idx)[:, None, None, None]
        out[..., 0] += np.arange(60, dtype=np.uint8); out[..., 1] += np.arange(40, dtype=np.uint8)[:, None]     # tells the crops apart
        return out

@pytest.mark.parametrize('views', [(1, 1), (2, 1), (1, 3), (4, 3), (2, 10)])
def test_views_of_a_sample(rows, views):
    "clips x crops samples with one sid, numbered as published; each clip is decoded once; the same for any number of workers"
    register_decoder('counted')(Counted)
    clips, crops = views
    ds = Clips(rows, SegmentSampler(3, 'something', neighbours=3), size=16, short=24, decoder='counted', resize='fast', views=views)
    Counted.reads = []
    got = [ds[i] for i in range(len(ds))]
    assert len(ds) == len(rows)*clips*crops and len(Counted.reads) == len(rows)*clips
    assert [s['sid'] for s in got] == [i for i in range(len(rows)) for _ in range(clips*crops)]
    for i in range(len(rows)): assert {s['view'] for s in got if s['sid'] == i} == set(range(clips*crops))
    for s in got[:clips*crops]:                                             # published order: crop slowest
        crop, clip = divmod(s['view'], clips)
        alone = Clips(rows, SegmentSampler(3, 'something', neighbours=3), size=16, short=24, decoder='counted', resize='fast', views=(clips, 1))
        assert torch.equal(s['frame_time'], alone[clip]['frame_time']) and s['video'].shape == (9, 3, 16, 16) and s['video_mask'].all()
    assert len({s['video'].numpy().tobytes() for s in got[:clips*crops]}) == clips*crops
    dl = Loader(ds, 5, workers=2, timeout=60)
    many = [torch.cat(v) for v in zip(*((b['sid'], b['view'], b['video']) for b in dl))]
    dl.close()
    assert many[0].tolist() == [s['sid'] for s in got] and many[1].tolist() == [s['view'] for s in got]
    assert torch.equal(many[2], torch.stack([s['video'] for s in got]))

def test_a_test_over_views_counts_each_clip_once(rows):
    from vidlab.tasks import merge_views
    register_decoder('counted')(Counted)
    ds = Clips(rows, SegmentSampler(3), size=16, short=24, decoder='counted', views=(2, 3))
    b = [ds[i] for i in np.random.default_rng(0).permutation(len(ds))]      # in any order, and some twice
    b += b[:7]
    sids, prob, _ = merge_views(dict(sid=torch.tensor([s['sid'] for s in b[:len(ds)]]), logits=torch.stack([s['video'][:, 0].float().mean((0, 2))[:5] for s in b[:len(ds)]]),
                                     label=torch.zeros(len(ds), dtype=torch.int64)))
    assert sids.tolist() == list(range(len(rows)))
    want = torch.stack([torch.stack([s['video'][:, 0].float().mean((0, 2))[:5].softmax(0) for s in b[:len(ds)] if s['sid'] == i]).mean(0) for i in sids])
    assert torch.allclose(prob, want, atol=1e-6)

def test_repeats_and_sides_for_any_workers_and_ranks(tmp_path, rows):
    "Two draws of a clip side by side; the label follows the mirror; one joined batch for any processes"
    names = ['turn left', 'turn right', 'stand']
    from vidlab.data.annots import Manifest as M
    m = M.build(dict(path=[rows.row(i)['path'] for i in range(12)], label=[names[i % 3] for i in range(12)]), rows.root)
    left, right, stand = (m.classes.index(n) for n in ('turn left', 'turn right', 'stand'))
    def epoch(workers, world, repeats=2, rank=0):
        ds = Clips(m, SegmentSampler(4, 'something', neighbours=3), size=16, train=True, seed=3, augment='rand-m7-n2 sized flip erase', repeats=repeats, swap_sides=True)
        dl = Loader(ds, 4, workers=workers, shuffle=True, drop_last=True, seed=3, rank=rank, world=world)
        out = list(dl.epoch(2)); dl.close()
        return out
    whole = epoch(0, 1)
    assert [len(b['sid']) for b in whole] == [8]*3
    for b in whole:
        assert torch.equal(b['sid'][::2], b['sid'][1::2]) and b['view'].tolist() == [0, 1]*4 and torch.equal(b['frame_time'][::2], b['frame_time'][1::2])
        assert (b['video'][::2] != b['video'][1::2]).flatten(1).any(1).all()
    said = m.column('label')
    changed = [(int(said[s]), int(l)) for b in whole for s, l in zip(b['sid'], b['label'])]
    assert {p for p in changed if p[0] != p[1]} == {(left, right), (right, left)} and (stand, stand) in changed
    for a, b in zip(whole, epoch(2, 1)): assert torch.equal(a['video'], b['video']) and torch.equal(a['label'], b['label'])
    for a, *b in zip(whole, *(epoch(0, 2, rank=r) for r in (0, 1))): assert torch.equal(a['video'], torch.cat([o['video'] for o in b]))
    for a, b in zip(whole, epoch(0, 1, repeats=1)): assert torch.equal(a['video'][::2], b['video'])

def test_frames_that_are_not_random(rows):
    "`random_frames` off: training clips have the frames of a test, in every epoch, and are still augmented at random"
    clips = lambda train, **kw: Clips(rows, SegmentSampler(4, 'something'), size=16, train=train, seed=3, augment='crop', short=24, **kw)
    times = lambda ds, epoch: ds[epoch, 0]['frame_time'].tolist()
    fixed, free = clips(True, random_frames=False), clips(True)
    assert times(fixed, 0) == times(fixed, 1) == times(clips(False), 0)
    assert len({tuple(times(free, e)) for e in range(6)}) > 1 and (fixed[0, 0]['video'] != fixed[1, 0]['video']).any()

def test_frame_folders_and_video_files_are_one_path(tmp_path, rows):
    "Extracted pictures, listed with number and template, give the clips of the file; strangers beside them do not count"
    from PIL import Image
    from vidlab.data.annots import read_list
    from vidlab.data.decode import read_frames
    from vidlab.data.index import index_video
    src = [rows.row(i)['path'] for i in range(3)]
    lines = []
    for i, p in enumerate(src):
        d = tmp_path/f'v{i}'; d.mkdir()
        frames = read_frames(p, np.arange(index_video(p).n))
        for k, f in enumerate(frames, 1): Image.fromarray(f).save(d/f'img_{k:05d}.png')
        for k in (1, 2, 99): Image.fromarray(frames[0]*0).save(d/f'flow_{k:05d}.png')
        lines.append(f'v{i} {len(frames)} {i}')
    (tmp_path/'list.txt').write_text('\n'.join(lines))
    (tmp_path/'files.txt').write_text('\n'.join(f'{os.path.basename(p)} {i}' for i, p in enumerate(src)))
    folders = read_list(tmp_path/'list.txt', tmp_path, 'path frames label', template='img_{:05d}.png')
    files = read_list(tmp_path/'files.txt', os.path.dirname(src[0]))
    for kw in (dict(), dict(train=True, augment='rand-m7-n4-mstd0.5-inc1 scale sized flip', seed=4), dict(views=(2, 3))):
        a, b = (Clips(m, SegmentSampler(4, 'kinetics', neighbours=3), size=24, short=32, **kw) for m in (folders, files))
        assert len(a) == len(b)
        for i in range(len(a)): assert torch.equal(a[i]['video'], b[i]['video']) and a[i]['label'] == b[i]['label'] and a[i]['view'] == b[i]['view']
    os.remove(tmp_path/'v1'/'img_00003.png')
    with pytest.raises(ValueError, match='img_00003.png'): read_list(tmp_path/'list.txt', tmp_path, 'path frames label', template='img_{:05d}.png')
    ds = Clips(folders, SegmentSampler(4), size=24)
    with pytest.raises(VideoError, match='v1.*img_00003.png'): ds[1]
