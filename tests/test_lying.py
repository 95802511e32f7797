"Files that say of themselves what is not so: every frame is that of a sequential decode, or the file is refused, or what it is gets told."
import os, struct, sys, warnings
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip('av')
from test_decode import H, W, X264, encode, sequential, template
from vidlab.data import files as F, index as I
from vidlab.data.decode import read_frames
from vidlab.data.files import VideoError
from vidlab.data.index import index_video


@pytest.fixture(autouse=True)
def own(cache): I._recent.clear()


def mux(src, dst, change):
    "Stream copy, with `change(number, packet)` before each packet"
    with av.open(str(src)) as i, av.open(str(dst), 'w') as o:
        s = i.streams.video[0]
        t = template(o, s)
        for k, p in enumerate(i.demux(s)):
            if p.dts is None: continue
            change(k, p)
            p.stream = t
            o.mux(p)
    return str(dst)


def check(path, jumps=8):
    "Every frame in order, and single ones in any order, against the sequential decode"
    true, ix = sequential(path), index_video(path)
    assert ix.n == len(true)
    rng = np.random.default_rng(0)
    for idx in (list(range(ix.n)), [ix.n-1], *[[int(i)] for i in rng.integers(0, ix.n, jumps)]):
        for i, x in zip(idx, read_frames(ix, idx)): assert np.array_equal(x, true[i]), f'frame {i} of {idx}'
    return ix


CODECS = dict(h263=('a.3gp', dict(codec='h263', w=176, h=144, g=50)), h263_mov=('a.mov', dict(codec='h263', w=176, h=144, g=50)),
              mpeg4=('a.mp4', dict(codec='mpeg4', g=50, bf=2)), mpeg2=('a.mkv', dict(codec='mpeg2video', g=50)),
              h264=('a.mp4', dict(g=50)), h264_open=('a.mp4', {X264: 'open-gop=1:keyint=10:min-keyint=5'}),
              hevc=('a.mp4', dict(codec='libx265', **{'x265-params': 'keyint=50:log-level=none'})),
              vp8=('a.webm', dict(codec='libvpx', g=50)), vp9=('a.mp4', {'codec': 'libvpx-vp9', 'g': 50, 'cpu-used': 8}),
              av1=('a.mp4', dict(codec='libsvtav1', preset=12, g=20)), ffv1=('a.mkv', dict(codec='ffv1', g=20)),
              msmpeg4=('a.mkv', dict(codec='msmpeg4', g=50)), qtrle=('a.mov', dict(codec='qtrle', pix='rgb24', g=20)),
              mjpeg=('a.mov', dict(codec='mjpeg', pix='yuvj420p')), prores=('a.mov', dict(codec='prores', pix='yuv422p10le')))


@pytest.mark.parametrize('kind', CODECS)
def test_key_frames_that_are_none(kind, tmp_path):
    "A container that calls every frame a key frame"
    name, options = CODECS[kind]
    def key(k, p): p.is_keyframe = True
    honest = encode(tmp_path/f'o{Path(name).suffix}', **options)
    ix = check(mux(honest, tmp_path/name, key))
    assert ix.seek == (kind not in ('h263', 'h263_mov', 'mpeg2', 'msmpeg4', 'qtrle'))
    if ix.seek: assert len(ix.key) == len(index_video(honest).key)
