"The trust table (vidlab.data.trust): numbers are read or not, verdicts tell right from wrong, readers that hang or are not there; torchcodec where it loads."
import time
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip('av')
from vidlab.data import decode as D, trust as T
from vidlab.data.child import Child


def test_numbers_are_read_or_not(tmp_path):
    g = np.random.default_rng(0)
    for w, h in ((160, 120), (161, 121), (90, 200), (320, 240)):
        for n in g.integers(0, 256, 20).tolist():
            x = T.number_picture(n, w, h)
            assert T.read_number(x) == n
            noisy = np.clip(x + g.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
            assert T.read_number(noisy) == n
            other = T.number_picture((n + 1) % 256, w, h)
            assert T.read_number(x//2 + other//2) == -1 and T.read_number(np.full_like(x, 128)) == -1
            torn = np.concatenate([x[:h//2], other[h//2:]])
            assert T.read_number(torn) in (-1, n, (n + 1) % 256)


def test_verdicts(monkeypatch):
    truth = [3, 4, 5]
    say = lambda idx, shift=0: dict(n=3, asked=[idx], said=[[truth[i] + shift for i in idx]])
    assert T.verdict(say([0, 2, 1]), truth) == 'right' and T.verdict(say([1], 1), truth) == 'wrong'
    assert T.verdict(dict(say([0]), n=4), truth) == 'wrong'
    assert T.verdict(dict(error='x'), truth) == 'refused' and T.verdict(dict(absent='x'), truth) == 'absent'
    a = np.full((8, 8), 100.)
    assert T.verdict(dict(n=1, asked=[[0]], said=[[a + 2]]), [a]) == 'right'
    assert T.verdict(dict(n=1, asked=[[0]], said=[[a + 9]]), [a]) == 'wrong'


READERS = '''
import time, os
from vidlab.data import trust as T
def late(path): time.sleep(60)
def dead(path): os.abort()
def off_by_one(path):
    n, get = T.by_ours(path)
    return n, lambda idx: get([max(i - 1, 0) for i in idx])
def none(path): import no_such_library
T.READERS.update(late=late, dead=dead, off_by_one=off_by_one, none=none)
ask = T.ask
'''


def test_readers_that_misbehave(tmp_path, monkeypatch, cache):
    (tmp_path/'more_readers.py').write_text(READERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path, child = T.write_numbers(tmp_path/'a.mp4', n=20, g=5), Child()
    truth = T.plain_decode(path, T.read_number)
    assert truth == list(range(20))
    call = child.call
    monkeypatch.setattr(child, 'call', lambda name, *a, **k: call('more_readers:ask', *a, **k))
    try:
        for reader, want in (('ours', 'right'), ('off_by_one', 'wrong'), ('late', 'hung'), ('dead', 'refused'), ('none', 'absent')):
            assert T.trial(child, path, reader, truth, timeout=2.) == want
        seen = T.plain_decode(path, T.thumbnail)
        assert T.trial(child, path, 'ours', seen, 'thumbnail') == 'right' and T.trial(child, path, 'off_by_one', seen, 'thumbnail') == 'wrong'
    finally: child.kill()


def test_a_cut_is_seen(tmp_path, cache):
    "What the table is about: a stream-copied cut, which decord counts and shows otherwise than it is"
    src = T.write_numbers(tmp_path/'a.mp4', g=250)
    cut = T.copy_packets(src, tmp_path/'cut.mp4', shift=-7)
    truth = T.plain_decode(cut, T.read_number)
    assert truth == list(range(7, 48))
    assert T.verdict(T.ask(cut, 'ours'), truth) == 'right'
    if D._installed('decord'): assert T.verdict(T.ask(cut, 'decord'), truth) == 'wrong'


def test_torchcodec_where_it_loads(tmp_path, cache):
    "The adapter gives the frames of a sequential decode for every file that it does not refuse"
    if why := D.get_decoder('torchcodec').loads(): pytest.skip(why)
    for name in ('h264', 'h264_mkv', 'open_gop', 'vp9', 'av1', 'cut_at_7'):
        if name in T.ENCODED: path = T.write_numbers(tmp_path/f'{name}.{T.ENCODED[name][0]}', **T.ENCODED[name][1])
        else: path = T.copy_packets(T.write_numbers(tmp_path/'s.mp4', g=250), tmp_path/'c.mp4', shift=-7)
        ix, truth = D.index_video(path), T.plain_decode(path, T.read_number)
        if ix.decoders['torchcodec']: continue
        idx = [0, ix.n - 1, ix.n//2, ix.n//2]
        assert [T.read_number(x) for x in D.read_frames(ix, idx, decoder='torchcodec')] == [truth[i] for i in idx]
