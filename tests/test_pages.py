"Every page runs as `nbdev-test` runs it"
import subprocess, sys
from pathlib import Path
import pytest
import warm

NBS = Path(__file__).parents[1]/'nbs'
PAGES = sorted(p.relative_to(NBS).with_suffix('').as_posix() for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LONG = ('runs/train',       # a whole training; `test_runs.py` runs the page on fewer clips
        'tour/explore',     # trains as much where no run is there; each widget has its page, and `test_widgets.py`
        'tour/own_videos',  # trains twice; `64_begin` and `test_begin.py` do on fewer clips
        'tour/cost')        # counts every published model; `43_cost` asserts the counter, the pages of the models their parameters


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('page', [pytest.param(p, marks=pytest.mark.long) if p in LONG else p for p in PAGES])
def test_page(page):
    run = f'from nbdev.test import nbdev_test; nbdev_test(path={str(NBS/page) + ".ipynb"!r}, n_workers=0)'
    done = warm.run([sys.executable, '-c', run], cwd=NBS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and done.stdout.endswith('Success.\n'), done.stdout
