"""Pages as the tests run them. `python tests/pages.py PROCESSES` runs all of them as `nbdev-test` does, in processes that need not import what nearly every page does."""
import gc, importlib, json, subprocess, sys
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

def main(processes):
    from nbdev.test import nbdev_test
    sys.path[0] = str(ROOT)                                     # no page finds a module of the tests
    gc.disable()                                                # nothing of what is imported is garbage
    for name in ('open_clip', 'pandas', 'timm.optim', 'torchvision.transforms.v2', 'vidlab.train'): importlib.import_module(name)
    gc.freeze()                                                 # it stays shared with the processes that are forked, and is not searched again
    gc.enable()
    nbdev_test(n_workers=int(processes), timing=True)

if __name__ == '__main__': main(*sys.argv[1:])
