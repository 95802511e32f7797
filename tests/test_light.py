"`import` costs no more than it needs, the most needed names are at hand, and help shows every parameter."
import importlib, inspect, os, pkgutil, resource, subprocess, sys
import pytest
import vidlab
from vidlab.machine import LARGE_PAGES

def cpu(code): # CPU seconds of a fresh process
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

@pytest.mark.parametrize('code,most,beside', [('import vidlab.train', 2, 'import torch'), ('import vidlab.viz', 1.5, ''), ('import vidlab; dir(vidlab)', .5, '')])
def test_imports_are_light(code, most, beside):
    "One of three tries: a machine that is busy makes each slower"
    assert any(cpu(code) - (cpu(beside) if beside else 0) < most for _ in range(3))

PAGES = 'train results tasks search predict ready explain data.clips'.split()
IMPORTS = f"""
import os, sys, torch
for page in {PAGES}:
    sys.stdout.flush()
    if not os.fork():
        __import__('vidlab.' + page)
        print(page, *(m for m in 'open_clip transformers torchvision timm'.split() if m in sys.modules), flush=True)
        os._exit(0)
    os.wait()
"""

def test_what_an_import_leaves_out():
    "Each in a process of its own that has torch already and nothing else"
    found = subprocess.run([sys.executable, '-c', IMPORTS], capture_output=True, text=True, check=True)
    assert found.stdout.split() == PAGES, found.stdout + found.stderr

@pytest.mark.parametrize('page,heavy', [('viz', 'torch'), ('config', 'torch matplotlib'), ('cli', 'torch')])
def test_what_an_import_without_torch_leaves_out(page, heavy):
    found = subprocess.run([sys.executable, '-c', f'import sys, vidlab.{page}; print(*(m for m in {heavy.split()} if m in sys.modules))'], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

def test_a_command_builds_no_grammar():
    "papermill comes without what the validator of notebooks would build in a second"
    code = 'import sys; from vidlab.cli import _papermill; _papermill(); print(*({"papermill", "lark", "rfc3987_syntax"} & {*sys.modules}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['papermill']

def test_a_worker_brings_little():
    "Words become tokens and RandAugment is drawn without the packages that hold their tables"
    code = ('import sys, numpy as np; from vidlab.data.clips import Loader; from vidlab.data.text import tokenize; from vidlab.data.transforms import ClipTransform; tokenize(["a caf\u00e9 &amp; more"], 8); '
            'ClipTransform(8, "rand-p1-n9")(np.zeros((4, 9, 9, 3), "u1"), True, np.random.default_rng(0)); print(*({"open_clip", "torchvision", "timm", "transformers"} & {*sys.modules}))')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == []

@pytest.mark.parametrize('said', ['', 'glibc.malloc.arena_max=2'])
def test_what_is_started_takes_memory_in_large_pages(said):
    "Unless the user has said otherwise"
    env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | ({'GLIBC_TUNABLES': said} if said else {})
    found = subprocess.run([sys.executable, '-c', 'import os, vidlab; print(os.environ["GLIBC_TUNABLES"])'], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == (said or LARGE_PAGES)

def test_names_are_at_hand():
    names = [n for n in dir(vidlab) if n[0] != '_']
    assert {'load', 'create_model', 'list_models', 'list_recipes', 'config_from', 'run', 'train', 'viz', 'data'} <= set(names)
    assert all(getattr(vidlab, n) is not None for n in names)
    with pytest.raises(AttributeError, match='no .lode.; names are load, '): vidlab.lode
    assert not hasattr(vidlab, 'nothing') and vidlab.load is vidlab.ready.load

def functions():
    for m in pkgutil.walk_packages(vidlab.__path__, 'vidlab.'):
        page = importlib.import_module(m.name)
        for n in getattr(page, '__all__', ()):
            f = getattr(page, n)
            if inspect.isfunction(f) and f.__module__ == m.name: yield f

def test_help_shows_every_parameter():
    seen = 0
    for f in functions():
        said = {l.strip().split(' ')[0].rstrip(':') for l in (inspect.getdoc(f) or '').splitlines()}
        assert {p for p in inspect.signature(f).parameters if p not in ('self', 'cls')} <= said, f'{f.__module__}.{f.__qualname__}'
        seen += 1
    assert seen > 400
    assert 'a run folder, a checkpoint folder' in inspect.getdoc(vidlab.load) and 'clips of the joined batch' in inspect.getdoc(vidlab.config.RunConfig)
