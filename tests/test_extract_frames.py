"""data_tools/extract_frames.py: folders of pictures that are sampled like the videos they come from."""
import csv, json, os, sys
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip('av')
from conftest import encode
from test_video_tools import command
from vidlab.data.annots import Manifest, read_list
from vidlab.data.clips import Clips
from vidlab.data.decode import read_frames
from vidlab.data.files import write_clock
from vidlab.data.index import index_video
from vidlab.data.sample import DenseSampler, GridSampler, SegmentSampler


@pytest.fixture
def videos(tmp_path, cache):
    "30, 24 and 30000/1001 frames a second and a varying rate; brightness is time"
    from fractions import Fraction
    d = tmp_path/'videos'
    light = dict(light=lambda t: 10 + 2*t, crf=8)
    encode(d/'a.mp4', n=100, **light); encode(d/'deep'/'b.mkv', n=75, rate=24, **light)
    encode(d/'c.mp4', n=110, rate=Fraction(30000, 1001), w=120, h=160, **light)
    encode(d/'v.mp4', times=np.concatenate([np.arange(20)/20, 1 + np.arange(20)/8]), light=lambda t: 20 + 5*t, crf=8)
    return d


def manifest(d, rows, name='m.csv'):
    with open(d/name, 'w', newline='') as f:
        w = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r))); w.writeheader(); w.writerows(rows)
    return d/name


ROWS = [dict(id='a', path='a.mp4', label=1, split='train'), dict(id='b', path='deep/b.mkv', label=0, split='train'),
        dict(id='c', path='c.mp4', label=2, split='test'), dict(id='v', path='v.mp4', label=0, split='test')]
SAMPLERS = [GridSampler(12), GridSampler(12, rate=4), SegmentSampler(6), SegmentSampler(4, neighbours=3), DenseSampler(5, 40)]


def chosen(m, i, sampler, train=False):
    "Frames of the source that a sampler takes, index and sample"
    row = m.row(i)
    ix = index_video(row['path'])
    gen = np.random.default_rng(3) if train else None
    none = lambda x: None if x is None or x != x else x
    idx = sampler(ix.n, ix.fps, ix.times, none(row['start']), none(row['end']), train, gen)
    return ix, idx, read_frames(ix, idx)


def test_same_clips(videos, tmp_path, run):
    "Every sampler takes the same frames from the folder as from the file, and they look the same"
    src = manifest(videos, ROWS)
    code, text, err = run('extract_frames', src, tmp_path/'f', '--workers', 2, '--quality', 95)
    assert code == 0 and '4 clips: 4 made, 0 already there, 0 failed; 325 pictures' in text, text + err
    a, b = Manifest.read(src), Manifest.read(tmp_path/'f'/'manifest.csv')
    assert b.column('frames').to_pylist() == ['100', '75', '110', '40']
    assert b.column('path').to_pylist() == ['a', 'deep/b', 'c', 'v'] and a.hash() == b.hash()
    for i in range(len(a)):
        for s in SAMPLERS:
            for train in (False, True):
                (ix, x, u), (jx, y, v) = chosen(a, i, s, train), chosen(b, i, s, train)
                assert (ix.n, ix.fps, ix.width, ix.height) == (jx.n, jx.fps, jx.width, jx.height)
                assert np.abs(ix.times - jx.times).max() < 2e-6 and (x == y).all(), (i, s, train)
                assert np.abs(u.astype(int) - v).max() <= 3
    for s in (GridSampler(12), SegmentSampler(6)):
        for u, v in zip(*(Clips(m, s, 112) for m in (a, b))):
            assert torch.equal(u['video_mask'], v['video_mask']) and u['label'] == v['label'] and u['sid'] == v['sid']
            assert (u['frame_time'] - v['frame_time']).abs().max() < 2e-6
            assert (u['video'].int() - v['video'].int()).abs().max() <= 4


def test_resume(videos, tmp_path, run):
    "Complete or absent; a second run does nothing; other settings need --redo"
    (videos/'bad.mp4').write_text('no video'); out = tmp_path/'f'
    (out/'.a.part').mkdir(parents=True); (out/'.a.part'/'img_00001.jpg').touch()        # a run that was killed
    code, text, err = run('extract_frames', videos, out, '--short', 80, '--template', '{:04d}.jpg')
    assert code == 1 and '5 clips: 4 made, 0 already there, 1 failed' in text and 'bad.mp4' in text, text + err
    assert not list(out.rglob('.*part')) and not (out/'bad').exists()
    assert sorted(os.listdir(out/'a'))[:2] == ['0001.jpg', '0002.jpg'] and 'clock.json' in os.listdir(out/'a')
    assert (index_video(out/'a').height, index_video(out/'c').width) == (80, 80)
    with open(out/'frames_report.csv') as f: rows = {Path(r['source']).name: r for r in csv.DictReader(f)}
    assert (rows['a.mp4']['frames'], rows['a.mp4']['status'], rows['bad.mp4']['status']) == ('100', 'made', 'failed')
    assert len(Manifest.read(out/'manifest.csv')) == 4
    before = (out/'a').stat().st_mtime_ns, (out/'manifest.csv').read_bytes()
    import shutil; shutil.rmtree(out/'c')
    code, text, err = run('extract_frames', videos, out, '--short', 80, '--template', '{:04d}.jpg')
    assert '1 made, 3 already there, 1 failed' in text and before == ((out/'a').stat().st_mtime_ns, (out/'manifest.csv').read_bytes())
    code, text, err = run('extract_frames', videos, out)
    assert code == 2 and '--redo' in err
    code, text, err = run('extract_frames', videos, out, '--redo')
    assert '4 made' in text and 'img_00100.jpg' in os.listdir(out/'a') and '0001.jpg' not in os.listdir(out/'a')
    (out/'a'/'img_00100.jpg').unlink()                                                   # half a copy is noticed, not trained on
    code, text, err = run('extract_frames', videos, out)
    assert '3 already there, 2 failed' in text and 'of 100 pictures, the folder holds 99' in text


def test_ranges(videos, tmp_path, run):
    "With start and end only that range, at its times; --whole keeps the range in the manifest"
    rows = [dict(id='1', path='a.mp4', start=1, end=3, text='x'), dict(id='1', path='a.mp4', start=1, end=3, text='y'),
            dict(id='2', path='a.mp4', start='', end=1, text='z'), dict(id='3', path='v.mp4', start=.5, end=2, text='w'),
            dict(id='4', path='c.mp4', start=1.2, end='', text='w'), dict(id='5', path='a.mp4', start=90, end=99, text='late')]
    src = manifest(videos, rows)
    code, text, err = run('extract_frames', src, tmp_path/'f', '--quality', 95)
    assert code == 1 and '5 clips: 4 made, 0 already there, 1 failed' in text and 'no frame lies within' in text, text + err
    a, b = Manifest.read(src).select(np.arange(5)), Manifest.read(tmp_path/'f'/'manifest.csv')
    assert b.column('path').to_pylist() == ['a_1_3', 'a_1_3', 'a_0_1', 'v_0.5_2', 'c_1.2_end'] and len(b.groups()) == 4
    assert [o.row(0)['start'] for o in (a, b)] == [1, None]
    first = [30, 30, 0, 10, 35]                                     # the frame on screen at 1.2 s began a little earlier
    for i in range(5):
        for s in [SegmentSampler(5), SegmentSampler(3, neighbours=3)] + [GridSampler(8)]*(i < 3):
            (ix, x, u), (jx, y, v) = chosen(a, i, s), chosen(b, i, s)
            assert (x == first[i] + y).all(), (i, s, x, y)
            assert np.abs(ix.times[x] - ix.times[first[i]] - jx.times[y]).max() < 2e-6 and np.abs(u.astype(int) - v).max() <= 3
    code, text, err = run('extract_frames', src, tmp_path/'w', '--whole', '--quality', 95)
    assert code == 0 and '3 clips: 3 made' in text and a.hash() == Manifest.read(tmp_path/'w'/'manifest.csv').select(np.arange(5)).hash()
    b = Manifest.read(tmp_path/'w'/'manifest.csv')
    for i in range(5):
        for s in (GridSampler(8), GridSampler(8, rate=3), SegmentSampler(5)):
            assert (chosen(a, i, s)[1] == chosen(b, i, s)[1]).all()


def test_rate_and_lists(videos, tmp_path, run):
    "At a rate the pictures follow the clock; lists are what the loaders of Something-Something read"
    src, out = manifest(videos, ROWS), tmp_path/'f'
    code, text, err = run('extract_frames', src, out, '--fps', 5, '--lists', '--name', 'few.csv')
    assert code == 0, text + err
    assert (out/'train.txt').read_text() == 'a 17 1\ndeep/b 16 0\n' and (out/'test.txt').read_text().startswith('c 19 2\n')
    ix = index_video(out/'v')
    assert ix.fps == 5 and np.allclose(ix.times, np.arange(ix.n)/5) and 'times' not in json.loads((out/'v'/'clock.json').read_text())
    src_ix = index_video(videos/'v.mp4')
    near = np.abs(src_ix.times[None] - ix.times[:, None]).argmin(1)
    assert np.abs(read_frames(ix, range(ix.n)).mean((1, 2, 3)) - 20 - 5*near).max() < 2.5
    lst = read_list(out/'train.txt', out, 'path frames label', template='img_{:05d}.jpg', ext=None)
    new = Manifest.read(out/'few.csv').split('train')
    for u, v in zip(*(Clips(m, SegmentSampler(4), 64) for m in (lst, new))): assert torch.equal(u['video'], v['video'])
    assert run('extract_frames', manifest(videos, [dict(path='a.mp4')], 'n.csv'), tmp_path/'g', '--lists')[0] == 2
    again = tmp_path/'again'                                                            # folders of pictures are a source too
    code, text, err = run('extract_frames', out/'few.csv', again, '--short', 60)
    assert code == 0 and index_video(again/'deep'/'b').height == 60 and index_video(again/'a').fps == 5, text + err


def test_names():
    from data_tools.extract_frames import fit, folder_names
    nan = float('nan')
    assert folder_names([('x/a.mp4', nan, nan), ('x/a.avi', nan, nan), ('b.mp4', nan, nan), ('b/c.mp4', 0., 12.25), ('s.tar::1.mp4', nan, nan),
                         ('v1.5', nan, nan)]) == ['x/a.mp4', 'x/a.avi', 'b.mp4', 'b/c_0_12.25', 's/1', 'v1.5']
    with pytest.raises(ValueError, match='rename'): folder_names([('a', nan, nan), ('a/b.mp4', nan, nan)])
    assert (fit(640, 360, 0), fit(640, 360, 256), fit(360, 640, 256), fit(100, 80, 256)) == ((360, 640), (256, 455), (455, 256), (80, 100))


def test_command(videos, tmp_path, run):
    code, text, _ = command('extract_frames', '--help', module=True)
    assert code == 0 and 'examples:' in text and 'exit code' in text
    for wrong in (['--template', 'a.jpg'], ['--template', '{:05d}.mp4'], ['--quality', 0], ['--fps', -1], ['--workers', 0], ['--short', -1],
                  ['--name', 'x/y.csv'], ['--root', videos], ['--lists']):
        code, _, err = run('extract_frames', videos, tmp_path/'o', *wrong)
        assert code == 2 and err, wrong
    assert not (tmp_path/'o').exists()
    assert run('extract_frames', videos/'none', tmp_path/'o')[0] == 2 and run('extract_frames', videos, videos)[0] == 2


def test_clock_of_official_folders(videos, tmp_path, run):
    "Folders from elsewhere get a clock; what is not ours is not overwritten"
    run('extract_frames', videos, tmp_path/'f', '--fps', 12)
    (tmp_path/'f'/'a'/'clock.json').unlink()
    code, text, _ = run('extract_frames', videos, tmp_path/'f', '--fps', 12)
    assert code == 1 and 'in the way' in text
    assert index_video(tmp_path/'f'/'a').fps == 1
    write_clock(tmp_path/'f'/'a', 12)
    assert index_video(tmp_path/'f'/'a').fps == 12
