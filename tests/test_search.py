"Search in videos: windows share their frames, still frames are skipped without a difference that matters, answers are stretches, and what cannot be answered is refused before work."
import importlib.util, json, os, shutil
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import encode
from vidlab import cli, search
from vidlab.data.decode import read_frames
from vidlab.data.index import index_video
from vidlab.data.transforms import ClipTransform
from vidlab.ready import load
from vidlab.search import Chance, Searcher, VideoEncoder, answers_text, best_chains, embed_files, in_order, index_folder, parse_clip, save_answers, show_answers, stretch_around
from vidlab.store import read_vectors

pytestmark = pytest.mark.usefixtures('outputs')
MEDIA = Path(os.environ.get('VIDLAB_MEDIA') or '/nonexistent')

@pytest.fixture(scope='module')
def seq(): return load('clip4clip', preset='tiny', weights='random', head='seqTransf', sampler='grid', rate=2, max_frames=4, device='cpu')

@pytest.fixture(scope='module')
def stan(): return load('stan', preset='tiny', weights='random', sampler='segment', max_frames=4, device='cpu')

def walk(t, w=64, h=48):
    x = np.full((h, w, 3), 90, np.uint8)
    x[10:30, 2*t % w:2*t % w + 12] = 220, 60, 40
    return x

@pytest.fixture
def videos(tmp_path):
    d = tmp_path/'videos'
    for i in range(3): encode(d/f'{i}.mp4', 60 + 20*i, 64, 48, rate=10, picture=lambda t: walk(t + 13*i))
    (d/'<img src=x onerror=alert(1)> $5.mp4').write_bytes((d/'0.mp4').read_bytes())
    (d/'hurt.mp4').write_bytes(b'no video')
    return d

# ---------------------------------------------------------------------------------------------------------------- vectors
@pytest.mark.parametrize('kind', ['seq', 'stan'])
@pytest.mark.parametrize('chunk', [256, 8])
def test_windows_are_what_the_model_says_of_them(kind, chunk, videos, request, monkeypatch):
    "Shared or not, in one piece or several: against each window read from the file by itself"
    monkeypatch.setattr(search, 'CHUNK', chunk)
    ready = request.getfixturevalue(kind)
    enc = VideoEncoder(ready, window=2., stride=1., exact=True, precision='fp32')
    file = str(videos/'2.mp4')
    got, reading = enc.make(file, enc.read(file)), enc.read(file)
    ix, grid = reading.index, reading.grid
    assert grid.spans[0].tolist() == [0, 2] and grid.spans[-1][1] == pytest.approx(10) and len(grid.windows) == 9
    assert enc.frames == len(grid.frames) == 20                                                      # each frame once
    for i, w in enumerate(grid.windows):
        x, m = ClipTransform(ready.card.size, resize=ready.cfg.resize)(read_frames(ix, grid.frames[w]))[None], torch.ones(1, len(w), dtype=torch.bool)
        with torch.no_grad(): want = ready.model.pooled(ready.model.encode_video(ready.task.prep(dict(video=x, video_mask=m))['video'], m), m)[0]
        assert np.allclose(got.vectors[i], want, atol=2e-3), i

def test_still_frames_are_skipped(seq, stan, tmp_path):
    "A walk, a pause, a walk: the pause costs nothing, and the vectors are almost the same"
    at = lambda t: t if t < 30 else 30 if t < 130 else t - 100
    file = str(encode(tmp_path/'a.mp4', 160, 64, 48, rate=10, picture=lambda t: walk(at(t)), crf=10))
    for ready in (seq, stan):
        fast, slow = (VideoEncoder(ready, window=2., stride=1., exact=e, precision='fp32') for e in (False, True))
        a, b = (e.make(file, e.read(file)).vectors.astype(np.float32) for e in (fast, slow))
        assert slow.looked == slow.frames == fast.frames == 32 and fast.looked <= 14
        assert (a*b).sum(1).min() > .999

def test_precision_that_is_asked_for(seq, videos):
    a, b = (VideoEncoder(seq, precision=p) for p in ('fp32', 'bf16'))
    x, y = (e.make('', e.read(str(videos/'0.mp4'))).vectors.astype(np.float32) for e in (a, b))
    assert not np.array_equal(x, y) and (x*y).sum(1).min() > .99 and a.settings() != b.settings()
    with pytest.raises(ValueError, match="unknown precision 'fp61'"): VideoEncoder(seq, precision='fp61')

@pytest.mark.parametrize('name', ['clip4clip', 'stan'])
def test_matrices_made_once_are_the_same_bits(name, tmp_path):
    "What an index makes of its own model does not change a vector"
    ready = load(name, preset='tiny', weights='random', sampler='segment', max_frames=4, device='cpu')
    file = str(encode(tmp_path/'a.mp4', 30, 64, 48, rate=10, picture=walk))
    enc = VideoEncoder(ready, window=2., stride=1., precision='bf16')
    plain = enc.make(file, enc.read(file)).vectors
    enc.narrow()
    assert sum(p.dtype == torch.bfloat16 for p in enc.model.parameters()) > 10
    assert np.array_equal(enc.make(file, enc.read(file)).vectors, plain)

@pytest.mark.parametrize('head', ['meanP', 'seqTransf'])
def test_a_clip_shorter_than_a_window_is_what_the_model_says_of_it(head, tmp_path):
    ready = load('clip4clip', preset='tiny', weights='random', head=head, sampler='segment', max_frames=8, device='cpu')
    file = str(encode(tmp_path/'a.mp4', 15, 64, 48, rate=10, picture=walk))
    enc = VideoEncoder(ready, precision='fp32', exact=True)
    reading = enc.read(file)
    x = ClipTransform(ready.card.size, resize=ready.cfg.resize)(read_frames(reading.index, reading.grid.frames))[None]
    with torch.no_grad(): want = ready.model.pooled(ready.model.encode_video(ready.task.prep(dict(video=x))['video']), torch.ones(1, x.shape[1], dtype=torch.bool))[0]
    got = enc.make(file, enc.read(file)).vectors
    assert x.shape[1] < 8 and len(got) == 1 and np.allclose(got[0], want, atol=2e-3)

def test_nan_is_no_vector(seq, videos, monkeypatch):
    "A model that breaks on a file leaves a row with the reason, not a vector that can never be found"
    monkeypatch.setattr(seq.model, 'pooled', lambda v, m: torch.full((len(v), 64), torch.nan))
    report = index_folder(videos, seq, precision='fp32')
    assert set(report.index.files()['verdict']) == {'bad'} and report.index.files()['reason'].str.contains('nan').any()

def test_clips_too_short_for_two_things_still_answer(seq, tmp_path):
    "One window each: the sentence is taken as it stands"
    for i in range(3): encode(tmp_path/f'{i}.mp4', 10, 64, 48, rate=10, picture=lambda t: walk(t + 13*i))
    index_folder(tmp_path, seq, precision='fp32')
    found = Searcher(tmp_path, ready=seq)('a thing moves left, then grows', k=3)
    assert len(found) == 3 and 'parts' not in found

@pytest.mark.parametrize('head', ['tightTransf', 'mug'])
def test_a_model_without_a_vector_is_refused(head, videos):
    r = load('clip4clip', preset='tiny', weights='random', head=head, device='cpu')
    with pytest.raises(ValueError, match='cannot index videos.*meanP.*similarity'): index_folder(videos, r)
    assert not (videos/'.vidlab').exists()

# ---------------------------------------------------------------------------------------------------------------- the index
def test_an_index_through_its_life(seq, videos, monkeypatch):
    first = index_folder(videos, seq)
    assert (first.new, len(first.bad)) == (5, 1) and 'hurt.mp4' in first.bad
    def never(*a): raise AssertionError('nothing has changed')
    with monkeypatch.context() as m:
        m.setattr(search, 'VideoEncoder', never)
        assert index_folder(videos, seq).unchanged == 5
    (videos/'0.mp4').rename(videos/'moved.mp4')
    encode(videos/'1.mp4', 40, 64, 48, rate=10, picture=lambda t: walk(3*t))
    r = index_folder(videos, seq)
    assert (r.new, r.moved, r.deleted) == (1, 1, 1)
    fresh = index_folder(videos, seq, out=videos.parent/'fresh').index
    assert np.array_equal(r.index.vectors, fresh.vectors) and list(r.index.files()['path']) == list(fresh.files()['path'])

def test_no_window_lies_across_a_cut(seq, tmp_path):
    if not importlib.util.find_spec('scenedetect'):
        with pytest.raises(ImportError, match=r'pip install vidlab\[scenes\]'): VideoEncoder(seq, scenes=True)
        return
    (tmp_path/'v').mkdir()
    shot = lambda t: np.where(walk(t) == 90, np.uint8(40 + 70*(t//50)), walk(t))
    encode(tmp_path/'v'/'a.mp4', 130, 64, 48, rate=10, picture=shot)
    index = index_folder(tmp_path/'v', seq, window=4., stride=1., scenes=True).index
    spans = index.rows('start', 'end').to_numpy()
    assert {5., 10.} <= set(spans.ravel().round(1))
    assert not any(s < c - .1 and e > c + .1 for s, e in spans for c in (5, 10))
    assert index_folder(tmp_path/'v', seq, window=4., stride=1., scenes=True).unchanged == 1
    assert index_folder(tmp_path/'v', seq, window=4., stride=1.).index.folder != index.folder

def test_models_side_by_side(seq, stan, videos):
    a, b, c = index_folder(videos, seq).index, index_folder(videos, stan).index, index_folder(videos, seq, window=3.).index
    assert len({a.folder, b.folder, c.folder}) == 3 and len(search.indexes_of(videos)) == 3
    assert Searcher(videos, model=b.folder.name).index.folder == b.folder
    with pytest.raises(ValueError, match="no index for 'nobody'; there are "): Searcher(videos, model='nobody')

def test_refused_before_work(seq, videos, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no such folder'): index_folder(tmp_path/'gone', seq)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no video files'): index_folder(tmp_path/'empty', seq)
    with pytest.raises(ValueError, match='none may be negative'): index_folder(videos, seq, window=-1.)
    with pytest.raises(ValueError, match='no index yet; first: vidlab index'): Searcher(videos)
    index_folder(videos, seq)
    s = Searcher(videos, ready=seq)
    monkeypatch.setattr(search, 'all_scores', None)
    for wrong, said in ((dict(), 'what is looked for'), (dict(text='a', clip='b'), 'what is looked for'), (dict(text='a', k=0), 'at least one'), (dict(clip='gone.mp4'), 'no such file'),
                        (dict(clip=f'{videos}/0.mp4@9-99'), 'no such stretch'), (dict(clip=f'{videos}/0.mp4@3-2'), 'ends before'), (dict(image=f'{videos}/0.mp4'), 'not a picture'),
                        (dict(text='a', path='nobody'), 'none of the 5 files'), (dict(text='a', where='x > 1'), 'in which table')):
        with pytest.raises((ValueError, FileNotFoundError), match=said): s(**wrong)

# ---------------------------------------------------------------------------------------------------------------- answers
class Told:
    "A model that knows what each text means: vectors are given"
    def __init__(self, ready, **texts): self.ready, self.texts, self.model = ready, texts, ready.model
    def embed_texts(self, texts): return torch.stack([torch.as_tensor(self.texts[t]) for t in texts])

def known(seq, videos, scores):
    "A searcher in whose index the text `p` has given scores"
    s = Searcher(videos, ready=seq)
    n, d = len(s.index), s.index.facts['dim']
    v = np.zeros((n, d), np.float16)
    for p, x in enumerate(scores): v[:, p] = x
    s.index._vectors = v
    s._ready = Told(seq, **{t: np.eye(d, dtype=np.float32)[p] for p, t in enumerate(('first', 'second'))})
    s._chance['text'] = Chance(.3, .05)
    return s

def test_answers_are_stretches(seq, videos):
    index_folder(videos, seq, window=2., stride=1.)
    s = Searcher(videos, ready=seq)
    at = {n: np.flatnonzero(s.names[s.code] == n) for n in s.names}
    score = np.zeros(len(s.code))
    score[at['2.mp4'][4:7]] = .9, 1, .9
    score[at['1.mp4'][0]] = .8
    s = known(seq, videos, [score])
    found = s('first', k=2)
    assert found['path'].tolist() == ['2.mp4', '1.mp4'] and found['start'].tolist() == pytest.approx([4.5, 0], abs=.6)
    assert found['end'].tolist() == pytest.approx([7.5, 1.5], abs=.6) and found['sure'].min() > .99
    assert s('first', k=1, path='1.*')['path'].tolist() == ['1.mp4'] and s('first', k=1, end=4.)['path'].tolist() == ['1.mp4']
    table = s.index.files()[['path']].assign(good=lambda t: t['path'] == '1.mp4')
    assert s('first', k=1, table=table, where='good')['path'].tolist() == ['1.mp4']
    with pytest.raises(ValueError, match='columns are path, good'): s('first', table=table, where='bad > 1')

def test_one_after_the_other(seq, videos):
    index_folder(videos, seq, window=2., stride=1.)
    s = Searcher(videos, ready=seq)
    at = {n: np.flatnonzero(s.names[s.code] == n) for n in s.names}
    first, second = np.zeros((2, len(s.code)))
    first[at['1.mp4'][0]], second[at['1.mp4'][2]] = .9, .9                       # in order
    first[at['2.mp4'][4]], second[at['2.mp4'][2]] = 1, 1                         # the other way round
    first[at['0.mp4'][0]], second[at['0.mp4'][-1]] = .95, .95                    # too far apart
    s = known(seq, videos, [first, second])
    found = s(['first', 'second'], k=1).iloc[0]
    assert (found['path'], found['start']) == ('1.mp4', 0) and found['end'] == pytest.approx(4, abs=.6) and found['parts'].startswith('first 0.0-')
    assert s(['second', 'first'], k=1)['path'][0] == '2.mp4'

@pytest.mark.parametrize('seed', range(5))
def test_chains_against_all_pairs(seed):
    g = np.random.default_rng(seed)
    file = np.sort(g.integers(0, 3, 30))
    start = np.concatenate([np.arange((file == f).sum())*.5 for f in range(3)])
    z, end = g.random((2, 30)), start + 2
    got, chain = best_chains(z, file, start, end)
    fits = lambda j, i: file[i] == file[j] and i > j and -search.OVERLAP*2 - 1e-3 <= start[i] - end[j] <= search.GAP*2
    want = [max((z[0, j] + z[1, i] - search.APART*abs(start[i] - end[j])/2 for j in range(30) if fits(j, i)), default=-np.inf) for i in range(30)]
    assert np.allclose(got, want)
    best = int(got.argmax())
    j, i = chain[:, best]
    assert z[0, j] + z[1, i] - search.APART*abs(start[i] - end[j])/2 == pytest.approx(got[best])

def test_chance_is_what_texts_without_meaning_find():
    g = np.random.default_rng(0)
    best = g.normal(.2, .03, (400, 500)).max(1)                                  # of 500 windows each
    c = Chance.of(best[:200])
    assert abs(np.mean(c.sure(best[200:])) - .5) < .06 and np.mean(c.sure(best[200:]) > .95) < .09

def test_a_clip_and_a_picture(seq, videos, tmp_path):
    from PIL import Image
    index_folder(videos, seq, window=2., stride=1.)
    s = Searcher(videos, ready=seq)
    found = s(clip=f'{videos}/1.mp4@2-4', k=3)
    assert len(found) == 3 and not ((found['path'] == '1.mp4') & (found['start'] < 4) & (found['end'] > 2)).any()
    Image.fromarray(walk(4)).save(tmp_path/'a.png')
    assert len(s(image=tmp_path/'a.png', k=2)) == 2

def test_seen_and_said(seq, videos):
    (videos/'1.en.srt').write_text('1\n00:00:02,000 --> 00:00:04,000\nput the frying pan on the stove\n\n2\n00:00:05,000 --> 00:00:06,000\nand wait\n')
    index_folder(videos, seq, window=2., stride=1.)
    s = Searcher(videos, ready=seq)
    found = s('a frying pan on a stove', k=4)
    assert found['path'][0] == '1.mp4' and found['start'][0] < 4 and found['end'][0] >= 4 and 'speech' in found['by'][0] and 'frying pan' in found['said'][0]
    assert 'speech' not in ' '.join(s('a frying pan', speech=False)['by'])
    assert not s('zebra crossing')['by'].str.contains('speech').any()

def test_everything_is_escaped(seq, videos, tmp_path):
    index_folder(videos, seq)
    found = Searcher(videos, ready=seq)('<script>alert(1)</script> $x$', k=9)
    assert any('<img' in p for p in found['path'])
    assert '<img' not in found._repr_html_() and '<script' not in found._repr_html_()
    files = save_answers(found, tmp_path/'out')
    assert files['strips'].stat().st_size > 5000 and len(answers_text(found).splitlines()) == len(found) + 1

def test_times_in_words():
    assert parse_clip('a.mp4@1:02-1:03.5') == ('a.mp4', 62, 63.5) and parse_clip('a@b.mp4') == ('a@b.mp4', None, None) and parse_clip('a.mp4@3-') == ('a.mp4', 3, None)
    assert in_order('a man walks in and then sits down') == ['a man walks in', 'a man sits down'] and in_order('a bus passes, then it rains') == ['a bus passes', 'it rains']

# ---------------------------------------------------------------------------------------------------------------- vectors by themselves, cuts, commands
def test_embed(seq, videos, tmp_path):
    whole, parts = embed_files(videos, seq, out=tmp_path/'a'), embed_files(videos/'0.mp4', seq, out=tmp_path/'b', window=2.)
    v = read_vectors(tmp_path/'a'/'vectors.safetensors')
    assert len(v) == 4 and sorted(whole['vector']) == [-1, 0, 1, 2, 3] and (whole['verdict'] == 'bad').sum() == 1 and len(parts) == 9
    i = whole.set_index('path').loc[str(videos/'1.mp4'), 'vector']
    assert abs(np.linalg.norm(v.astype(np.float32), axis=1) - 1).max() < 2e-3 and i >= 0

def test_cut(run, tmp_path):
    import av
    src = encode(tmp_path/'a.mp4', 50, 64, 48, rate=10, light=lambda t: 5*t, g=50, crf=8)
    code, out, _ = run('cut', f'{src}@1.3-2.6', f'out={tmp_path}/b.mp4')
    ix = index_video(tmp_path/'b.mp4')
    assert code == 0 and ix.n == 13 and ix.duration == pytest.approx(1.3, abs=.01)
    assert np.allclose(read_frames(ix, [0, 12]).mean((1, 2, 3)), read_frames(str(src), [13, 25]).mean((1, 2, 3)), atol=3)
    assert run('cut', f'{src}@1.3-2.6', f'out={tmp_path}/b.mp4')[1].strip().endswith('there already')
    code, out, _ = run('cut', f'{src}@4.5-', f'{src}@7-8', f'{tmp_path}/gone.mp4@1-2', '--out', tmp_path/'clips')
    assert code == 1 and 'a_4.5-end.mp4  5 frames' in out and out.count('failed') == 2
    assert run('cut', f'{src}@3-2')[0] == 2 and run('cut', f'{src}@1-2', f'{src}@2-3', 'out=c.mp4')[0] == 2
    (tmp_path/'answers.csv').write_text(f'path,start,end\n{src},0,1\n{src},2,3\n')
    assert run('cut', tmp_path/'answers.csv', '--most', 1, '--out', tmp_path/'more')[0] == 0 and len(list((tmp_path/'more').iterdir())) == 1

def test_cut_takes_the_sound_along(run, tmp_path):
    import av
    src = tmp_path/'s.mp4'
    with av.open(str(src), 'w') as c:
        v, a = c.add_stream('libx264', rate=10), c.add_stream('aac', rate=48000, layout='mono')
        v.width, v.height, v.pix_fmt = 64, 48, 'yuv420p'
        for t in range(40): c.mux(v.encode(av.VideoFrame.from_ndarray(walk(t), format='rgb24')))
        c.mux(v.encode(None))
        t = np.arange(4*48000)/48000
        wave = (np.sin(2*np.pi*440*t)*(t > 2)*.5).astype(np.float32)                          # silence, then a tone
        for i in range(0, len(wave), 1024):
            f = av.AudioFrame.from_ndarray(wave[None, i:i + 1024], 'fltp', 'mono')
            f.sample_rate, f.pts = 48000, i
            c.mux(a.encode(f))
        c.mux(a.encode(None))
    assert run('cut', f'{src}@1-3', f'out={tmp_path}/b.mp4')[0] == 0
    with av.open(str(tmp_path/'b.mp4')) as c: heard = np.concatenate([f.to_ndarray()[0] for f in c.decode(audio=0)])
    assert len(heard)/48000 == pytest.approx(2, abs=.1)
    assert abs(heard[5000:43000]).max() < .05 and abs(heard[53000:90000]).max() > .3

def test_commands_refuse(capsys, videos):
    for words, said in ((['index'], 'usage: vidlab index FOLDER'), (['index', 'nowhere'], 'no such file or folder'), (['search', str(videos), 'a', 'b'], 'name=value'), (['search', str(videos), 'a', 'pth=x'], "did you mean 'path'")):
        assert cli.main(words) == 2 and said in capsys.readouterr().err

def test_index_command_without_a_kernel(seq, videos, monkeypatch, capsys):
    "Nothing to do: no page runs"
    weights = videos.parent/'w.pt'
    weights.touch()
    r = index_folder(videos, seq)
    facts = r.index.facts
    facts['asked'] = dict(facts['asked'], model=str(weights), options={})
    (r.index.folder/'index.json').write_text(json.dumps(facts))
    monkeypatch.setattr(cli, 'run_page', lambda *a: 'a page ran')
    assert cli.main(['index', str(videos), f'model={weights}']) == 0 and '5 unchanged' in capsys.readouterr().out
    (videos/'0.mp4').unlink()
    assert cli.main(['index', str(videos), f'model={weights}']) == 'a page ran'

@pytest.mark.skipif(not (MEDIA/'real').is_dir(), reason='VIDLAB_MEDIA is not set')
def test_real_and_broken_files(seq, tmp_path):
    for kind in ('real', 'bad'):
        for p in sorted((MEDIA/kind).iterdir())[:14]:
            if p.is_file() and p.stat().st_size < 3e6: shutil.copy(p, tmp_path/p.name)
    r = index_folder(tmp_path, seq, rate=.5, window=8.)
    t = r.index.files()
    assert len(t) == len(search.videos_below(tmp_path)) and set(t['verdict']) <= {'ok', 'warn', 'bad'}
    assert (t['verdict'] == 'bad').any() and (t[t['verdict'] == 'bad']['reason'].str.len() > 5).all() and (t[t['verdict'] != 'bad']['rows'] > 0).all()

# ---------------------------------------------------------------------------------------------------------------- truth
@pytest.mark.long
def test_what_happens_is_found_by_who_knows_time(tmp_path):
    "An average of frames cannot tell an act from its opposite: it is at chance, one in two and one in four"
    from vidlab.grounding import found_right, recall_of, twin_films
    from vidlab.train import config_from, run as train
    questions, found = twin_films(tmp_path/'films', 54, seed=8), {}
    for recipe in ('shapes_seqTransf', 'shapes_meanP'):
        ready = load(train(config_from(recipe, device='cpu')).path, device='cpu')
        index_folder(tmp_path/'films', ready, out=tmp_path/recipe)
        found[recipe] = [recall_of(found_right(Searcher(tmp_path/recipe, ready=ready), q)) for q in questions]
    one, two = found['shapes_seqTransf']
    assert one.high >= 90 and one.value > 85 and two.high >= 85 and two.value > 75, found
    one, two = found['shapes_meanP']
    assert one.value < 62 and two.value < 35, found
