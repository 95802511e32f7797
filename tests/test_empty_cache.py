"An empty cache: what a page needs is made by itself, once, also when two ask at the same time"
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
import warm
from vidlab import clip, tinyclip
from vidlab.core import file_hash, leave_signs, signs
from vidlab.data.shapes import make_shapes

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT/'nbs'/'runs').glob('*.ipynb'), *(ROOT/'nbs'/'tour').glob('*.ipynb')])
SMALL = """
from vidlab import tinyclip
from vidlab.data.shapes import make_shapes
tinyclip.make_shapes = lambda kinds: make_shapes(kinds=kinds, sizes=dict(stills=dict(train=90, val=1, test=90)))
print(tinyclip.tiny_clip(steps=4, per_class=1)['sha256'])
"""


def start(code, cache, cwd):
    env = {**os.environ, 'VIDLAB_CACHE': str(cache), 'PYTHONPATH': str(ROOT)}
    return warm.Popen([sys.executable, '-c', code], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_at_once_make_one(cache, tmp_path):
    "Pictures and weights are made by one of two; the other says that it waits and gives the same"
    both = [start(SMALL, cache, tmp_path) for _ in range(2)]
    out = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert out[0][0] == out[1][0] == file_hash(cache/'clip'/'tiny_shapes.safetensors') + '\n'
    said = out[0][1] + out[1][1]
    assert said.count('rendering stills 181/181') == said.count('tiny CLIP 4/4') == 1
    assert 'another process is making it, waiting' in said


def test_a_killed_maker_leaves_nothing_in_the_way(cache, tmp_path):
    slow = SMALL.replace('tinyclip.make_shapes =', 'import vidlab.data.shapes as s, time; s._write_item = lambda *a: time.sleep(60)\ntinyclip.make_shapes =')
    first = start(slow, cache, tmp_path)
    while not list(cache.glob('shapes/*/.stills-*')): time.sleep(.1); assert first.poll() is None
    second = start(SMALL, cache, tmp_path)
    assert 'waiting' in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    out = second.communicate(timeout=200)
    first.communicate()
    assert second.returncode == 0, out
    assert not list(cache.glob('shapes/*/.stills-*')), 'what the killed one had begun is still there'


def test_asking_makes_it_and_leaves_the_random_state(cache, monkeypatch, tmp_path):
    "In a process of its own: nothing of the one who asks is touched, and whoever watches that one sees that it lives"
    root = make_shapes(cache/'small', 'stills', sizes=dict(stills=dict(train=90, val=1, test=90)))
    few = f"from vidlab import tinyclip as t; from pathlib import Path; t.make_shapes = lambda kinds: Path({str(root)!r}); t.tiny_clip(steps=2, per_class=1)"
    def popen(cmd, **kw):
        assert cmd[1:] == ['-m', 'vidlab.tinyclip']
        return warm.Popen([cmd[0], '-c', few], **kw)
    monkeypatch.setattr(clip.subprocess, 'Popen', popen)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    leave_signs(tmp_path/'sign')
    with torch.no_grad(): path = clip.tiny_weights()
    leave_signs(None)
    assert signs(tmp_path/'sign')['done'].startswith('tiny CLIP')
    assert path.exists() and torch.equal(torch.get_rng_state(), before)
    path.unlink()
    few = 'raise SystemExit("no room")'
    with pytest.raises(FileNotFoundError, match="weights='random'"): clip.tiny_weights()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not os.environ.get('VIDLAB_EMPTY_CACHE'), reason='takes an hour: set VIDLAB_EMPTY_CACHE=1')
@pytest.mark.parametrize('page', PAGES, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_page_first_of_all(page, cache, outputs, tmp_path):
    "Each page as the first thing anybody does, from another folder"
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    r = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(page), str(tmp_path/'out.ipynb')], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
