"Files that say of themselves what is not so: every frame is that of a sequential decode, or the file is refused, or what it is gets told."
import os, warnings
from fractions import Fraction
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


def test_side_data_that_the_library_does_not_know(tmp_path):
    "A camera's JPEG frames carry EXIF, for which FFmpeg has a kind of side data and PyAV none; a turned frame stays turned"
    import io
    from PIL import Image
    exif = Image.Exif()
    exif[0x10f] = 'camera'
    yy, xx = np.mgrid[:H, :W]
    with av.open(str(tmp_path/'a.avi'), 'w') as c:
        s = c.add_stream('mjpeg', rate=10)
        s.width, s.height, s.pix_fmt = W, H, 'yuvj420p'
        for i in range(6):
            b = io.BytesIO()
            Image.fromarray(np.stack([(xx + 9*i) % 256, yy, yy*0 + 20*i], -1).astype(np.uint8)).save(b, 'JPEG', exif=exif)
            p = av.Packet(b.getvalue())
            p.pts = p.dts = i
            p.time_base, p.stream, p.is_keyframe = Fraction(1, 10), s, True
            c.mux(p)
    with av.open(str(tmp_path/'a.avi')) as c: f = next(c.decode(video=0))
    ix = index_video(tmp_path/'a.avi')
    assert ix.n == 6 and (ix.width, ix.height) == (W, H) and read_frames(ix, [5, 0]).shape == (2, H, W, 3)

    class Odd:
        width, height, interlaced_frame, rotation, color_trc = 4, 2, False, 90, 2
        format = type('F', (), dict(name='yuv420p'))
        @property
        def side_data(self): raise ValueError('31 is not a valid Type')
    for angle, turn in ((0, (1, 0, 0, 1)), (90, (0, -1, 1, 0)), (180, (-1, 0, 0, -1)), (-90, (0, 1, -1, 0))):
        Odd.rotation = angle
        assert I._turn_of(Odd()) == turn


def test_hevc_of_two_views(tmp_path):
    "Slices of a second layer in every packet: the base view is what everybody shows"
    src = encode(tmp_path/'o.mp4', codec='libx265', n=20, **{'x265-params': 'keyint=8:log-level=none'})
    with av.open(src) as i, av.open(str(tmp_path/'a.mp4'), 'w') as o:
        s = i.streams.video[0]
        t = template(o, s)
        for p in i.demux(s):
            if p.dts is None: continue
            b = bytes(p)
            units, at = [], 0
            while at < len(b):
                size = int.from_bytes(b[at:at+4], 'big')
                units.append(b[at+4:at+4+size])
                at += 4 + size
            units += [bytes([u[0], u[1] | 8]) + u[2:] for u in units if u[0] >> 1 & 63 < 32]
            q = av.Packet(b''.join(len(u).to_bytes(4, 'big') + u for u in units))
            q.pts, q.dts, q.time_base, q.is_keyframe, q.stream = p.pts, p.dts, p.time_base, p.is_keyframe, t
            o.mux(q)
    ix = check(tmp_path/'a.mp4')
    assert ix.n == 20 and ix.verdict == 'ok' and np.array_equal(read_frames(ix, [7]), read_frames(src, [7]))


@pytest.mark.parametrize('kind', ['webp', 'png', 'gif', 'webp named jpg'])
def test_animations(kind, tmp_path):
    "Animated pictures are videos, with their own times; frames in any order, one by one, in a tar"
    import tarfile
    from PIL import Image
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)]
    file = tmp_path/f'a.{"jpg" if " " in kind else kind}'
    frames, stay = [Image.new('RGB', (16, 12), c) for c in colours], [100, 300, 200, 100]
    how = dict(lossless=True) if 'webp' in kind else {}
    frames[0].save(file, {'webp': 'WEBP', 'png': 'PNG', 'gif': 'GIF'}[kind[:4].strip()], save_all=True, append_images=frames[1:], duration=stay, loop=0, **how)
    with tarfile.open(tmp_path/'s.tar', 'w') as t: t.add(file, file.name)
    for path in (file, f'{tmp_path}/s.tar::{file.name}'):
        ix = index_video(path)
        assert ix.n == 4 and np.allclose(ix.times, [0, .1, .4, .6], atol=.011), ix.times
        for idx in ([0, 1, 2, 3], [3, 0, 0, 2], [2]):
            for i, x in zip(idx, read_frames(ix, idx)): assert np.abs(x.astype(int) - colours[i]).max() <= 12
    assert read_frames(file, [3, 1], size=(6, 8)).shape == (2, 6, 8, 3)


@pytest.mark.parametrize('kind', ['png grey', 'png rgb', 'tiff', 'pgm', 'float'])
def test_sixteen_bits_keep_their_range(kind, tmp_path):
    "The upper eight of sixteen bits, grey or not; numbers without a range of their own are refused"
    from PIL import Image
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    file = tmp_path/'a.png'
    if kind == 'png rgb':
        with av.open(str(file), 'w', format='image2') as c:
            s = c.add_stream('png', rate=1)
            s.width, s.height, s.pix_fmt = 64, 8, 'rgb48be'
            for p in [*s.encode(av.VideoFrame.from_ndarray(ramp[..., None].repeat(3, 2), format='rgb48le')), *s.encode(None)]: c.mux(p)
    elif kind == 'pgm': file.write_bytes(b'P5 64 8 65535\n' + ramp.astype('>u2').tobytes())
    elif kind == 'float': Image.fromarray(ramp.astype(np.float32)).save(file, 'TIFF')
    else: Image.fromarray(ramp).save(file, 'TIFF' if kind == 'tiff' else 'PNG')
    if kind == 'float':
        with pytest.raises(VideoError, match='no range of its own'): read_frames(file, [0])
        return
    got = read_frames(file, [0])[0].astype(int)
    assert np.abs(got - (ramp >> 8).astype(int)[..., None]).max() <= 1 and got.max() == 255 and got[:, 32].mean() < 140


def nits_of(code, kind): # from the formulas of BT.2100, for grey
    if kind == 'PQ':
        m1, m2, c1, c2, c3 = 2610/16384, 2523/4096*128, 3424/4096, 2413/4096*32, 2392/4096*32
        return 10000*(max(code**(1/m2) - c1, 0)/(c2 - c3*code**(1/m2)))**(1/m1)
    a, b = .17883277, 1 - 4*.17883277
    c = .5 - a*np.log(4*a)
    return 1000*(code*code/3 if code <= .5 else (np.exp((code - c)/a) + b)/12)**1.2


@pytest.mark.parametrize('kind,word', [('PQ', 'smpte2084'), ('HLG', 'arib-std-b67')])
def test_high_range_is_told_and_mapped(kind, word, tmp_path):
    "Grey of known light comes out as the stated rule says; the index says so, and so does a warning; decord is not asked"
    from vidlab.data.decode import _told
    codes = [0, .2, .4, .5807, .7, .9]
    with av.open(str(tmp_path/'a.mp4'), 'w') as c:
        s = c.add_stream('libx265', rate=10, options={'x265-params': f'colorprim=bt2020:transfer={word}:colormatrix=bt2020nc:log-level=none:qp=4'})
        s.width, s.height, s.pix_fmt = W, H, 'yuv420p10le'
        for code in codes:
            f = av.VideoFrame(W, H, 'yuv420p10le')
            for p, level in zip(f.planes, (round(64 + 876*code), 512, 512)): p.update(np.full(p.buffer_size//2, level, '<u2').tobytes())
            c.mux(s.encode(f))
        c.mux(s.encode(None))
    ix = index_video(tmp_path/'a.mp4')
    if not ix.hdr: pytest.skip('this PyAV does not tell the transfer of a frame')
    assert ix.hdr == kind and ix.verdict == 'warn' and f'HDR ({kind})' in ix.reasons[0] and ix.decoders['decord'] and ix.seek
    _told.clear()
    with pytest.warns(F.VideoWarning, match='tone-mapped'): got = read_frames(ix, range(6))
    white = 1000/203
    for x, code in zip(got, codes):
        y = nits_of(code, kind)/203
        want = 255*min(y*(1 + y/white**2)/(1 + y), 1)**(1/2.4)
        assert np.abs(x.astype(float) - want).max() <= 3, (code, x[0, 0], want)
    assert read_frames(ix, [3], size=(30, 40)).shape == (1, 30, 40, 3)


def test_encrypted_and_damaged_are_not_ok(tmp_path):
    from vidlab.data.trust import spoil
    key = dict(encryption_scheme='cenc-aes-ctr', encryption_key='76a6c65c5ea762046bd749a2e632ccbb', encryption_kid='a7e61c373e219033c21091fa607bf3b8')
    from vidlab.data.trust import write_numbers
    for codec in ('libx264', 'mpeg4'):
        with pytest.raises(VideoError, match='encrypted'): index_video(write_numbers(tmp_path/f'{codec}.mp4', codec=codec, box=tuple(key.items())))
    src = write_numbers(tmp_path/'a.mp4', g=12)
    for name, how in (('x', lambda b: b[:6] + bytes(o ^ 0x55 for o in b[6:])), ('y', lambda b: b[:8] + bytes(len(b) - 8)), ('z', lambda b: bytes(len(b)))):
        try: assert index_video(spoil(src, tmp_path/f'{name}.mp4', range(48), how)).verdict == 'warn'
        except VideoError as e: assert 'no frame decodes' in str(e)


def clips(folder, names, train=True, **more):
    from vidlab.data.annots import Manifest
    from vidlab.data.clips import Clips
    from vidlab.data.sample import make_sampler
    (folder/'m.csv').write_text('path,text\n' + ''.join(f'{n},a clip\n' for n in names))
    return Clips(Manifest.read(folder/'m.csv'), make_sampler('segment', frames=6), 32, train=train, **more)


@pytest.mark.parametrize('more', [dict(train=False), dict(train=False, views=(1, 3)), dict(augment='none'), dict(augment='rrc flip jitter erase-p1'),
                                  dict(augment='rand-m7-n2-p1 rrc flip', repeats=2), dict(augment='erase-p1 crop')], ids=str)
def test_large_frames_one_by_one(more, tmp_path, monkeypatch):
    "The same numbers, whether a clip is held as a whole or frame by frame"
    import torch
    from vidlab.data import clips as C
    encode(tmp_path/'a.mp4', n=20)
    ds = clips(tmp_path, ['a.mp4'], **more)
    want = [ds[i] for i in range(len(ds))]
    monkeypatch.setattr(C, 'LARGE', 0)
    held = []
    monkeypatch.setattr(C.Clips, '_stored', lambda self, ix, idx: held.append(ix) or read_frames(ix, idx))
    got = [ds[i] for i in range(len(ds))]
    assert bool(held) == ('erase-p1 crop' in str(more))
    for a, b in zip(want, got):
        for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]):
            assert torch.equal(x['video'], y['video']) and torch.equal(x['frame_time'], y['frame_time'])


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_the_decoder_says_reaches_the_report(workers, tmp_path):
    "From workers and from here: the loader holds path and text"
    from vidlab.data.clips import Loader
    from vidlab.data import decode as D
    from vidlab.data.trust import spoil, write_numbers
    write_numbers(tmp_path/'a.mp4', g=12)
    spoil(tmp_path/'a.mp4', tmp_path/'b.mp4', range(20, 26), lambda b: bytes(len(b)))
    D._told.clear()
    D.take_news()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dl = Loader(clips(tmp_path, ['a.mp4', 'b.mp4']), 2, workers=workers)
        batch, = dl
        dl.close()
    assert 'told' not in batch and [os.path.basename(p) for p in dl.told] == ['b.mp4'] and 'damaged' in str(dl.told)


def test_a_size_that_grows_on_the_way(tmp_path, monkeypatch):
    "A stream whose later pictures are over the limit: they are not decoded, and the file is not ok"
    from types import SimpleNamespace
    small, large = (Path(encode(tmp_path/f'{w}.h264', w=w, h=w, n=6, fmt='h264')).read_bytes() for w in (64, 256))
    (tmp_path/'a.h264').write_bytes(small + large)
    assert index_video(tmp_path/'a.h264').n == 12
    monkeypatch.setattr(F.LIMITS, 'pixels', 100*100)
    try: ix = index_video(tmp_path/'a.h264', cache=False)
    except VideoError: return
    assert ix.n == 6 and ix.verdict == 'warn'
