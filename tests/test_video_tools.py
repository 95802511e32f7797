"""data_tools/check_videos.py and compress_videos.py as commands."""
import csv, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip('av')
from conftest import encode

ROOT = Path(__file__).resolve().parents[1]


def command(tool, *args, module=False, cache=None):
    "The tool as a command of its own; (exit code, stdout, stderr)"
    how = ['-m', f'data_tools.{tool}'] if module else [str(ROOT/'data_tools'/f'{tool}.py')]
    p = subprocess.run([sys.executable, *how, *map(str, args)], capture_output=True, text=True, cwd=ROOT if module
                       else cache or ROOT,
                       env=dict(os.environ, **({'VIDLAB_CACHE': str(cache)} if cache else {})), timeout=120)
    return p.returncode, p.stdout, p.stderr


@pytest.fixture
def folder(tmp_path):
    "good/a.mp4, good/deep/b.avi, bad/c.mp4 and things that are no videos"
    d = tmp_path/'videos'
    encode(d/'good'/'a.mp4'); encode(d/'good'/'deep'/'b.avi', codec='mpeg4', bf=2)
    (d/'bad').mkdir(); (d/'bad'/'c d.mp4').write_text('no video'); (d/'notes.txt').write_text('x')
    return d


@pytest.mark.parametrize('module', [False, True])
def test_check(folder, tmp_path, module):
    code, out, err = command('check_videos', folder, '--report', tmp_path/'r.csv', '--workers', 2, module=module,
                             cache=tmp_path)
    assert code == 1 and '3 files: 2 ok, 0 with warnings, 1 bad' in out and 'c d.mp4' in out, out + err
    with open(tmp_path/'r.csv') as f: rows = {Path(r['path']).name: r for r in csv.DictReader(f)}
    assert rows['a.mp4']['n'] == '30' and rows['c d.mp4']['verdict'] == 'bad' and rows['c d.mp4']['reasons']


def test_check_sources(folder, tmp_path, run):
    (tmp_path/'list.txt').write_text('good/a.mp4\n\ngood/deep/b.avi\n')
    code, out, err = run('check_videos', tmp_path/'list.txt', '--root', folder, '--deep', '--report',
                         tmp_path/'r.jsonl')
    assert code == 0 and '2 files: 2 ok' in out, out + err
    assert all(json.loads(line)['how'] == 'decode' for line in (tmp_path/'r.jsonl').read_text().splitlines())
    (tmp_path/'m.csv').write_text('id,path,text\n1,videos/good/a.mp4,x\n1,videos/good/a.mp4,y\n2,videos/none.mp4,z\n')
    code, out, err = run('check_videos', tmp_path/'m.csv')
    assert code == 1 and '2 files: 1 ok' in out and 'No such file' in out, out + err
    for wrong in ([tmp_path/'nothing'], [folder/'bad', '--report', 'r.xlsx'], [folder, '--workers', 0]):
        assert run('check_videos', *wrong)[0] == 2


def test_help():
    for tool, module in (('check_videos', False), ('compress_videos', False), ('compress_videos', True)):
        code, out, _ = command(tool, '--help', module=module)
        assert code == 0 and 'examples:' in out and 'exit code' in out


def test_compress(folder, tmp_path, run):
    "Folders and names stay, portrait stays portrait, failures are named, a second run does nothing"
    encode(folder/'tall.mp4', w=120, h=160); encode(folder/'w.webm', codec='libvpx-vp9')
    out = tmp_path/'small'
    code, text, err = run('compress_videos', folder, out, '--workers', 2)
    assert code == 1 and '4 made, 0 already there, 1 failed' in text and 'c d.mp4' in text, text + err
    made = sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file() and not p.name.startswith('.'))
    assert made == ['compress_report.csv', 'good/a.mp4', 'good/deep/b.avi', 'tall.mp4', 'w.mp4']
    for name, wh in (('good/a.mp4', (298, 224)), ('tall.mp4', (224, 298)), ('good/deep/b.avi', (298, 224))):
        with av.open(str(out/name)) as c:
            v = c.streams.video[0]
            assert (v.width, v.height) == wh and v.average_rate == 3 and sum(1
                    for _ in c.decode(v)) == 3 and not c.streams.audio
    with open(out/'compress_report.csv') as f: rows = {Path(r['source']).name: r for r in csv.DictReader(f)}
    assert rows['c d.mp4']['status'] == 'failed' and 'written as .mp4' in rows['w.webm']['reason']
    before = (out/'good'/'a.mp4').stat().st_mtime_ns
    code, text, err = run('compress_videos', folder, out)
    assert code == 1 and '0 made, 4 already there, 1 failed' in text
    assert (out/'good'/'a.mp4').stat().st_mtime_ns == before
    code, text, err = run('compress_videos', folder, out, '--fps', 5)
    assert code == 2 and '--redo' in err
    assert run('compress_videos', folder, folder)[0] == 2
    assert run('compress_videos', folder, tmp_path/'odd', '--short', 225)[0] == 2


def test_content_does_not_shift(tmp_path):
    "Brightness is time: each frame of the copy shows its own moment, at a constant and at a variable rate"
    sys.path.insert(0, str(ROOT))
    from data_tools.compress_videos import compress_file, grid, plan, small_size
    src = encode(tmp_path/'a.mp4', n=30, rate=25, light=lambda t: 20 + 7*t, crf=5)
    compress_file(str(src), str(tmp_path/'b.mp4'), crf=5)
    with av.open(str(tmp_path/'b.mp4')) as c: got = [f.to_ndarray(format='rgb24').mean() for f in c.decode(video=0)]
    assert len(got) == 4 and np.abs((np.array(got) - 20)/7 - [0, 8, 17, 25]).max() < .5, got     # in frames
    times = np.concatenate([np.arange(20)/20, 1 + np.arange(5)*.5])
    assert (np.abs(times[grid(times, 3.5, 3)] - np.arange(11)/3)[:-1] <= .25 + 1e-9).all()
    assert grid(np.zeros(1), .04, 3).tolist() == [0] and grid(np.arange(60)/30, 2, 3).tolist() == [0, 10, 20, 30, 40,
            50]
    assert grid(np.arange(5)/1., 5, 3)[:6].tolist() == [0, 0, 1, 1, 1, 2]               # a slow source repeats frames
    assert (small_size(641, 361), small_size(240, 320), small_size(300, 300), small_size(1000, 10)) == ((396, 224),
            (224, 298), (224, 224), (22400, 224))
    assert plan(['/v/a.webm', '/v/a.mp4'], '/v', Path('/o')) == {'/v/a.webm': '/o/a.webm.mp4', '/v/a.mp4': '/o/a.mp4'}
    with pytest.raises(ValueError, match='--root'): plan(['/v/a.mp4', '/w/a.mp4'], None, Path('/o'))
    assert not list(tmp_path.glob('.*.part*'))
