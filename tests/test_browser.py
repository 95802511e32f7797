"Every widget in a real JupyterLab, clicked through in headless Chromium (--browser): what was chosen is on the page, nothing is fetched from outside."
import base64, json, os, socket, subprocess, sys, time, urllib.request
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
        self.url, self.home = lab
        self.pictures = Path(os.environ.get('PICTURES', self.home/'pictures'))
        self.pictures.mkdir(exist_ok=True)
        self.name, self.outside, self.errors = name, [], []
        notebook(self.home/'nbs'/f'{name}.ipynb', *cells)
        self.page = browser.new_page(viewport=dict(width=1250, height=1000))
        self.page.on('request', lambda r: self._note(r.url))
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.set_default_timeout(60_000)
        self.page.goto(f'{self.url}/lab/tree/{name}.ipynb?reset')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
        self.page.wait_for_selector('.jp-NotebookPanel-toolbar', timeout=60_000)
        self.page.locator('.jp-Notebook .jp-Cell').first.click()
        self.page.wait_for_timeout(1500)
        self.page.evaluate('() => 0')
        self.page.keyboard.press('Escape')
        self.menu('Run', 'Run All Cells')
        self.page.wait_for_selector('.jupyter-widgets', timeout=wait*1000)
        self.page.wait_for_timeout(1000)

    def menu(self, name, entry):
        self.page.locator('.lm-MenuBar-itemLabel', has_text=name).first.click()
        self.page.locator('.lm-Menu-itemLabel', has_text=entry).first.click()

    def _note(self, url):
        if not url.startswith((self.url, self.url.replace('http', 'ws'), 'data:', 'blob:')): self.outside.append(url)

    def text(self): return self.page.locator('.jp-OutputArea').first.inner_text()

    def until(self, text, seconds=60):
        "Wait until the output says something"
        self.page.wait_for_function('t => document.querySelector(".jp-OutputArea").innerText.includes(t)', arg=text, timeout=seconds*1000)

    def shot(self, part): self.page.locator('.jp-OutputArea').first.screenshot(path=self.pictures/f'{self.name}-{part}.png')

    def done(self):
        assert self.outside == [] and self.errors == []
        self.page.close()


def test_clip_browser(lab, browser):
    p = Page(browser, lab, 'browse', 'from vidlab.widgets.browse import ClipBrowser\nfrom vidlab.data.manifest import Manifest\nfrom vidlab.data.shapes import make_shapes\n'
             "ClipBrowser(Manifest.read(make_shapes(kinds='clips')/'clips'/'test.csv'), n=3)")
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
    p.page.locator('button[title="next page"]').click()
    p.until('4–6 of 6 clips')
    p.shot('next')
    p.done()
