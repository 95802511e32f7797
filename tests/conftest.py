"""Options, paths, fixtures and small videos shared by all tests."""
import gc, importlib, os, sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).resolve().parent
for p in (HERE.parent, HERE):          # `vidlab` and `data_tools` from the checkout, `goldens` from here
    if str(p) not in sys.path: sys.path.insert(0, str(p))
import vidlab                          # noqa: before torch, whose threads it settles

settings.register_profile('same', derandomize=True)    # the same examples each time: what passed here passes on the next machine
settings.register_profile('new')                       # other examples each time: HYPOTHESIS_PROFILE=new
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))


gc.disable()                           # until all tests are collected: nothing of what they import is garbage


def pytest_collection_finish(session):
    "What is imported is never looked through again for garbage; the larger the heap, the longer that takes"
    gc.freeze()
    gc.enable()


def pytest_addoption(parser):
    parser.addoption('--golden', default=str(HERE/'golden'), metavar='DIR',
                     help='folder with golden cases: one system or the parent of several (default: tests/golden)')
    parser.addoption('--long', action='store_true', help='run also what takes minutes: every recipe on official forms, what README and CONTRIBUTING say')
    parser.addoption('--browser', action='store_true', help='run also what needs Chromium and Playwright: every widget in a real JupyterLab')


def pytest_configure(config):
    config.addinivalue_line('markers', "slow: takes more than about seven seconds; `-m 'not slow'` runs the fast tests")
    config.addinivalue_line('markers', 'long: takes minutes together with others of its kind; runs with --long')
    config.addinivalue_line('markers', 'browser: needs Chromium and Playwright; runs with --browser')
    if sys.platform == 'linux' and getattr(config.option, 'numprocesses', None) and 'PYTEST_XDIST_WORKER' not in os.environ:
        import warm
        os.environ[warm.PLACE] = warm.server()                # one for all workers


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != 'test_pages.py')         # stable; what takes longest comes first, so that no process waits for it in the end
    asked = dict(long='takes minutes: --long', browser='needs Chromium and Playwright: --browser')
    for item in items:
        for flag, why in asked.items():
            if flag in item.keywords and not config.getoption(f'--{flag}'): item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    "Runs go to a folder of the test"
    monkeypatch.setenv('VIDLAB_OUTPUTS', str(tmp_path/'outputs'))
    return tmp_path/'outputs'


@pytest.fixture
def warm_ranks(monkeypatch):
    "`launch` starts its processes as children of one that has imported already; fresh ones are seen by tests that send signals to them"
    import warm
    monkeypatch.setattr('vidlab.train.subprocess', warm)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "What is kept between calls goes to a folder of the test"
    monkeypatch.setenv('VIDLAB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


@pytest.fixture(scope='session')
def rendered(tmp_path_factory):
    "Small embedded data sets, `rendered(clips=dict(train=8, val=4, test=4))`: each is made once for all workers, so nobody writes into it"
    from vidlab.data.shapes import make_shapes
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own)/'rendered'
    return lambda **sizes: make_shapes(root, kinds=tuple(sizes), sizes=sizes)


@pytest.fixture
def run(cache, monkeypatch, capsys):
    "The `main` of a data tool in this process; (exit code, stdout, stderr)"
    monkeypatch.syspath_prepend(str(HERE.parent))
    def call(tool, *args):
        code = importlib.import_module(f'data_tools.{tool}').main([str(a) for a in args])
        return (code, *capsys.readouterr())
    return call


def encode(path, n=30, w=160, h=120, rate=30, codec='libx264', pix='yuv420p', light=None, picture=None, times=None, **options):
    "A video whose frame t has the brightness `light(t)`, or is `picture(t)`, and is shown at `times[t]` seconds"
    import av, numpy as np
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = picture or (lambda t: np.full((h, w, 3), int(light(t)) if light else 8*t % 256, np.uint8))
    with av.open(str(path), 'w') as c:
        s = c.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        s.width, s.height, s.pix_fmt = w, h, pix
        if times is not None: s.codec_context.time_base = Fraction(1, 1000)
        for t in range(n if times is None else len(times)):
            f = av.VideoFrame.from_ndarray(draw(t), format='rgb24').reformat(format=pix)
            if times is not None: f.pts, f.time_base = round(1000*times[t]), Fraction(1, 1000)
            c.mux(s.encode(f))
        c.mux(s.encode(None))
    return path
