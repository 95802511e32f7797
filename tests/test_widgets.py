"Widgets without a browser: the function twins, what a change of a control changes, text that stays text, budgets."
import html, json, subprocess, sys, time
from pathlib import Path
import numpy as np
import pyarrow as pa
import pytest
import torch
import warm
from vidlab.core import RunFolder, write_json
from vidlab.data.manifest import Manifest
from vidlab.data.shapes import MOTIONS, make_shapes
from vidlab.tasks.base import Evaluation
from vidlab.tasks.recognition import RecognitionTask
from vidlab.widgets.browse import ClipBrowser, browse_sheet, found, ordered
from vidlab.widgets.comparing import SIDES, RunComparison, disagree
from vidlab.widgets.errors import ErrorBrowser, confused, confusion_clips, error_sheet, gap, map_clips, slice_clips, slice_table
from vidlab.widgets.monitor import RunMonitor, run_sheet, run_table, stop_run, time_left
from vidlab.widgets.parts import FILM, PICTURE, Collection, clip_sheet, collection, esc, moving, table, webp
from vidlab.widgets.retrieval import WAYS, RetrievalBrowser, query_sheet, query_table, ranked
from vidlab.widgets.sampling import SamplerPreview, sampling_sheet

NASTY = '<img src=x onerror="alert(1)"> & $a$ </div>'
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def rows(): return Manifest.read(make_shapes(kinds='clips')/'clips'/'test.csv')


@pytest.fixture(scope='module')
def nasty(rows):
    "Rows whose names and captions are markup"
    few = rows.select(np.arange(12))
    strings = lambda f: pa.array([f(i) for i in range(12)], pa.large_string())
    return few.with_columns(few.cols | dict(id=strings(lambda i: f'<b>{i}</b>'), text=strings(lambda i: f'{NASTY} {i}'), color=strings(lambda i: f'<i>{i % 2}</i>')))


def retrieval(rows, gap=3, seed=0):
    "An evaluation in which every third caption finds the clip after its own"
    n = len(rows.groups())
    sim = torch.eye(n) + .2*torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    for i in range(0, n - 1, gap): sim[i, i + 1] += 1.5
    i = torch.arange(n)
    return Evaluation(dict(sim=sim, text_sid=i, text_view=torch.zeros_like(i), video_sid=i), rows)


def recognition(rows, wrong=()):
    "An evaluation that is right but for some clips, which it takes for the next class"
    label = torch.as_tensor(np.array(rows.column('label')))
    prob = torch.nn.functional.one_hot(label, 6).float()
    for i in wrong: prob[i] = prob[i].roll(1)
    made = Evaluation(dict(prob=prob, label=label, sid=torch.arange(len(label))), rows, MOTIONS)
    return Collection(rows, numbers=RecognitionTask.per_clip(made)[0], task=RecognitionTask, evaluation=made, name='made')


def harmless(text):
    "No markup of the captions is left in a page"
    assert '<img src=x' not in text and '<b>' not in text and '<i>' not in text and '$a$' not in text
    return text


def test_imports_leave_the_widgets_out():
    code = 'import sys, vidlab, vidlab.widgets.browse, vidlab.widgets.monitor, vidlab.widgets.comparing, vidlab.widgets.times; print("ipywidgets" in sys.modules)'
    assert warm.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'      # nor do the libraries bring it


def test_text_stays_text(nasty):
    assert harmless(esc(NASTY)) and html.unescape(esc('a<b')) == 'a<b'
    clips = Collection(nasty, evaluation=retrieval(nasty), name=NASTY)
    for s in (browse_sheet(clips), clip_sheet(clips, 1), query_sheet(clips, 0), query_sheet(clips, 0, WAYS[1]), sampling_sheet(clips, 0, draws=1)): harmless(s.html)
    b, r = ClipBrowser(clips, n=2), RetrievalBrowser(clips, k=2)
    for w in (b, r): w.list.buttons[0].click()
    for x in (b.list.list, b.list.detail, b.count, r.list.list, r.list.detail, r.out): harmless(x.value)
    df = query_table(clips)
    df.columns = ['<b>', 'rank', 'first']
    harmless(table(df))


def test_pictures_keep_the_budget():
    noise = np.random.default_rng(0).integers(0, 255, (8, 150, 200, 3), dtype=np.uint8)
    assert len(webp(noise[0])) <= PICTURE and len(moving(noise, 8)) <= FILM and len(moving(noise, 8, 20_000)) <= 20_000 and len(webp(noise[0], 3000)) <= 3000


def test_clip_browser_follows_its_controls(rows):
    b = ClipBrowser(rows, n=4)
    b.text.value = 'LARGE red'
    assert len(b.which) == 18 and all('large red' in b.subject.clip(c)['text'] for c in b.which)
    b.column.value = 'motion'
    b.value.value = 'grows'
    assert len(b.list.which) == 3 and b.on.disabled and '1–3 of 3' in b.count.value
    b.column.value = ''
    b.by.value = 'shape'
    first = b.subject.clip(b.list.which[0])['shape']
    b.down.value = True
    assert (first, b.subject.clip(b.list.which[0])['shape']) == ('circle', 'triangle')
    b.on.click()
    assert b.page == 1 and b.list.which == b.which[4:8].tolist()
    b.list.buttons[2].click()
    assert b.subject.clip(b.list.which[2])['id'] in b.list.detail.value
    assert browse_sheet(rows, **b.state()).html.count('<img') == b.list.list.value.count('<img') == 4
    b.text.value = 'no such thing'
    assert b.list.which == [] and 'none of 108' in b.count.value and all(x.disabled for x in b.list.buttons)


def test_found_and_ordered_at_the_edges(rows):
    c = Collection(rows, numbers=dict(R1=np.r_[np.nan, np.arange(107.)]))
    assert ordered(c, found(c), 'R1')[[0, -1]].tolist() == [1, 0] and ordered(c, found(c), 'R1', True)[[0, -1]].tolist() == [107, 0]
    assert len(found(c, '<b>')) == 0 and found(c, column='label', value=2).tolist() == np.flatnonzero(rows.column('label') == 2).tolist()


def test_a_file_that_cannot_be_read_says_so_and_harms_no_other(rows, tmp_path):
    (tmp_path/'bad.mp4').write_bytes(b'no video')
    few = rows.select([0, 1])
    few = few.with_columns(few.cols | dict(path=pa.array([str(tmp_path/'bad.mp4'), str(rows.row(1)['path'])], pa.large_string())))
    b = ClipBrowser(few)
    assert b.list.list.value.count('<img') == 1 and 'color:#c62828' in b.list.list.value
    b.list.buttons[0].click()
    b.list.play.value = True
    assert 'color:#c62828' in b.list.detail.value


def test_retrieval_browser(rows):
    clips = Collection(rows, evaluation=retrieval(rows))
    r, w = ranked(clips), RetrievalBrowser(clips, k=2)
    assert (r.ranks > 1).sum() == 36 and ranked(clips, WAYS[1]).scores.shape == (108, 108)
    w.missed.value = True
    assert len(w.query.options) == 36 and w.list.which[0] == w.query.value + 1 and w.query.value in w.list.which
    assert query_sheet(clips, **w.state()).html.count('<img') == len(w.list.which)
    w.way.value = WAYS[1]
    assert w.out.value.count('<img') == 1
    w.text.value = 'nothing like it'
    assert 'no such query' in w.out.value and w.list.which == [] and w.sheet().text == 'no such query'


def test_dual_softmax_is_that_of_the_evaluation(rows):
    sim = torch.tensor([[.9, .8], [.95, .1]])
    i = torch.arange(2)
    clips = Collection(rows.select([0, 1]), evaluation=Evaluation(dict(sim=sim*50, text_sid=i, text_view=i*0, video_sid=i), rows))
    assert ranked(clips).ranks.tolist() == [1, 2]
    clips.protocol = dict(post='dual softmax')
    assert not np.allclose(ranked(clips).scores, sim.numpy()*50)


def test_errors_of_a_classifier(rows):
    wrong = [i for i in range(108) if rows.row(i)['size'] == 'small' and rows.row(i)['shape'] != 'circle']
    clips = recognition(rows, wrong)
    t = slice_table(clips)
    assert (t['column'][0], t['value'][0], t['sure'][0]) == ('size', 'small', True) and t['gap high'][0] < 0
    assert set(wrong) < set(slice_clips(clips, 'size', 'small').tolist())
    w = ErrorBrowser(clips, n=3)
    assert w.views == ['map', 'confusion', 'slices']
    cell = next(i for i, b in enumerate(w.cells) if not b.disabled)
    w.cells[cell].click()
    assert set(w.list.which) <= set(map_clips(clips, cell).tolist()) and w.list.which
    w.view.value = 'confusion'
    w.panel.children[0].children[8 + 1].click()                  # class 0 taken for class 1
    assert set(w.list.which) <= set(confusion_clips(clips, 0, 1).tolist()) and len(confusion_clips(clips, 0, 1)) == confused(clips)[0][0, 1] > 0
    w.view.value = 'slices'
    w.slice.value = 1
    assert t['value'][1] in w.head.value
    for view in w.views: assert error_sheet(clips, view).html


def test_nothing_is_found_where_nothing_is(rows):
    "Errors by chance: slices that are sure of a gap are rare"
    sure = 0
    for seed in range(20):
        x = 100.*(np.random.default_rng(seed).random(108) < .5)
        sure += int(slice_table(Collection(rows, numbers=dict(R1=x)))['sure'].any())
    assert sure <= 3


def test_a_gap_and_its_interval():
    d, low, high = gap(np.r_[np.ones(30), np.zeros(70)], np.r_[np.ones(60), np.zeros(40)], 'share')
    assert abs(d + 30) < 1e-9 and -43 < low < -41 and -17 < high < -15          # Newcombe's hybrid score interval


def test_comparison(rows):
    one, two = (Collection(rows, numbers=dict(R1=100.*np.isin(np.arange(108), x)), name=n) for n, x in (('a', range(50)), ('b', range(40, 100))))
    assert [len(disagree(one, two, s)) for s in SIDES] == [50, 40, 8, 10]
    w = RunComparison([one, two])
    w.side.value = 'only the first'
    assert '40 of 108' in w.out.value and w.list.which == [0, 1, 2, 3]
    with pytest.raises(ValueError, match='different rows'): disagree(one, Collection(rows.select(np.arange(107)), numbers=dict(R1=np.zeros(107))))


def test_sampler_preview(rows):
    w = SamplerPreview(rows)
    w.sampler.value = 'segment'
    w.frames.value = 3
    assert 'test: frames 2, 7, 12' in w.out.value and w.rate.disabled
    before = w.out.value
    w.again.click()
    assert w.out.value != before
    w.augment.value = 'rrd'
    assert 'rrc' in w.out.value and 'color:#c62828' in w.out.value          # an error in words, not a trace


TRAINS = '''
import sys, time
from vidlab.core import RunFolder
from vidlab.learner import stop_signals
from vidlab.owner import owned
run = RunFolder(sys.argv[1])
with owned(run), stop_signals() as asked:
    for s in range(1, 6): run.log(kind='step', step=s, epoch=0, loss=1/s, lr=[.1], data_time=.1, step_time=.2, clips_per_s=50., peak_MiB=9)
    run.status('running', step=5, epoch=0, total_steps=50)
    while not asked(): time.sleep(.02)
    run.status('stopped', reason=f'{asked()}; go on with resume=x')
'''

def test_run_monitor_watches_and_stops(outputs):
    run = RunFolder.new('shapes_meanP')
    write_json(run/'config.json', dict(task='retrieval', recipe='shapes_meanP'))
    p = subprocess.Popen([sys.executable, '-c', TRAINS, str(run.path)])
    try:
        for _ in range(600):
            if run.status().get('state') == 'running': break
            time.sleep(.05)
        w = RunMonitor()
        assert w.subject == run.path and not w.stop.disabled and 'running' in w.out.value and '50 clips/s' in w.out.value
        assert run_table()['state'].tolist() == ['running']
        w.stop.click()
        assert w.stop.description == 'really?' and p.poll() is None
        w.update()                                                  # a look takes nothing back
        assert w.stop.description == 'really?'
        w.stop.click()
        assert p.wait(20) == 0
        w.update()
        assert w.stop.disabled and 'go on with resume=x' in w.out.value
        with pytest.raises(ValueError, match='nobody trains'): stop_run(run)
    finally: p.kill()


def test_run_monitor_looks_by_itself(outputs):
    "While a loop runs, as in a kernel, and until the run ends"
    import asyncio
    run = RunFolder.new('x')
    write_json(run/'config.json', dict(task='retrieval'))
    from vidlab.owner import owned
    async def kernel():
        with owned(run):
            run.status('running', step=1, total_steps=9)
            w = RunMonitor(run.path, every=.05)
            run.status('running', step=7, total_steps=9)
            for _ in range(100):
                await asyncio.sleep(.05)
                if '7 of 9' in w.out.value: break
            else: raise AssertionError('nobody looked')
        run.status('done')
        await asyncio.wait_for(w.task, 5)
        assert 'done' in w.out.value
    asyncio.run(kernel())


def test_run_monitor_of_nothing_and_of_a_run_that_only_begins(outputs):
    assert 'no runs in' in RunMonitor().out.value
    run = RunFolder.new('x')
    write_json(run/'config.json', dict(task='retrieval'))
    assert 'empty' in run_sheet(run).text and np.isnan(time_left({}, []))
    run.status('running', step=3, total_steps=9)
    assert 'dead' in run_sheet(run).text                            # nobody owns it


def test_own_kernel_is_not_killed(outputs):
    from vidlab.owner import owned
    run = RunFolder.new('x')
    with owned(run), pytest.raises(ValueError, match='this kernel itself'): stop_run(run)


@pytest.mark.slow
def test_ten_thousand_clips():
    "From a choice to the pictures; CPU seconds, so that busy neighbours do not count"
    rows = Manifest.read(make_shapes(kinds='clips')/'clips'/'train.csv')
    many = rows.select(np.arange(10_000) % len(rows))
    many = many.with_columns(many.cols | dict(id=pa.array([f'c{i}' for i in range(10_000)], pa.large_string())))
    b = ClipBrowser(many)
    for act in (lambda: setattr(b.text, 'value', 'red'), lambda: setattr(b.by, 'value', 'text'), lambda: b.turn(30), b.list.buttons[1].click):
        t = time.process_time()
        act()
        assert time.process_time() - t < 1


def test_a_page_in_a_terminal_shows_sheets(rows):
    shown = ClipBrowser(rows, n=2)._repr_mimebundle_()
    assert set(shown) == {'text/plain', 'text/html'} and shown['text/html'].count('<img') == 2


@pytest.mark.long
def test_the_tour_without_a_browser(outputs, tmp_path):
    "papermill runs the page of all widgets, trains the run it needs, and the page keeps its budget with all that the widgets hold"
    papermill = pytest.importorskip('papermill')
    papermill.execute_notebook(str(ROOT/'nbs'/'tour'/'explore.ipynb'), str(tmp_path/'out.ipynb'), progress_bar=False, kernel_name='python3')
    page = json.loads((tmp_path/'out.ipynb').read_text())
    assert (tmp_path/'out.ipynb').stat().st_size < 1 << 20
    shown = [o['data'] for c in page['cells'] for o in c.get('outputs', []) if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert len(shown) == 10 and all('<img' in ''.join(d['text/html']) for d in shown)


def test_every_clip_can_be_chosen(rows):
    "Some from a list of names, of very many by number"
    from vidlab.widgets.parts import LISTED, clip_choice
    few, many = Collection(rows), Collection(rows)
    many.__class__ = type('Many', (Collection,), dict(__len__=lambda self: 10*LISTED))
    few, many = clip_choice(few), clip_choice(many)
    assert [v for _, v in few.options] == list(range(108)) and many.max == 10*LISTED - 1
    many.value = 3999
    assert (few.value, many.value) == (0, 3999)


# ------------------------------------------------------------------------------------------------------------------- folders

def test_names_of_files_stay_text_and_gone_files_are_said(tmp_path):
    import shutil
    from vidlab.search import Searcher, example_folder, index_folder
    from vidlab.widgets.folders import FolderSearch, answer_sheet, folder_sheet
    source, options = example_folder(4)
    (tmp_path/'videos').mkdir()
    one = next(iter(sorted(source.glob('*.mp4'))))
    name = '<img src=x onerror=alert(1)> $a$.mp4'
    shutil.copy(one, tmp_path/'videos'/name)
    index_folder(tmp_path/'videos', options.pop('model'), **options)
    s = Searcher(tmp_path/'videos')
    harmless(folder_sheet(s, 'a circle <b>moves</b>', k=2).html)
    find = FolderSearch(s, text='a circle <b>moves</b>', k=2)
    find.buttons[0].click()
    for x in (find.list, find.out, find.detail): harmless(x.value)
    find.text.value = 'then'                                       # whatever is typed, the page stays alive
    (tmp_path/'videos'/name).unlink()
    assert 'No such file' in answer_sheet(s, s('a circle', k=1).iloc[0]).text
