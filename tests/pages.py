"Run pages as tests start them"
import json, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

def papermill(page, out, *args):
    "A run page in a kernel of its own, as users run it"
    return subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/'runs'/page), str(out), '--no-progress-bar', *args], capture_output=True, text=True, cwd=ROOT)

def pairs(**kw): return [x for k, v in kw.items() for x in ('-p', k, str(v))]

def execute(page, **given):
    "The cells of a run page in this process, which is much faster; papermill is for one of each"
    names = {}
    for c in json.loads((ROOT/'nbs'/'runs'/page).read_text())['cells']:
        if c['cell_type'] == 'code': exec(''.join(c['source']), names)
        if 'parameters' in c['metadata'].get('tags', []): names.update(given)
    return names
