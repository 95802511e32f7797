"The embedded data set: deterministic, honest about time, made once, readable"
import csv, hashlib, json, os, subprocess, sys, threading
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from vidlab.core import read_json, rng
from vidlab.data import shapes as sh

av = pytest.importorskip('av')
REPO = Path(__file__).resolve().parents[1]
SMALL = {k: dict(train=n, val=2, test=2) for k, n in dict(stills=8, clips=12, narrated=2, long=1, scenes=6).items()}


def decode(path):
    with av.open(str(path)) as box: return np.stack([f.to_ndarray(format='rgb24') for f in box.decode(video=0)])


def rows(folder, kind, split):
    with open(folder/kind/f'{split}.csv', encoding='utf-8', newline='') as f: return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return sh.make_shapes(tmp_path_factory.mktemp('shapes'), list(sh.KINDS), sizes=SMALL)


@pytest.mark.parametrize('kind', sh.KINDS)
@pytest.mark.parametrize('split', sh.SPLITS)
def test_same_seed_same_frames(kind, split):
    (a, ra), (b, rb) = sh.shapes_item(kind, split, 1, seed=3), sh.shapes_item(kind, split, 1, seed=3)
    assert a.tobytes() == b.tobytes() and ra == rb and a.dtype == np.uint8
    assert a.tobytes() != sh.shapes_item(kind, split, 1, seed=4)[0].tobytes()
    other = [s for s in sh.SPLITS if s != split][0]
    assert a.tobytes() != sh.shapes_item(kind, other, 1, seed=3)[0].tobytes()


OLD = dict(stills=(1144566, '3582ecaeb9ac'), clips=(20049782, 'dc9482b64671'), narrated=(83658362, '0af92c87a958'), long=(1148105883, 'c6675bd29c2e'))

@pytest.mark.parametrize('kind', OLD)
def test_what_was_rendered_before_stays_as_it_is(kind):
    "Pixels before encoding and rows, as they were before things had a truth and scenes were added; the name of the folder, as of version 6"
    frames, row = sh.shapes_item(kind, 'test', 1)
    assert abs(int(frames.astype(np.int64).sum()) - OLD[kind][0]) < 20      # a few roundings may fall otherwise on another machine
    assert hashlib.sha256(json.dumps(row, default=str).encode()).hexdigest()[:12] == OLD[kind][1]
    assert sh.shapes_folder('x').name == 'seed0-ebe0632f' and sh.shapes_folder('x', sizes={'clips': {'train': 12}}).name == 'seed0-172f0964'


@pytest.mark.parametrize('kind', sh.KINDS)
def test_truth_lies_where_the_colour_is(folder, kind):
    "The files are decoded, and what has the colour of a thing is compared with its mask, its box and its centre"
    truth = sh.shapes_truth(folder, kind, 'test')
    for r in rows(folder, kind, 'test'):
        mine, path = truth[truth.id == r['id']], folder/kind/r['path']
        video = np.array(Image.open(path))[None] if kind == 'stills' else decode(path)
        every = sorted(set(mine.frame))[::max(1, len(video)//8)]
        m = sh.masks(mine, every)
        for (k, f), t in mine[mine.frame.isin(every)].groupby(['thing', 'frame']):
            t, is_ = t.iloc[0], m[k, every.index(f)] > .5
            seen = np.abs(video[f].astype(int) - sh.COLORS[t.color]).sum(-1) < 85
            assert (seen & is_).sum() >= .75*is_.sum() and (seen & ~is_).sum() <= .2*is_.sum() + 6, (r['id'], k, f)
            y, x = np.nonzero(is_)
            assert max(abs(x.min() - t.x0), abs(x.max() + 1 - t.x1), abs(y.min() - t.y0), abs(y.max() + 1 - t.y1)) < 1.6
            assert t.time == pytest.approx(f/sh.fps_of(kind)) and abs(t.seen - m[k, every.index(f)].sum()/(np.pi*t.r**2)) < .01
        for k, t in mine.groupby('thing'):
            words = r['text'][t.word_start.iloc[0]:t.word_end.iloc[0]]
            assert (t.word_start.iloc[0] < 0) == (t.said.iloc[0] not in r['text'])
            assert t.word_start.iloc[0] < 0 or words.split()[0] == 'a' and words.split()[-1] == t['shape'].iloc[0] and t.color.iloc[0] in words


def test_truth_says_when_things_are_there_and_move(folder):
    n = sh.shapes_truth(folder, 'narrated', 'test')
    for id_, v in n.groupby('id'):
        script = json.loads({r['id']: r for r in rows(folder, 'narrated', 'test')}[id_]['transcripts'])
        for k, t in v.groupby('thing'):
            assert (t.time.min(), t.time.max() + 1/sh.FPS, t.said.iloc[0]) == (script[k]['start'], script[k]['end'], script[k]['text'])
    for _, v in sh.shapes_truth(folder, 'scenes', 'train').groupby('id'):
        a, b = (t.moves.to_numpy() for _, t in v.groupby('thing'))
        assert a.any() and b.any() and (a & b).sum() <= 1                       # one after the other: they share the frame between
    still = sh.shapes_truth(folder, 'stills')
    assert not still.moves.any() and (still.frame == 0).all()


def test_masks_of_any_size_agree():
    "A mask drawn larger or smaller covers the same share of the picture, and what lies in front hides"
    row = dict(id='a', text='')
    t = sh.truth_rows(row, [sh.Thing('circle', 'red', 'large', *np.array([[30.], [32.], [15.]])), sh.Thing('square', 'blue', 'small', *np.array([[36.], [32.], [8.]]))], 8)
    want = sh.masks(t, [0])
    for size in (4, 7, 64, 224): np.testing.assert_allclose(sh.masks(t, [0], size).mean((2, 3)), want.mean((2, 3)), rtol=5e-3)
    own = sh.coverage('circle', 30, 32, 15).sum()
    assert want[0].sum() == pytest.approx(own - (sh.coverage('circle', 30, 32, 15)*want[1]).sum(), rel=1e-4) and t['seen'][1] > .98 > t['seen'][0]
    assert sh.masks(t, [1]).sum() == 0                                          # not there in another frame


def test_truth_is_made_when_asked_for(folder, monkeypatch):
    path = folder/'clips'/'val.truth.parquet'
    path.unlink(missing_ok=True)
    made = sh.shapes_truth(folder, 'clips', 'val')
    assert path.exists() and made.equals(sh.shapes_truth(folder, 'clips', 'val'))
    path.unlink()
    monkeypatch.setenv('VIDLAB_CACHE_SAID', 'yes')
    monkeypatch.setattr('vidlab.core.atomic_write', lambda *a: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))
    assert made.equals(sh.shapes_truth(folder, 'clips', 'val')) and not path.exists()      # of a folder that is not ours
    with pytest.raises(ValueError, match='make_shapes'): sh.shapes_truth(folder.parent, 'clips')


def test_the_same_frames_are_the_same_file(tmp_path):
    "Whatever lies in memory beside them"
    gen, junk = np.random.default_rng(0), []
    def of(frames):
        junk.append(np.full(int(gen.integers(1000, 100000)), gen.integers(255), np.uint8))
        sh.encode(tmp_path/'a.mp4', frames)
        return (tmp_path/'a.mp4').read_bytes()
    for i in range(12):
        frames = sh.shapes_item('clips', 'train', i)[0]
        assert len({of(frames) for _ in range(8)}) == 1, i


def test_rendering_does_not_touch_global_random_state():
    np.random.seed(0); want = np.random.rand()
    np.random.seed(0); sh.shapes_item('clips', 'train', 0)
    assert np.random.rand() == want


@pytest.mark.parametrize('kind', sh.KINDS)
def test_files_show_what_was_rendered(folder, kind):
    for split in sh.SPLITS:
        for i, r in enumerate(rows(folder, kind, split)):
            frames, row = sh.shapes_item(kind, split, i)
            path = folder/kind/r['path']
            got = np.array(Image.open(path))[None] if kind == 'stills' else decode(path)
            assert got.shape == frames.shape                        # no frame lost or added by the encoder
            assert np.abs(got.astype(int) - frames).mean() < 6      # 4:2:0 and crf 18 blur colour edges and noise
            assert {k: str(v) for k, v in row.items()} == r


@pytest.mark.parametrize('kind', ['clips', 'narrated', 'long', 'scenes'])
def test_files_are_ordinary_h264(folder, kind):
    with av.open(str(folder/kind/'train'/'00000.mp4')) as box:
        s = box.streams.video[0]
        packets = [(p.dts, p.pts, p.is_keyframe) for p in box.demux(s) if p.pts is not None]
        assert s.codec_context.name == 'h264' and s.codec_context.pix_fmt == 'yuv420p'
        assert s.average_rate == (4 if kind == 'long' else 8)
    pts = [p for _, p, _ in packets]
    assert (pts != sorted(pts)) == (kind != 'long')                 # B-frames
    assert sum(k for *_, k in packets) >= -(-len(packets)//(4 if kind == 'long' else 12))      # how often there is a key frame


def test_manifests(folder):
    for kind in sh.KINDS:
        ids, paths = [], []
        for split in sh.SPLITS:
            rs = rows(folder, kind, split)
            assert len(rs) == SMALL[kind][split]
            assert list(rs[0])[:7] == ['id', 'path', 'start', 'end', 'text', 'label', 'split']
            assert all(r['split'] == split and r['text'] and (folder/kind/r['path']).is_file() for r in rs)
            ids += [r['id'] for r in rs]; paths += [r['path'] for r in rs]
        assert len(set(ids)) == len(ids) and len(set(paths)) == len(paths)


def test_manifests_are_read_by_the_data_layer(folder):
    annots = pytest.importorskip('vidlab.data.annots')
    for kind in sh.KINDS:
        for split in sh.SPLITS:
            m = annots.Manifest.read(folder/kind/f'{split}.csv')
            assert len(m) == SMALL[kind][split] and m.row(0)['text'] == rows(folder, kind, split)[0]['text']


def test_captions_cover_the_world():
    n = len(sh.CLIP_CAPTIONS)
    test = [sh.shapes_item('clips', 'test', i)[1] for i in range(sh.COUNTS['clips']['test'])]
    assert n == len(set(sh.CLIP_CAPTIONS)) == 108 == len({r['text'] for r in test})
    assert sh.COUNTS['clips']['train'] % n == 0 and sh.COUNTS['stills']['train'] % len(sh.STILL_CAPTIONS) == 0
    for r in test: assert r['text'] == f'a {r["size"]} {r["color"]} {r["shape"]} {r["motion"]}' and sh.MOTIONS[r['label']] == r['motion']


@pytest.mark.parametrize('motion', sh.MOTIONS)
def test_partner_is_the_reversed_motion(motion):
    for i in range(20):
        a, b = (sh.trajectory(m, 'large', sh.FRAMES, rng(i)) for m in (motion, sh.partner(motion)))
        for x, y in zip(a, b): np.testing.assert_array_equal(x, y[::-1])
    moved = [np.ptp(v) for v in sh.trajectory(motion, 'large', sh.FRAMES, rng(0))]
    assert sum(m > 2 for m in moved) == 1                           # exactly one of x, y, r changes
    sign = {'moves right': 1, 'moves left': -1, 'moves down': 1, 'moves up': -1, 'grows': 1, 'shrinks': -1}[motion]
    v = sh.trajectory(motion, 'large', sh.FRAMES, rng(0))[int(np.argmax(moved))]
    assert np.sign(v[-1] - v[0]) == sign and (np.diff(v)*sign >= 0).all()


@pytest.mark.parametrize('rate', [4, 8])
def test_what_forgets_order_cannot_tell_partners_apart(rate):
    "Mean position and radius over the frames that CLIP4Clip would sample: two independent samples, same distribution"
    grid = np.arange(0, sh.FRAMES, sh.FPS//rate)
    for a, b in sh.BACKWARDS.items():
        means = [np.array([[v[grid].mean() for v in sh.trajectory(m, 'small', sh.FRAMES, rng(k, i))] for i in range(400)])
                 for k, m in enumerate((a, b))]
        z = (means[0].mean(0) - means[1].mean(0))/np.sqrt((means[0].var(0) + means[1].var(0))/400)
        assert np.abs(z).max() < 3.5


def test_long_videos(folder):
    for r in rows(folder, 'long', 'train') + rows(folder, 'long', 'test'):
        with av.open(str(folder/'long'/r['path'])) as box: seconds = box.streams.video[0].frames/sh.LONG_FPS
        acts = r['procedure'].split()
        assert 88 <= seconds <= 216 and 5 <= int(r['jumps']) <= 15
        assert (float(r['target']) == 0) == (acts[0] == 'jumps') and float(r['target']) <= seconds - 22
        assert tuple(map(sh.ACTS.index, acts)) == sh.ORDERS[int(r['label'])]


def test_transcripts(folder):
    r = rows(folder, 'narrated', 'train')[0]
    script = json.loads(r['transcripts'])
    assert [s['start'] for s in script] == [0, 2, 4, 6] and r['text'] == ', then '.join(s['text'] for s in script)
    assert len(decode(folder/'narrated'/r['path'])) == script[-1]['end']*sh.FPS


@pytest.mark.parametrize('events', [1, 3, 4])
def test_events_differ_in_looks_alone(events):
    "Size and colour tell the sentences of a video apart; shape and motion only tell videos apart"
    seen = set()
    for i in range(40):
        texts = [s['text'].split(' ', 4)[1:] for s in json.loads(sh.narrated_item(i, np.random.default_rng(i), events)[1]['transcripts'])]
        assert len(texts) == events == len({(s, c) for s, c, *_ in texts}) and len({(o, m) for *_, o, m in texts}) == 1
        assert len({c for _, c, *_ in texts}) == min(events, 3 - i % 2) and len({s for s, *_ in texts}) == 1 + (events > 3 - i % 2)
        seen |= {tuple(map(' '.join, texts))}
    assert len(seen) > 30 and {t.split()[0] for v in seen for t in v} == set(sh.SIZES)
    with pytest.raises(ValueError, match='video 1 has 4 looks'): sh.narrated_item(1, np.random.default_rng(0), 5)


def test_second_call_does_nothing(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    before = [p.stat().st_mtime_ns for p in files]
    assert sh.make_shapes(folder.parent, list(sh.KINDS), sizes=SMALL) == folder
    assert sorted(p for p in folder.rglob('*') if p.is_file()) == files and [p.stat().st_mtime_ns for p in files] == before


def test_other_settings_other_folder(folder):
    other = sh.make_shapes(folder.parent, 'stills', seed=1, sizes=SMALL)
    assert other != folder
    a, b = (read_json(f/'stills'/'stamp.json') for f in (folder, other))
    assert a['frames_sha256'] != b['frames_sha256']


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def fail(*a, **k): raise OSError('disk full')
    with monkeypatch.context() as m:
        m.setattr(sh, 'encode', fail)
        with pytest.raises(OSError, match='disk full'): sh.make_shapes(tmp_path, 'clips', sizes=SMALL)
    d = sh.shapes_folder(tmp_path, sizes=SMALL)
    assert list(d.iterdir()) == []
    assert (sh.make_shapes(tmp_path, 'clips', sizes=SMALL)/'clips'/'train.csv').exists()


def test_two_makers_at_once(tmp_path):
    ts = [threading.Thread(target=sh.make_shapes, args=(tmp_path, 'stills'), kwargs=dict(sizes=SMALL)) for _ in range(2)]
    for t in ts: t.start()
    for t in ts: t.join()
    d = sh.shapes_folder(tmp_path, sizes=SMALL)
    assert [p.name for p in d.iterdir()] == ['stills'] and len(rows(d, 'stills', 'train')) == 8


@pytest.mark.parametrize('bad', [dict(kinds='still'), dict(sizes={'clips': {'dev': 1}}), dict(sizes={'clips': {'train': 0}})])
def test_mistakes_are_errors(tmp_path, bad):
    with pytest.raises(ValueError): sh.make_shapes(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('how', [['data_tools/make_shapes.py'], ['-m', 'data_tools.make_shapes']])
def test_command_line(tmp_path, how):
    env = dict(os.environ, PYTHONPATH=str(REPO))
    def cli(*args): return subprocess.run([sys.executable, *how, *args], capture_output=True, text=True, cwd=REPO, env=env, timeout=60)
    args = ['--root', str(tmp_path), '--kinds', 'stills', '--sizes', 'stills.train=4', 'stills.val=1', 'stills.test=1']
    r = cli(*args)
    assert r.returncode == 0 and '1 made' in r.stdout, r.stderr
    if how[0] == '-m':
        assert '0 made, 1 there' in cli(*args).stdout
        assert 'Example' in cli('--help').stdout
        bad = cli('--sizes', 'clips=3')
        assert bad.returncode == 1 and 'kind.split=number' in bad.stderr and 'Traceback' not in bad.stderr
