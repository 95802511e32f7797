"Every widget in a real JupyterLab, clicked through in headless Chromium (--browser): what was chosen is on the page, nothing is fetched from outside."
import json, os, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get('CHROMIUM', '/usr/bin/chromium')
pytestmark = pytest.mark.browser


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def notebook(path, *cells):
    code = lambda i, s: dict(cell_type='code', id=f'cell{i}', metadata={}, execution_count=None, outputs=[], source=s)
    path.write_text(json.dumps(dict(cells=[code(i, s) for i, s in enumerate(cells)], nbformat=4, nbformat_minor=5,
                                    metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))))


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of its own; its address and its folder"
    home, port = tmp_path_factory.mktemp('lab'), free_port()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JUPYTER_CONFIG_DIR': str(home/'config'), 'JUPYTER_RUNTIME_DIR': str(home/'runtime'), 'JUPYTER_PREFER_ENV_PATH': '1',
           'JUPYTERLAB_SETTINGS_DIR': str(home/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(home/'workspaces'), 'VIDLAB_OUTPUTS': str(home/'outputs')}
    (home/'nbs').mkdir()
    said = {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),      # no question about news lies over the page
            'notebook-extension/tracker': dict(windowingMode='none')}                              # cells out of sight are there, too
    for name, values in said.items():
        file = home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    words = dict(ip='127.0.0.1', port=port, root_dir=home/'nbs', token='', password='', open_browser='False', disable_check_xsrf='True')
    cmd = [sys.executable, '-m', 'jupyterlab', '--allow-root', '--no-browser', *(f'--ServerApp.{k}={v}' for k, v in words.items()), '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(home/'lab.log', 'w') as log: p = subprocess.Popen(cmd, env=env, stdout=log, stderr=log, cwd=home)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=2); break
            except OSError: time.sleep(.5)
        else: pytest.fail((home/'lab.log').read_text()[-2000:])
        yield f'http://127.0.0.1:{port}', home
    finally:
        p.terminate()
        p.wait(20)


@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield b
        b.close()


class Page:
    "A notebook that was opened, run and can be clicked; notes what is asked of other hosts"
    def __init__(self, browser, lab, name, *cells, wait=180):
        self.open(browser, *lab, name)
        if cells: notebook(self.home/'nbs'/f'{name}.ipynb', *cells)
        self.page.goto(f'{self.url}/lab/tree/{name}.ipynb?reset')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
        self.page.wait_for_selector('.jp-NotebookPanel-toolbar', timeout=60_000)
        self.page.locator('.jp-Notebook .jp-Cell').first.click()
        self.page.wait_for_timeout(1500)
        self.menu('Run', 'Run All Cells')
        self.page.wait_for_selector('.jupyter-widgets', timeout=wait*1000)
        self.page.wait_for_timeout(1000)

    def open(self, browser, url, home, name):
        "An empty page that notes what happens"
        self.url, self.home, self.name, self.outside, self.errors = url, home, name, [], []
        self.pictures = Path(os.environ.get('PICTURES', home/'pictures'))
        self.pictures.mkdir(exist_ok=True)
        self.page = browser.new_page(viewport=dict(width=1250, height=1000))
        self.page.on('request', lambda r: self._note(r.url))
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.set_default_timeout(60_000)

    def menu(self, name, entry):
        self.page.locator('.lm-MenuBar-itemLabel', has_text=name).first.click()
        self.page.locator('.lm-Menu-itemLabel', has_text=entry).first.click()

    def _note(self, url):
        if not url.startswith((self.url, self.url.replace('http', 'ws'), 'data:', 'blob:')): self.outside.append(url)

    def until(self, text, seconds=60):
        "Wait until the output says something"
        self.page.wait_for_function('t => [...document.querySelectorAll(".jp-OutputArea")].some(o => o.innerText.includes(t))', arg=text, timeout=seconds*1000)

    @property
    def out(self): return self.page.locator('.jp-OutputArea').first

    def pick(self, text, which=0):
        "Choose the entry with a text in a list"
        found = self.page.locator('.jupyter-widgets select').filter(has_text=text).nth(which)
        found.select_option(index=found.evaluate('(s, t) => [...s.options].findIndex(o => o.text.includes(t))', text))

    def ask(self, text):
        "Search a folder for a sentence"
        self.until('ask something')
        box = self.page.locator('input[placeholder="what happens in it?"]')
        box.fill(text)
        box.press('Enter')
        self.until('% sure, by')

    def shot(self, part): self.out.screenshot(path=self.pictures/f'{self.name}-{part}.png')

    def done(self):
        assert self.outside == [] and self.errors == []
        self.page.close()


SHAPES = """from vidlab.data.manifest import Manifest
from vidlab.data.shapes import MOTIONS, make_shapes
from vidlab.tasks.base import Evaluation
from vidlab.tasks.recognition import RecognitionTask
from vidlab.widgets.parts import Collection
import numpy as np, torch
rows = Manifest.read(make_shapes(kinds='clips')/'clips'/'test.csv')
i = torch.arange(108)
"""


def test_clip_browser(lab, browser):
    p = Page(browser, lab, 'browse', SHAPES + """from vidlab.widgets.browse import ClipBrowser
ClipBrowser(rows, n=3)""")
    p.until('1–3 of 108 clips')
    p.shot('start')
    box = p.page.locator('input[placeholder="text, then return"]')
    box.fill('large green square')
    box.press('Enter')
    p.until('1–3 of 6 clips')
    p.page.locator('button[title^="look at test00078"]').click()
    p.until('8 frames, SegmentSampler')
    p.shot('chosen')
    p.page.get_by_role('button', name='play').click()
    p.until('a second, over and over')
    p.shot('played')
    p.page.locator('button[title="next page"]').click()
    p.until('4–6 of 6 clips')
    p.pick('motion')
    p.until('1–3 of 6 clips')                 # from the beginning again
    p.page.wait_for_timeout(1000)
    p.pick('grows')
    p.until('1–1 of 1 clips')
    p.shot('grows')
    p.done()


def test_retrieval_browser(lab, browser):
    p = Page(browser, lab, 'retrieval', SHAPES + """from vidlab.widgets.retrieval import RetrievalBrowser
sim = torch.eye(108)
for k in range(0, 107, 3): sim[k, k + 1] += 1.5
RetrievalBrowser(Collection(rows, evaluation=Evaluation(dict(sim=sim, text_sid=i, text_view=i*0, video_sid=i), rows)), k=2)""")
    p.until('108 of 108 queries')
    p.page.get_by_role('button', name='missed only').click()
    p.until('36 of 108 queries')
    p.page.locator('.jp-Notebook select option', has_text='a small green square moves up').click()
    p.until('test00027')
    p.shot('missed')
    p.page.locator('button[title^="look at test00027"]').click()
    p.until('8 frames, SegmentSampler')
    p.shot('chosen')
    p.page.get_by_role('button', name='clip to caption').click()
    p.until('the best of the others')
    p.shot('captions')
    p.done()


def test_errors_and_sampling_and_comparison(lab, browser):
    "Three of them on one page, one kernel"
    p = Page(browser, lab, 'errors', SHAPES + """from vidlab.widgets.errors import ErrorBrowser
from vidlab.widgets.sampling import SamplerPreview
from vidlab.widgets.comparing import RunComparison
import ipywidgets
label = torch.as_tensor(np.array(rows.column('label')))
prob = torch.nn.functional.one_hot(label, 6)*3. + torch.randn(108, 6, generator=torch.Generator().manual_seed(0))
prob[:54] = prob[:54].roll(1, 1)
made = Evaluation(dict(prob=prob.softmax(1), label=label, sid=i), rows, MOTIONS)
clips = Collection(rows, numbers=RecognitionTask.per_clip(made)[0], task=RecognitionTask, evaluation=made, name='first')
other = Collection(rows, numbers=dict(top1=np.full(108, 100.)), task=RecognitionTask, name='second')
ipywidgets.VBox([ErrorBrowser(clips).box, SamplerPreview(rows).box, RunComparison([clips, other]).box])""")
    p.until('click on a cell of the map')
    p.page.locator('button[title$=" clips"]:not([disabled])').nth(3).click()
    p.until('clips of the cell')
    p.shot('map')
    p.page.get_by_role('button', name='confusion').click()
    p.page.locator('button[title="moves right taken for moves left"]').click()
    p.until("taken for 'moves left'")
    p.shot('confusion')
    p.page.get_by_role('button', name='slices').click()
    p.page.locator('.jp-Notebook select option', has_text='size: small').first.click()
    p.until('54 clips with size small')
    p.shot('slices')
    p.page.locator('.jp-Notebook select').filter(has_text='segment').select_option('segment')
    p.until('SegmentSampler(frames=8')
    p.page.get_by_role('button', name='draw again').click()
    p.shot('sampling')
    p.page.get_by_role('button', name='neither').click()
    p.until('neither: 0 of 108 clips')
    p.done()


def test_folder_search(lab, browser):
    p = Page(browser, lab, 'folders', """import tempfile
from vidlab.search import example_folder, index_folder
from vidlab.widgets.folders import FolderSearch
folder, options = example_folder(4)
place = tempfile.mkdtemp()
report = index_folder(folder, options.pop('model'), out=place, **options)
FolderSearch(place, k=3)""")
    p.ask('a large blue circle moves left')
    p.shot('answers')
    p.page.locator('button[title="look at answer 2"]').click()
    p.page.get_by_role('button', name='play').click()
    p.page.wait_for_selector('img[alt="clip"]')
    p.shot('played')
    p.page.get_by_role('button', name='keep').click()
    p.until('1 kept')
    p.page.get_by_role('button', name='write the table').click()
    p.until('1 kept, written to')
    p.page.get_by_role('button', name='more like this').click()
    p.until('like 0')                         # the name of a file
    p.shot('like')
    p.done()


def test_run_monitor(lab, browser):
    "A run of another process is watched as it lives, and stopped by two clicks"
    from test_widgets import TRAINS
    from vidlab.core import RunFolder, write_json
    run = RunFolder.new('shapes_meanP', root=lab[1]/'runs')
    write_json(run/'config.json', dict(task='retrieval', recipe='shapes_meanP'))
    trainer = subprocess.Popen([sys.executable, '-c', TRAINS, str(run.path)])
    try:
        p = Page(browser, lab, 'monitor', f'from vidlab.widgets.monitor import RunMonitor\nRunMonitor({str(run.path)!r}, every=1)')
        p.until('5 of 50, epoch 0')
        run.status('running', step=31, epoch=0, total_steps=50)
        p.until('31 of 50, epoch 0')                       # the page has looked by itself
        p.shot('running')
        p.page.get_by_role('button', name='stop the run').click()
        p.page.get_by_role('button', name='really?').click()
        p.until('go on with resume=x')
        assert trainer.wait(20) == 0
        p.shot('stopped')
        p.done()
    finally: trainer.kill()


def app(*words, home):
    "`vidlab app` with these words, once it answers: its process and address"
    port = free_port()
    log = home/f'app{port}.log'
    p = subprocess.Popen([sys.executable, '-m', 'vidlab.cli', 'app', *words, f'port={port}'], env={**os.environ, 'PYTHONPATH': str(ROOT), 'VIDLAB_OUTPUTS': str(home/'outputs')},
                         cwd=home, stdout=open(log, 'w'), stderr=subprocess.STDOUT, start_new_session=True)
    for _ in range(120):
        with socket.socket() as s:
            if not s.connect_ex(('127.0.0.1', port)): return p, f'http://127.0.0.1:{port}'
        if p.poll() is not None: break
        time.sleep(.5)
    pytest.fail(log.read_text()[-2000:])


class App(Page):
    "An app that was opened"
    def __init__(self, browser, url, home, name, wait=240):
        self.open(browser, url, home, name)
        self.page.on('requestfailed', lambda r: r.failure == 'csp' and self.outside.remove(r.url))      # the browser was told not to ask
        self.page.goto(url, timeout=wait*1000)
        self.page.wait_for_selector('.jupyter-widgets', timeout=wait*1000)

    def shot(self, part): self.page.screenshot(path=self.pictures/f'{self.name}-{part}.png')

    def until(self, text, seconds=60):
        self.page.wait_for_function('t => document.body.innerText.includes(t)', arg=text, timeout=seconds*1000)


def test_search_as_app(lab, browser, tmp_path):
    "A folder of one's own, typed into, from a page without code"
    from vidlab.search import example_folder, index_folder
    folder, options = example_folder(4)
    index_folder(folder, options.pop('model'), out=tmp_path/'index', **options)
    p, url = app('search', str(tmp_path/'index'), home=lab[1])
    try:
        a = App(browser, url, lab[1], 'app')
        a.ask('a large blue circle moves left')
        a.page.locator('button[title="look at answer 2"]').click()
        a.page.get_by_role('button', name='play').click()
        a.page.wait_for_selector('img[alt="clip"]')
        a.shot('played')
        assert 'Searcher(' not in a.page.content()                # the code is not shown
        a.done()
    finally:
        os.killpg(p.pid, 15)
        p.wait(20)


@pytest.fixture(scope='module')
def trained(lab):
    "A run folder with weights and an evaluation, of one step"
    from vidlab.config import config_from
    from vidlab.train import run
    os.environ['VIDLAB_OUTPUTS'] = str(lab[1]/'outputs')
    return run(config_from('shapes_smoke', device='cpu', workers=0, few_shot=6, batch_size=36)).path


@pytest.mark.long
def test_every_widget_on_the_tour(lab, browser, trained):
    "The page as it is: all widgets drawn, attention, time profile and monitor clicked"
    page = json.loads((ROOT/'nbs'/'tour'/'explore.ipynb').read_text())
    for c in page['cells']: c.update(outputs=[]) if c['cell_type'] == 'code' else None          # what is seen is made now
    (lab[1]/'nbs'/'tour.ipynb').write_text(json.dumps(page))
    p = Page(browser, lab, 'tour', wait=300)
    for words in ('of 108 clips', 'all epochs done', 'queries', 'of the map', 'cell of the map', 'instead of', 'second minus first'): p.until(words, 300)
    p.pick('rollout')
    p.until('rollout: ')
    p.page.get_by_role('button', name='first frame').click()
    p.until('frames 1, 1, 1')
    areas = p.page.locator('.jp-OutputArea-output.jp-OutputArea-executeResult, .jp-OutputArea-output:has(.jupyter-widgets)')
    for i in range(areas.count()): areas.nth(i).screenshot(path=p.pictures/f'tour-{i}.png')
    p.done()


@pytest.mark.long
def test_tour_as_app(lab, browser, trained):
    "All widgets without code"
    p, url = app(str(ROOT/'nbs'/'tour'/'explore.ipynb'), f'run_folder={trained}', home=lab[1])
    try:
        a = App(browser, url, lab[1], 'tour_app', wait=400)
        for words in ('of 108 clips', 'all epochs done', 'queries', 'of the map', 'cell of the map', 'instead of', 'second minus first'): a.until(words, 300)
        a.pick('rollout')
        a.until('rollout: ')
        a.page.screenshot(path=a.pictures/'tour_app.png', full_page=True)
        a.done()
    finally:
        os.killpg(p.pid, 15)
        p.wait(20)


def test_timeline(lab, browser):
    "A click on a segment moves the line and the frame; segments that are too short go to their neighbours"
    p = Page(browser, lab, 'timeline', """from vidlab.predict import Timeline
from vidlab.data.index import index_video
from vidlab.data.shapes import make_shapes
from vidlab.widgets.timeline import TimelineExplorer
import numpy as np
path = sorted((make_shapes(kinds='narrated')/'narrated'/'test').glob('*.mp4'))[0]
seconds = index_video(path).duration
n = 15
spans = np.stack([np.arange(n), np.arange(n) + 2], 1)*seconds/(n + 1)
rising = np.linspace(0, 1, n)
TimelineExplorer(Timeline(str(path), seconds, spans, np.stack([1 - rising, rising], 1), ['begins', 'ends $1 <b>']))""")
    p.until('at 0.00 s')
    p.shot('start')
    p.page.locator('.jp-Notebook select option', has_text='ends $1 <b>').first.click()
    p.until('at 6.')
    p.shot('segment')
    handle = p.page.locator('.jp-Notebook .noUi-handle').nth(1)
    handle.focus()
    for _ in range(85): p.page.keyboard.press('ArrowRight')
    p.page.wait_for_timeout(1500)
    p.shot('merged')
    assert p.page.locator('.jp-Notebook select').nth(1).locator('option').count() == 1
    p.done()
