"The tour that measures maps, on a few clips: it trains what is not there, and measures nothing twice."
import json
import os
import subprocess
import sys
from pathlib import Path
import pandas as pd
import pytest
from vidlab.data.shapes import make_shapes
from vidlab.pointing import BASELINES, MEASURES

PAGE = Path(__file__).parents[1]/'nbs'/'tour'/'maps.ipynb'


def test_stored_page_says_what_its_table_says():
    "The page was run, every model has a verdict, and the sentence about the exchange of words is that of the numbers"
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    code = [c for c in cells if c['cell_type'] == 'code' and 'parameters' not in c['metadata'].get('tags', [])]
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    shown = [''.join(o['data'].get('text/plain', '')) for c in code for o in c['outputs'] if 'data' in o]
    wanted = json.loads(''.join(cells[1]['source']).split('= ')[1].split('#')[0].strip().replace("'", '"'))
    text = '\n'.join(shown)
    assert all(r in text for r in wanted) and all(b in text for b in BASELINES) and PAGE.stat().st_size < 1e6


@pytest.mark.long
def test_papermill_tour(tmp_path):
    root = make_shapes(tmp_path/'shapes', kinds=('clips', 'scenes', 'narrated'), sizes={k: dict(train=8, val=6, test=6) for k in ('clips', 'scenes', 'narrated')})
    few = '{recipes: [shapes_meanP, shapes_tdsclip], clips: 1, videos: 1, epochs: 1, data_path: %s}' % root
    env = {**os.environ, 'VIDLAB_OUTPUTS': str(tmp_path/'outputs')}
    for _ in range(2):
        r = subprocess.run([sys.executable, '-m', 'papermill', str(PAGE), str(tmp_path/'tour.ipynb'), '--no-progress-bar', '-y', few], capture_output=True, text=True, cwd=PAGE.parents[2], env=env)
        assert r.returncode == 0, r.stderr[-3000:]
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path/'outputs').glob('*/*/figs/maps_*.parquet')}
        assert len(kept) == 3 and (_ == 0 or kept == before)                    # scenes of both, narrated of the one with texts
        before = kept
    assert len(list((tmp_path/'outputs').glob('*/*/config.json'))) == 2
    rows = pd.concat(map(pd.read_parquet, kept))
    assert set(MEASURES) <= set(rows) and set(BASELINES) < set(rows.method)
