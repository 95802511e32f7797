"Predictions on any files: temperatures against another minimiser, timelines against planted acts, folders that are stopped and go on, what is broken."
import dataclasses, json, os, shutil
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch, torch.nn.functional as F
from vidlab import cli, predict
from vidlab.core import read_jsonl, rng, write_json
from vidlab.ckpt import save_checkpoint
from vidlab.data.shapes import draw, encode, make_shapes
from vidlab.predict import Asked, Calibration, Timeline, calibrate, calibration_error, files_of, fit_temperature, measure, predict_files, read_timeline, timeline
from vidlab.ready import load
from vidlab.registry import create_model
from vidlab.tasks.base import AVERAGES
from vidlab.train import make_config
from vidlab.widgets.timeline import TimelineExplorer, timeline_sheet

pytestmark = pytest.mark.usefixtures('outputs')
LOOKS = {'red': 'a large red circle in the middle', 'green': 'a large green triangle in the middle', 'blue': 'a large blue square in the middle'}
THING = dict(red='circle', green='triangle', blue='square')


@pytest.fixture(scope='module')
def clip(): return load('clip4clip', preset='tiny', weights='shapes', device='cpu', max_frames=4, workers=0)

def story(path, acts, seconds=3., fps=8):
    "A film of things in the middle, one after the other; the truth is (start, end, colour)"
    n, gen, at, truth, parts = int(seconds*fps), rng(len(acts)), 0., [], []
    for color in acts:
        x = np.full(n, 32.)
        parts.append(draw(THING[color], color, x, x, np.full(n, 10.), 120., gen))
        truth.append((at, at + seconds, color))
        at += seconds
    encode(path, np.concatenate(parts))
    return truth

def views_of(n=600, classes=4, views=1, scale=2.5, seed=0):
    "Views of clips whose labels follow a softmax, said `scale` times too loudly"
    gen = torch.Generator().manual_seed(seed)
    true = 2*torch.randn(n, classes, generator=gen)
    y = torch.multinomial(true.softmax(1), 1, generator=gen)[:, 0]
    logits = scale*(true.repeat_interleave(views, 0) + .2*(views > 1)*torch.randn(n*views, classes, generator=gen))
    return dict(sid=torch.arange(n).repeat_interleave(views), logits=logits, label=y.repeat_interleave(views))


@pytest.mark.parametrize('average,views', [('softmax', 1), ('logits', 1), ('softmax', 3), ('logits', 3)])
def test_temperature_against_another_minimiser(average, views):
    "L-BFGS on the loss itself, written anew, finds the same number"
    part = views_of(views=views)
    n, C = 600, part['logits'].shape[1]
    x, y = part['logits'].double().view(n, views, C), part['label'].view(n, views)[:, 0]
    log_t = torch.zeros(1, dtype=torch.double, requires_grad=True)
    def loss():
        z = x/log_t.exp()
        log = z.mean(1).log_softmax(1) if average == 'logits' else z.softmax(2).mean(1).log()
        target = torch.full((n, C), 1/(n + 2)/(C - 1), dtype=torch.double).scatter(1, y[:, None], 1 - 1/(n + 2))
        return -(target*log).sum(1).mean()
    opt = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn='strong_wolfe')
    def step():
        opt.zero_grad()
        l = loss()
        l.backward()
        return l
    opt.step(step)
    assert fit_temperature(part, average) == pytest.approx(log_t.exp().item(), rel=1e-3)
    assert fit_temperature({k: v*3 if k == 'logits' else v for k, v in part.items()}, average) == pytest.approx(3*log_t.exp().item(), rel=2e-3)


def test_calibration_is_measured_on_other_clips():
    "The error falls, its interval holds what a large sample says, and copies of a clip add no certainty"
    found, far = measure(views_of(), 'softmax', np.arange(600)), views_of(60_000, seed=1)
    p = (far['logits'].double()/found.temperature).softmax(1)
    truth = calibration_error(*[v.numpy() for v in (p.max(1).values, p.argmax(1) == far['label'])])
    assert found.before['low'] > found.after['high'] and found.after['low'] <= truth <= found.after['high']
    twice = {k: torch.cat([v, v + 600*(k == 'sid')]) for k, v in views_of().items()}
    same = measure(twice, 'softmax', np.arange(1200) % 600)
    wide = lambda c: c.before['high'] - c.before['low']
    assert wide(same) > .85*wide(found) and same.temperature == pytest.approx(found.temperature, rel=.01)
    right = dict(sid=torch.arange(50), logits=20*F.one_hot(torch.arange(50) % 4).float(), label=torch.arange(50) % 4)
    sure = measure(right, 'softmax', np.arange(50))
    assert sure.after['high'] > 2 and sure.temperature > .5                 # 50 of 50 right is no proof of 100 %
    with pytest.raises(ValueError, match='belong together'): measure(views_of(40), 'softmax', np.zeros(40, int))


def test_calibration_error_by_hand():
    sure, right = np.array([.95, .95, .95, .95, .55, .55]), np.array([1, 1, 1, 0, 1, 0])
    assert calibration_error(sure, right) == pytest.approx(100*(4*.2 + 2*.05)/6)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A trained classifier of motions, with its validation split"
    os.environ['VIDLAB_OUTPUTS'], old = str(tmp_path_factory.mktemp('runs')), os.environ.get('VIDLAB_OUTPUTS')
    from vidlab.train import run as train
    data = make_shapes(tmp_path_factory.mktemp('s'), kinds=('clips',), sizes=dict(clips=dict(train=24, val=24, test=6)))
    cfg = make_config(model='videomamba', preset='tiny', dim=32, depth=2, state=4, task='recognition', sampler='segment', max_frames=4, eval_clips=2, batch_size=8, epochs=1,
                      workers=0, device='cpu', precision='fp32', data_path=str(data), test_split='', check=False)
    yield train(cfg).path, data
    os.environ.pop('VIDLAB_OUTPUTS') if old is None else os.environ.update(VIDLAB_OUTPUTS=old)


def test_the_temperature_of_a_run(run, tmp_path, monkeypatch):
    "Fitted on its validation split with its views, kept beside it, and used: probabilities of the answers follow"
    folder, data = run
    ready = load(folder, workers=0)
    c = calibrate(ready)
    assert c and c.clips == 24 and c.protocol['split'] == 'val' and c.protocol['clips'] == 2 and 'temperature' in str(c)
    monkeypatch.setattr(predict, 'measure', lambda *a: pytest.fail('measured twice'))
    assert calibrate(load(folder, workers=0)) == c
    videos = sorted((data/'clips'/'test').glob('*.mp4'))
    found = predict_files(folder, videos, tmp_path/'out', dict(workers=0), k=6, long=-1)
    plain = ready.predict(videos, k=6)
    for v in videos:
        at = lambda t, col: t[t[col] == str(v)].set_index('class')['probability']
        mine, theirs = at(found.answers, 'path'), at(plain, 'video')
        assert mine.sum() == pytest.approx(1) and mine.index[0] == theirs.index[0] or c.temperature != 1
    views = ready._each(ready.clips(videos, views=True), lambda b: dict(logits=ready.task.predict(b)))
    want = (views['logits'].double()/c.temperature).softmax(1).view(len(videos), 2, -1).mean(1)
    got = [at(found.answers, 'path')[ready.task.classes].tolist() for v in videos for at in [lambda t, col: t[t[col] == str(v)].set_index('class')['probability']]]
    assert np.allclose(got, want, atol=1e-5)
    assert json.loads((tmp_path/'out'/'protocol.json').read_text())['calibration']['temperature'] == c.temperature


def test_why_there_is_no_temperature(run, clip, tmp_path):
    folder, data = run
    moved = shutil.copytree(folder/'ckpt'/'best', tmp_path/'moved') if (folder/'ckpt'/'best').exists() else shutil.copytree(folder/'ckpt'/'last', tmp_path/'moved')
    assert 'no run folder' in calibrate(load(moved, workers=0)).reason
    assert 'no validation split' in calibrate(load(folder, val_split='', workers=0)).reason
    assert calibrate(load(folder, data_path=str(tmp_path/'gone'), workers=0)).reason
    assert 'no run folder' in calibrate(clip, clip._answering(['a', 'b'], ['{}'])).reason
    assert 'not calibrated' in str(Calibration(reason='x')) and not Calibration(reason='x')


@pytest.mark.parametrize('acts', [('red', 'blue'), ('green', 'red', 'green', 'blue'), ('blue', 'blue', 'red')])
def test_a_timeline_against_planted_acts(clip, acts, tmp_path):
    "Nine of ten seconds get the class that is shown, and segments end where acts end"
    truth = story(tmp_path/'a.mp4', acts)
    line = timeline(clip, tmp_path/'a.mp4', window=1., classes=list(LOOKS.values()))
    t = np.arange(.05, line.seconds, .1)
    shown = np.array([next(LOOKS[c] for a, b, c in truth if a <= x < b) if x < truth[-1][1] else LOOKS[truth[-1][2]] for x in t])
    said = np.array(line.names)[line.at(t).argmax(1)]
    assert (said == shown).mean() > .9
    merged = [c for i, c in enumerate(acts) if i == 0 or acts[i - 1] != c]
    segments = line.segments()
    assert [s['class'] for s in segments] == [LOOKS[c] for c in merged]
    assert segments[0]['start'] == 0 and segments[-1]['end'] == pytest.approx(line.seconds) and all(a['end'] == b['start'] for a, b in zip(segments, segments[1:]))
    cuts = [b for (a, b, c), nxt in zip(truth, acts[1:]) if c != nxt]
    assert np.allclose([s['end'] for s in segments[:-1]], cuts, atol=.5)


def test_smoothing_merging_and_thresholds():
    "One wrong window disappears under a longer smoothing or a least length; unsure stretches are nobody's"
    n = 40
    spans = np.stack([np.arange(n)*.5, np.arange(n)*.5 + 1.], 1)
    p = np.full((n, 3), .1)
    p[:20, 0] = p[20:, 1] = .8
    p[8] = .1, .1, .8
    p[30:34] = .34, .33, .33
    line = Timeline('x.mp4', 20.5, spans, p, ['a', 'b', 'c'])
    raw = dataclasses.replace(line, smooth=.01)
    classes = lambda l, **kw: [s['class'] for s in l.segments(**{'shortest': 0, **kw})]
    assert classes(raw) == ['a', 'c', 'a', 'b', 'a', 'b'] and classes(raw, shortest=1.) == ['a', 'b', 'a', 'b'] and classes(raw, shortest=3.) == ['a', 'b']
    assert classes(dataclasses.replace(line, smooth=4.))[:2] == ['a', 'b']
    assert classes(raw, shortest=-1) == classes(raw, shortest=.75) == ['a', 'b', 'a', 'b']
    between = np.array([[.9, .1, 0], [.9, .1, 0], [.3, .2, .5], [.1, .9, 0], [.1, .9, 0]])
    middle = Timeline('x.mp4', 5., np.stack([np.arange(5.), np.arange(5.) + 1], 1), between, ['a', 'b', 'c'], .01).segments(shortest=1.5)
    assert [(s['class'], s['end']) for s in middle] == [('a', 3.), ('b', 5.)]                # the one in the middle looks more like a
    gaps = raw.segments(least=.5, shortest=0)
    assert [s['class'] for s in gaps] == ['a', 'c', 'a', 'b', 'b'] and gaps[4]['start'] - gaps[3]['end'] == pytest.approx(2.)
    assert np.allclose(line.at(np.linspace(-3, 30, 50)).sum(1), p.sum(1).mean(), atol=.1) and not np.isnan(line.at([0., 20.5])).any()
    one = Timeline('x.mp4', 3., np.array([[0., 3.]]), p[:1], ['a', 'b', 'c'])
    assert one.segments() == [{'start': 0., 'end': 3., 'class': 'a', 'probability': pytest.approx(.8)}] and one.at([0, 1, 9]).shape == (3, 3)


def test_numbers_along_time_and_their_picture(tmp_path):
    "A model of one number has a line and no segments"
    d = tmp_path/'run'
    cfg = make_config(model='videomamba', preset='tiny', task='regression', sampler='segment', max_frames=4, data='class_folders', device='cpu', precision='fp32', workers=0, dim=32, depth=2, target_mean=5.)
    net = create_model('videomamba', preset='tiny', classes=1, max_frames=4, dim=32, depth=2)
    save_checkpoint(d, net.state_dict(), dict(config=dataclasses.asdict(cfg), model=net.card))
    story(tmp_path/'a.mp4', ('red', 'blue'))
    found = predict_files(d, tmp_path/'a.mp4', tmp_path/'out', long=1., window=1.)
    line = found.timeline(str(tmp_path/'a.mp4'))
    assert line.names == [] and line.segments() == [] and line.scores.shape == (len(line.spans), 1) and abs(line.scores.mean() - 5) < 3
    assert 'value' in found.answers and 'numbers' in str(found.calibration) and len(found.rows) == 1
    assert line.show()._repr_png_() and (tmp_path/'out'/'windows.csv').exists() and not (tmp_path/'out'/'segments.csv').exists()


HOW = dict(classes=list(LOOKS.values()), k=2, long=5., window=1.)

@pytest.fixture
def videos(tmp_path):
    d = tmp_path/'videos'
    d.mkdir()
    story(d/'long $1 ü.mp4', ('red', 'green'))
    for i, c in enumerate(('red', 'blue', 'green')): story(d/f'{i}.mp4', (c,), 1.)
    (d/'half.mp4').write_bytes((d/'0.mp4').read_bytes()[:700])
    (d/'empty.mp4').write_bytes(b'')
    return d


def test_a_folder_with_broken_files(clip, videos, tmp_path):
    "Every file is a row; the tables say the same in each form; nothing is asked twice, and a changed file is asked again"
    found = predict_files(clip, videos, tmp_path/'out', **HOW)
    t = found.answers
    first = t[t['rank'].fillna(1) == 1].set_index('id')
    assert sorted(first.index) == ['0.mp4', '1.mp4', '2.mp4', 'empty.mp4', 'half.mp4', 'long $1 ü.mp4']
    assert first.loc[['0.mp4', '1.mp4', '2.mp4'], 'class'].tolist() == [LOOKS[c] for c in ('red', 'blue', 'green')]
    assert [bool(first.loc[f, 'reason']) for f in ('half.mp4', 'empty.mp4', '0.mp4')] == [True, True, False] and 'half.mp4' in str(found)
    csv, parquet = pd.read_csv(tmp_path/'out'/'predictions.csv'), pd.read_parquet(tmp_path/'out'/'predictions.parquet')
    rows = read_jsonl(tmp_path/'out'/'predictions.jsonl')
    assert len(csv) == len(parquet) == len(rows) == len(t) and csv['id'].tolist() == parquet['id'].tolist() == [r['id'] for r in rows]
    assert [s['class'] for s in found.timeline('long $1 ü.mp4').segments()] == [LOOKS['red'], LOOKS['green']]
    w = TimelineExplorer(tmp_path/'out')
    w.segment.index = 1
    assert w.video.options == ('long $1 ü.mp4',) and w.t.value == pytest.approx(4.5, abs=.5) and LOOKS['green'] in timeline_sheet(tmp_path/'out', t=5.).text
    with pytest.raises(FileNotFoundError, match='vidlab predict'): TimelineExplorer(tmp_path)
    lines = len(read_jsonl(tmp_path/'out'/'rows.jsonl'))
    again = predict_files(clip, videos, tmp_path/'out', **HOW)
    assert again.rows == found.rows and len(read_jsonl(tmp_path/'out'/'rows.jsonl')) == lines
    story(videos/'half.mp4', ('blue',), 1.)
    (videos/'1.mp4').unlink()
    now = predict_files(clip, videos, tmp_path/'out', **HOW)
    assert len(now.rows) == 5 and len(read_jsonl(tmp_path/'out'/'rows.jsonl')) == lines + 1
    assert next(r for r in now.rows if r['id'] == 'half.mp4')['answers'][0]['class'] == LOOKS['blue']
    with pytest.raises(ValueError, match='shorter than long'): now.timeline('0.mp4')
    with pytest.raises(ValueError, match='none of the 5 files'): now.timeline('gone.mp4')


def test_it_goes_on_where_it_was_stopped(clip, videos, tmp_path, monkeypatch):
    "Stopped after two rows: the second call asks about the others, and the result is that of one call"
    whole = predict_files(clip, videos, tmp_path/'whole', **HOW)
    ask, seen = predict.Prediction._said, []
    def counted(self, views):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(1)
        return ask(self, views)
    monkeypatch.setattr(predict.Prediction, '_said', counted)
    with pytest.raises(KeyboardInterrupt): predict_files(clip, videos, tmp_path/'out', **HOW)
    assert len(read_jsonl(tmp_path/'out'/'rows.jsonl')) == 2 and not (tmp_path/'out'/'predictions.csv').exists()
    with open(tmp_path/'out'/'rows.jsonl', 'a') as f: f.write('{"id": "torn')                  # and killed in the middle of a line
    count = []
    monkeypatch.setattr(predict.Prediction, '_said', lambda self, v: count.append(1) or ask(self, v))
    found = predict_files(clip, videos, tmp_path/'out', **HOW)
    assert len(count) == 2 and [r['id'] for r in found.rows] == [r['id'] for r in whole.rows]
    a, b = (pd.read_csv(tmp_path/d/'predictions.csv') for d in ('out', 'whole'))
    assert a['class'].tolist() == b['class'].tolist() and np.allclose(a['probability'], b['probability'], atol=1e-5, equal_nan=True)     # batches differ
    assert [s['class'] for s in found.tables()['segments']] == [s['class'] for s in whole.tables()['segments']]


def test_a_table_with_parts_of_videos(clip, tmp_path):
    "Rows with times are clips of their own; several captions are one clip; a missing file is a row"
    story(tmp_path/'a.mp4', ('red', 'blue'))
    pd.DataFrame(dict(id=['x', 'x', 'y', 'z'], path=['a.mp4', 'a.mp4', 'a.mp4', 'gone.mp4'], start=[0, 0, 3.2, None], end=[2.8, 2.8, 6, None],
                      text=['one', 'two', 'three', 'four'])).to_csv(tmp_path/'m.csv', index=False)
    found = predict_files(clip, tmp_path/'m.csv', tmp_path/'out', **dict(HOW, k=1))
    assert [(r['id'], (r.get('answers') or [{}])[0].get('class')) for r in found.rows] == [('x', LOOKS['red']), ('y', LOOKS['blue']), ('z', None)]
    assert 'gone.mp4' in str(found.rows[2]) and found.rows[2]['reason'] and not found.lines


def test_bad_questions(clip, run, tmp_path):
    "Refused before a model is loaded, or a file is read"
    for how, said in ((dict(k=0), 'at least one'), (dict(least=2), 'probability'), (dict(window=-1), 'seconds'), (dict(shortest=float('nan')), 'seconds'), (dict(classes=['a', 'a']), 'twice')):
        with pytest.raises(ValueError, match=said): predict_files('nowhere', tmp_path, **how)
    with pytest.raises(FileNotFoundError, match='gone'): predict_files('nowhere', tmp_path/'gone')
    story(tmp_path/'a.mp4', ('red',), 1.)
    with pytest.raises(ValueError, match='name them'): predict_files(clip, tmp_path/'a.mp4')
    with pytest.raises(ValueError, match='classes of its own'): predict_files(run[0], tmp_path/'a.mp4', None, dict(workers=0), classes=['a'])
    with pytest.raises(TypeError): predict_files(clip, tmp_path/'a.mp4', clases=['a'])


@pytest.mark.parametrize('args,said', [(['predict', 'clip4clip', 'gone.mp4'], 'no such file'), (['predict', 'gone.pt', '.'], 'no such file'), (['predict', 'clip4clip', '.', 'x'], 'name=value')])
def test_the_command_refuses(args, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'run_page', lambda *a: pytest.fail('a kernel was to be started'))
    assert cli.main(args) == 2 and said in capsys.readouterr().err


@pytest.mark.long
def test_the_page(videos, tmp_path, outputs):
    "The run page on a folder: the end says what there is"
    import papermill
    from vidlab.core import pages_dir
    papermill.execute_notebook(str(pages_dir()/'predict.ipynb'), str(tmp_path/'p.ipynb'), dict(run='clip4clip', videos=str(videos), classes=list(LOOKS.values()), device='cpu',
                               options=dict(preset='tiny', weights='shapes', max_frames=4, workers=0), long=5., window=1., out=str(tmp_path/'out')), kernel_name='python3', progress_bar=False)
    said = cli.result_of(json.loads((tmp_path/'p.ipynb').read_text()))
    assert '6 files, 2 not read, 1 with a timeline' in said and 'not calibrated' in said and 'segments.csv' in said


def test_a_question_that_was_refused_leaves_the_folder_free(tmp_path):
    "Only answers bind a folder to their question; a name is no list of names"
    from vidlab.predict import Asked, _same_question
    for k in (1, 2): _same_question(tmp_path/'protocol.json', dict(k=k))
    (tmp_path/'rows.jsonl').touch()
    with pytest.raises(ValueError, match=r'another question \(k differ\)'): _same_question(tmp_path/'protocol.json', dict(k=3))
    with pytest.raises(ValueError, match="classes='moves left': a list of names"): Asked(classes='moves left')
