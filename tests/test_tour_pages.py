"Tours that take minutes, as a user runs them: they are left out when all pages are executed."
import os, subprocess, sys
from pathlib import Path
import pytest

TOUR = Path(__file__).parents[1]/'nbs'/'tour'

@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('page', ['clip4clip', 'scale', 'stan', 'tdsclip'])
def test_papermill_tour(page, tmp_path):
    "From the first cell to the last, with every assertion on the way"
    env = {**os.environ, 'VIDLAB_OUTPUTS': str(tmp_path/'outputs'), 'JPY_SESSION_NAME': 'page'}
    r = subprocess.run([sys.executable, '-m', 'papermill', f'{page}.ipynb', str(tmp_path/'tour.ipynb'), '--no-progress-bar'], capture_output=True, text=True, cwd=TOUR, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    assert page in ('clip4clip', 'scale') or [p for p in (tmp_path/'outputs').glob('*/*/status.json')]          # these train in loops of their own
