"Attention on any video: windows cover it, maps are those of the sampled frames, the film is the video with maps over it, and what cannot be answered is refused before work."
import dataclasses, os, subprocess, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import encode
from vidlab import cli, overlay
from vidlab.ckpt import save_checkpoint
from vidlab.core import write_json
from vidlab.data.decode import read_frames
from vidlab.data.files import VideoError
from vidlab.data.index import index_video
from vidlab.explain import patch_maps
from vidlab.data.sample import windows_of
from vidlab.overlay import Question, painted, pixel_aspect, save_film, save_looks, watch
from vidlab.ready import load
from vidlab.registry import create_model
from vidlab.train import make_config

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures('outputs')


@pytest.fixture(scope='module')
def clip(): return load('clip4clip', preset='tiny', weights='random', device='cpu')

@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    "A checkpoint as a run leaves it"
    d = tmp_path_factory.mktemp('run')
    cfg = make_config(model='videomamba', preset='tiny', task='recognition', sampler='segment', max_frames=4, data='class_folders', device='cpu', precision='fp32')
    net = create_model('videomamba', preset='tiny', classes=3, max_frames=4, dim=32, depth=2)
    cfg.options.update(dim=32, depth=2)
    write_json(d/'config.json', dataclasses.asdict(cfg))
    save_checkpoint(d/'ckpt'/'best', net.state_dict(), dict(config=dataclasses.asdict(cfg), model=net.card, classes=['cat', 'PlayingGuitar', 'owl']))
    return d

def scene(w, h):
    "Red on the left, blue on the right, a bright bar that walks down"
    def draw(t):
        x = np.zeros((h, w, 3), np.uint8)
        x[:, :w//2] = 200, 40, 40
        x[:, w//2:] = 40, 40, 200
        x[2*t % h:2*t % h + 4] = 240
        return x
    return draw

def turned(src, dst, angle):
    import av
    with av.open(str(src)) as a, av.open(str(dst), 'w') as b:
        s = a.streams.video[0]
        t = b.add_stream_from_template(s, opaque=True)
        t.set_display_rotation(angle)
        for p in a.demux(s):
            if p.dts is not None:
                p.stream = t
                b.mux(p)
    return dst

KINDS = dict(plain={}, ntsc=dict(rate=Fraction(30000, 1001)), odd=dict(w=97, h=65, pix='yuv444p'), deep=dict(codec='libx265', pix='yuv420p10le', **{'x265-params': 'log-level=none'}),
             varying=dict(times=[0, .02, .05, .3, .35, .9, .95, 1.0, 1.8]), upright=dict(rate=25), portrait=dict(w=66, h=120))

@pytest.fixture(params=KINDS)
def video(request, tmp_path):
    how = dict(dict(n=12, w=128, h=72, rate=24), **KINDS[request.param])
    p = encode(tmp_path/'a.mp4', picture=scene(how['w'], how['h']), **how)
    return turned(p, tmp_path/'turned.mp4', 90) if request.param == 'upright' else p


# ---------------------------------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize('seed', range(40))
def test_windows_cover_the_whole_video(seed):
    g = np.random.default_rng(seed)
    duration, window = g.uniform(.04, 90), g.uniform(.5, 20)
    stride = g.choice([0, g.uniform(.1, 1)*window])
    spans = windows_of(duration, window, stride)
    start, end = np.array(spans).T
    assert start[0] == 0 and end[-1] == pytest.approx(duration)
    assert (start[1:] <= end[:-1] + 1e-9).all() and np.diff(start).max(initial=0) <= (stride or window/2) + 1e-9
    assert np.allclose(end - start, min(window, duration))

def test_every_frame_has_a_window_and_a_map(clip, tmp_path):
    p = encode(tmp_path/'long.mp4', 120, 64, 64, rate=10, picture=scene(64, 64))
    q = Question(clip, p, 'a dog', window=2., stride=1.)
    seen = np.concatenate([q.batch(i)['frame_time'][0].numpy() for i in range(len(q.spans))])
    assert len(q.spans) == 11 and seen.min() < .3 and seen.max() > 11.6 and np.diff(np.unique(seen.round(3))).max() < .5
    look = q.look()
    maps = look.at(q.index.times)
    assert maps.shape[0] == 120 and np.isfinite(maps).all()
    assert (look.shares(q.index.times) <= 1).all() and look.table()['share'].sum() == pytest.approx(1)

# ---------------------------------------------------------------------------------------------------------------- maps
@pytest.mark.parametrize('method', ['raw', 'relevance'])
def test_a_map_at_a_sampled_frame_is_that_of_the_model(clip, tmp_path, method):
    p = encode(tmp_path/'a.mp4', 40, 96, 64, rate=10, picture=scene(96, 64))
    q = Question(clip, p, 'a dog', method, window=9)
    b, look = q.batch(0), q.look()
    with q._quick(): same = patch_maps(q.task, b, method)[0].float()
    assert torch.equal(torch.from_numpy(look.windows[0][1]), same)
    assert np.allclose(look.at(b['frame_time'][0].numpy()), same.numpy(), atol=1e-6)
    assert np.corrcoef(same.ravel(), patch_maps(q.task, b, method)[0].ravel())[0, 1] > .99       # fp32
    assert np.allclose(q.index.times[look.frames[0]], b['frame_time'][0], atol=1e-6)
    with torch.no_grad(): assert look.numbers[0]['score'] == pytest.approx(float(q.task.evidence(q.task.prep(b))), abs=1e-4)

def test_overlapping_windows_are_blended(clip, tmp_path):
    "Against a loop over windows, frames and neighbours in time"
    p = encode(tmp_path/'a.mp4', 50, 64, 64, rate=10, picture=scene(64, 64))
    look = Question(clip, p, 'a dog', window=2., stride=.7).look()
    for t in (0., .31, 1.17, 2.5, 4.9):
        total, weight = 0., 0.
        for (a, b), (times, maps) in zip(look.spans, look.windows):
            if not a - 1e-3 <= t <= b + 1e-3: continue
            m = np.stack([[np.interp(t, times, maps[:, i, j]) for j in range(maps.shape[2])] for i in range(maps.shape[1])])
            w = max(1 - abs(t - (a + b)/2)/((b - a)/2), 1e-3)
            total, weight = total + w*m, weight + w
        assert np.allclose(look.at([t])[0], total/weight, atol=1e-5), t

# ---------------------------------------------------------------------------------------------------------------- film
def test_the_film_is_the_video(clip, video, tmp_path):
    "Frames, size, rate, times and shape; turned upright; beside the part that the model sees, the dimmed video itself"
    look, = watch(clip, video, 'a dog')
    film, ix = index_video(save_film(tmp_path/'film.mp4', [look])), look.index
    assert (film.n, film.width, film.height, film.rotation) == (ix.n, ix.width, ix.height, 0)
    assert np.allclose(film.times, ix.times, atol=2e-3) and film.fps == pytest.approx(ix.fps, rel=.01) and film.codec in ('h264', 'vp9')
    own, shown = (read_frames(x, [0, ix.n - 1]).astype(float) for x in (ix, film))
    l, t, r, b = overlay.pixel_box(look.box, ix.height, ix.width)
    side = np.s_[:, :, :l - 4] if l > 4 else np.s_[:, :t - 4]
    assert abs(shown[side] - own[side]*3/8).mean() < 6
    assert abs(shown[:, t:b, l:r] - own[:, t:b, l:r]*3/8).mean() > 20

def test_pixels_that_are_not_square(clip, tmp_path):
    import av
    with av.open(str(tmp_path/'tv.mp4'), 'w') as c:
        s = c.add_stream('libx264', rate=25)
        s.width, s.height, s.pix_fmt = 64, 64, 'yuv420p'
        s.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for t in range(5): c.mux(s.encode(av.VideoFrame.from_ndarray(scene(64, 64)(t), format='rgb24')))
        c.mux(s.encode(None))
    look, = watch(clip, tmp_path/'tv.mp4')
    film = index_video(save_film(tmp_path/'film.mp4', [look]))
    assert pixel_aspect(look.index) == pixel_aspect(film) == 2

def test_several_sources_beside_each_other(clip, classifier, tmp_path):
    p = encode(tmp_path/'a.mp4', 10, 128, 72, picture=scene(128, 72))
    looks = watch([clip, clip, dict(source=classifier, text='owl')], p, 'a <b>dog</b> costs $5 and $6')
    assert [l.name for l in looks] == [f'{looks[0].name[:-3]} #1', f'{looks[0].name[:-3]} #2', classifier.name]
    files = save_looks(looks, tmp_path/'out')
    film = index_video(files['film'])
    assert film.n == 10 and film.width == 3*128 and film.height > 72
    assert {p.name for p in files.values()} >= {'maps.npz', 'maps2.npz', 'maps3.npz', 'table.csv', 'film.mp4'}
    kept = np.load(files['maps'])
    assert kept['maps'].shape[0] == len(kept['times']) == len(kept['frames']) == len(kept['window']) and str(kept['text']).startswith('a <b>')
    assert all(p.stat().st_size < 400_000 for p in files.values())

def test_a_film_is_made_frame_by_frame(clip, tmp_path, monkeypatch):
    "The first painted frame needs no other one to be decoded; a film that breaks off leaves nothing behind"
    p = encode(tmp_path/'a.mp4', 90, 64, 64, picture=scene(64, 64))
    look, = watch(clip, p)
    taken = []
    monkeypatch.setattr(overlay, 'stream_frames', lambda ix, idx, size: (taken.append(i) or np.zeros((*size, 3), np.uint8) for i in idx))
    frames = painted([look], (64, 64))
    next(frames)
    assert len(taken) == 1
    def broken(*a, **kw):
        yield np.zeros((64, 64, 3), np.uint8)
        raise VideoError('a.mp4', 'decode', 'lost')
    monkeypatch.setattr(overlay, 'stream_frames', broken)
    with pytest.raises(VideoError): save_film(tmp_path/'out'/'film.mp4', [look])
    assert list((tmp_path/'out').iterdir()) == []

# ---------------------------------------------------------------------------------------------------------------- questions
def test_a_class_by_its_name_or_none(classifier, tmp_path):
    p = encode(tmp_path/'a.mp4', 20, 64, 64, picture=scene(64, 64))
    r = load(classifier)
    named, free = watch(r, p, 'playing guitar')[0], watch(r, p)[0]
    q = Question(r, p)
    with torch.no_grad(): logits = r.task.predict(r.task.prep(q.batch(0)))[0]
    assert named.text == 'playing guitar' and named.numbers[0]['score'] == pytest.approx(float(logits[1]), abs=1e-4)
    assert free.text == r.task.classes[int(logits.argmax())] == free.numbers[0]['class'] and free.numbers[0]['score'] == pytest.approx(float(logits.max()), abs=1e-4)
    assert {'class', 'probability', 'score', 'start', 'end'} <= set(free.table())

def test_refused_before_work(clip, classifier, tmp_path, monkeypatch):
    import av
    good = encode(tmp_path/'good.mp4', 10, 64, 64)
    (tmp_path/'cut.mp4').write_bytes(good.read_bytes()[:400])
    with av.open(str(tmp_path/'sound.mp4'), 'w') as c:
        s = c.add_stream('aac', rate=16000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        f.sample_rate = 16000
        c.mux([*s.encode(f), *s.encode(None)])
    for name in ('patch_maps', 'stream_frames', 'read_frames', 'Film'): monkeypatch.setattr(overlay, name, lambda *a, **k: pytest.fail('work was begun'))
    bare = load('videomamba', preset='tiny', device='cpu')
    wrong = [((clip, tmp_path/'gone.mp4'), 'gone.mp4'), ((clip, tmp_path/'sound.mp4'), 'no video stream'), ((clip, tmp_path/'cut.mp4'), 'cut.mp4'),
             ((bare, good, 'a dog'), 'leave `text` out'), ((load('tdsclip', preset='tiny', weights='random', device='cpu'), good, 'a dog'), 'leave `text` out'), ((classifier, good, 'owll'), "did you mean 'owl'.*cat, PlayingGuitar, owl"), ((clip, good, 'a dog', 'blur'), 'blur'),
             ((clip, good, None, 'relevance'), 'more with a text'), ((clip, good, '', None, -2.), 'longer than nothing'), ((clip, good, '', None, 2., 3.), 'begins before it ends'),
             (([clip, dict(preset='tiny')], good), 'a dict with `source`'), ((['clip4clop'], good), 'clip4clip'),
             ((load('clip4clip', preset='tiny', weights='random', sampler='dense', window=5, max_frames=4, device='cpu'), good, '', None, 3.), '5 consecutive frames')]
    for args, said in wrong:
        with pytest.raises((ValueError, VideoError), match=said): watch(*args)

# ---------------------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize('args, said', [(['x.pth', 'video=a.mp4'], 'x.pth: no such file'), (['clip4clip', 'video=gone.mp4'], 'gone.mp4: no such file'), (['video=a.mp4'], 'which model'),
                                        (['shapes_stan', 'video=a.mp4'], 'first: vidlab train shapes_stan'), (['clip4clip'], 'unknown recipe')])
def test_the_command_refuses_before_a_kernel(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a.mp4').touch()
    monkeypatch.setattr(cli, 'run_page', lambda *a: pytest.fail('a kernel was to be started'))
    assert cli.main(['attention', *args]) == 2
    assert said in (err := capsys.readouterr().err) and len(err.splitlines()) == 1

@pytest.mark.slow
def test_the_command(classifier, tmp_path):
    "From a run folder and a file to pictures, a film and a table"
    encode(tmp_path/'my clip.mp4', 24, 128, 72, picture=scene(128, 72))
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    r = subprocess.run([sys.executable, '-m', 'vidlab.cli', 'attention', str(classifier), 'video=my clip.mp4', 'text=owl', 'window=.5'], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert r.returncode == 0, r.stdout + r.stderr
    folder, = (tmp_path/'outputs'/'attention').glob('2*')
    assert {p.name for p in (folder/'figs').iterdir()} >= {'film.mp4', 'maps.npz', 'table.csv'} and index_video(folder/'figs'/'film.mp4').n == 24
    assert (folder/'attention.ipynb').stat().st_size < 1 << 20 and '128x72' in r.stdout and 'GiB' in r.stdout and str(folder) in r.stdout
