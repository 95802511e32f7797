"""The reader (vidlab.data.files, packets, child, index, decode) on real files: every decoder against a sequential decode, damage, odd names, hangs."""
import csv, os, pickle, shutil, struct, sys, time, warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

av = pytest.importorskip('av')
from vidlab.data import decode as D, files as F, index as I
from vidlab.data.child import _child
from vidlab.data.files import LIMITS, _cache_name, _display_matrix, _lenient, _stat
from vidlab.data.packets import LOOK
from vidlab.data.child import DecodeSlots
from vidlab.data.decode import audit, read_frames
from vidlab.data.files import ReaderError, VideoError, VideoWarning
from vidlab.data.index import VideoIndex, index_video
from vidlab.data import shapes

W, H = 160, 120


@pytest.fixture(autouse=True, scope='module')
def _cache(tmp_path_factory):
    "An index cache of our own"
    old = os.environ.get('VIDLAB_CACHE')
    os.environ['VIDLAB_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    _child().kill()
    os.environ.pop('VIDLAB_CACHE') if old is None else os.environ.update(VIDLAB_CACHE=old)


def encode(path, codec='libx264', pix='yuv420p', n=40, w=W, h=H, rate=30, times=None, fmt=None, audio=False, **options):
    "A small moving picture; `times`: ms of each frame"
    if codec not in av.codecs_available: pytest.skip(f'this PyAV has no {codec}')
    options = {k: str(v) for k, v in options.items()}
    with av.open(str(path), 'w', format=fmt) as c:
        s = c.add_stream(codec, rate=rate, options=options)
        s.width, s.height, s.pix_fmt = w, h, pix
        if times: s.codec_context.time_base = Fraction(1, 1000)
        yy, xx = np.mgrid[:h, :w]
        for t in range(n):
            x = np.stack([(xx*2 + 5*t) % 256, (yy*3 + t) % 256, (xx + yy + 7*t) % 256], -1).astype('uint8')
            x[t % h:t % h+20, t % w:t % w+20] = 255, 4*t % 256, 0
            f = av.VideoFrame.from_ndarray(x, format='rgb24').reformat(format=pix)
            if times: f.pts, f.time_base = times[t], Fraction(1, 1000)
            c.mux(s.encode(f))
        c.mux(s.encode(None))
    return str(path)


def template(box, stream):
    "A stream for packets of another file"
    try: return box.add_stream_from_template(stream, opaque=True)
    except (TypeError, AttributeError): pytest.skip('this PyAV cannot copy streams')    # 14.0


def copy(src, dst, shift=0, keep=lambda i, p: True, matrix=None):
    "Stream copy, timestamps moved by `shift` frames, packets left out, with a display rotation"
    with av.open(src) as i, av.open(str(dst), 'w', options=dict(avoid_negative_ts='disabled')) as o:
        s = i.streams.video[0]
        t = template(o, s)
        if matrix is not None: t.set_display_rotation(matrix)
        one = int(round(1/s.average_rate/s.time_base))
        for k, p in enumerate(i.demux(s)):
            if p.dts is None or not keep(k, p): continue
            p.pts += shift*one; p.dts += shift*one; p.stream = t
            o.mux(p)
    return str(dst)


def rgb(f, graphs={}):
    "One frame as FFmpeg's scale filter makes it; its colours have a test of their own"
    key = D._kind(f)
    g = graphs.get(key) or graphs.setdefault(key, D._to_rgb(key, key[:2]))
    g.push(f)
    return g.pull().to_ndarray()


def sequential(path):
    "What decoding from start to end gives, bad packets passed over, turned upright by numpy"
    out = []
    with av.open(str(path), **_lenient()) as c:
        s = c.streams.video[0]
        s.codec_context.thread_count = 1
        for p in c.demux(s):
            try: frames = s.codec_context.decode(p if p.size else None)
            except av.FFmpegError: continue
            if frames and _display_matrix(frames[0]) and not hasattr(frames[0], 'rotation'): pytest.skip('this PyAV does not know of rotation')   # 14.0
            out += [np.rot90(rgb(f), getattr(f, 'rotation', 0)//90 % 4) for f in frames]
    return out


X264 = 'x264-params'
KINDS = dict(                                             # name -> (file, options of `encode`, may decord read it)
    h264=('a.mp4', dict(g=12), True), h264_long=('a.mp4', {X264: 'bframes=8:b-pyramid=normal:b-adapt=0:keyint=40'},
                                                 True), h264_mkv=('a.mkv', dict(g=12), True),
    intra=('a.mp4', dict(g=1), True), gop2=('a.mp4', dict(g=2, bf=1), True), one=('a.mp4', dict(n=1),
            None), two=('a.mp4', dict(n=2), None),
    open_gop=('a.mp4', {X264: 'open-gop=1:keyint=10:min-keyint=5'}, False), open_gop_mkv=('a.mkv',
            {X264: 'open-gop=1:keyint=10:min-keyint=5'}, False),
    refresh=('a.mp4', {X264: 'intra-refresh=1:keyint=10'}, False), interlaced=('a.mp4',
            {X264: 'interlaced=1:keyint=15'}, False),
    yuv444=('a.mp4', dict(pix='yuv444p', w=161, h=121), False), bits10=('a.mp4', dict(pix='yuv420p10le'),
            False), tiny=('a.mp4', dict(w=2, h=2), False),
    ts=('a.ts', dict(g=12), False), raw=('a.h264', dict(fmt='h264'), False), flv=('a.flv', dict(g=12),
            False), h264_avi=('a.avi', dict(g=12), False),
    hevc=('a.mp4', dict(codec='libx265', **{'x265-params': 'open-gop=1:keyint=10:log-level=none'}), False),
    hevc_layers=('a.mp4', dict(codec='libx265', **{'x265-params': 'temporal-layers=3:keyint=20:log-level=none'}),
                 False),
    vp9=('a.webm', dict(codec='libvpx-vp9', g=15), True), vp9_odd=('a.webm', dict(codec='libvpx-vp9', w=161, h=121),
            False),
    vp8_hidden=('a.webm', {'codec': 'libvpx', 'auto-alt-ref': 1, 'lag-in-frames': 16, 'g': 25}, None),
    avi=('a.avi', dict(codec='mpeg4'), False), avi_b=('a.avi', dict(codec='mpeg4', bf=2), False), mpeg4=('a.mp4',
            dict(codec='mpeg4', bf=2, g=12), None),
    wmv=('a.wmv', dict(codec='wmv2'), False), gif=('a.gif', dict(codec='gif', pix='rgb8', n=12),
                                                   False), mjpeg=('a.avi', dict(codec='mjpeg', pix='yuvj420p', n=12),
                                                                  False),
    mpeg2=('a.ts', dict(codec='mpeg2video', bf=2), False), av1=('a.mkv', dict(codec='libsvtav1', n=12), False),
    vfr=('a.mp4', dict(times=[33*t if t < 20 else 2000 + 100*t for t in range(40)]), True), late=('a.mp4',
            dict(times=[33*t + 5000 for t in range(40)]), True),
    negative=('a.mp4', dict(times=[33*t - 500 for t in range(40)]), False))


@pytest.mark.parametrize('kind', KINDS)
def test_exact(kind, tmp_path):
    "All frames, random ones, repeats, backwards, the last alone: the bytes of a sequential decode, from every decoder"
    file, options, decord = KINDS[kind]
    path = encode(tmp_path/file, **options)
    true, ix = sequential(path), index_video(path)
    assert ix.n == len(true) and len(ix.times) == ix.n and ix.fps > 0
    assert ix.times[0] == 0 and (np.diff(ix.times) > 0).all()
    if decord is not None and D._installed('decord'):
        assert (ix.decoders['decord'] is None) == decord, ix.decoders['decord']
    assert ix.decoders['pyav'] is None
    rng = np.random.default_rng(0)
    for name in ['auto'] + [k for k, why in ix.decoders.items() if why is None]:
        for idx in (range(ix.n), rng.integers(0, ix.n, 7), [ix.n-1], range(ix.n-1, -1, -5), [0, 0, ix.n-1],
                    rng.integers(0, ix.n, 1)):
            got = read_frames(ix, list(idx), decoder=name)
            assert got.dtype == np.uint8 and got.shape == (len(idx), *true[0].shape)
            for i, x in zip(idx, got): assert np.array_equal(x, true[i]), f'{name}: frame {i} of {list(idx)}'
    for name, why in ix.decoders.items():
        if why is not None:
            with pytest.raises(VideoError, match='gets such files wrong') as e: read_frames(ix, [0], decoder=name)
            assert repr(path) in str(e.value)


def test_groups_of_a_long_video_side_by_side(tmp_path, monkeypatch):
    "Frames far apart are read by several decoders at once: the same bytes, in order, and damage in one part falls back for all"
    path = encode(tmp_path/'a.mp4', g=10)
    true, ix, parts, real = sequential(path), index_video(path), [], D._parts
    monkeypatch.setattr(D, 'cores', lambda: 3)
    monkeypatch.setattr(D, '_parts', lambda *a: parts.append(real(*a)) or parts[-1])
    assert np.array_equal(read_frames(ix, [35, 3, 17, 17]), [true[i] for i in (35, 3, 17, 17)]) and len(parts[-1]) == 1
    monkeypatch.setattr(D, 'LONG', 4)
    for idx in ([35, 3, 17, 17], range(40), [39]):
        assert np.array_equal(read_frames(ix, list(idx)), [true[i] for i in idx])
    assert [len(p) for p in parts[1:]] == [3, 3, 1] and all(len({k for p in o for k, _ in p}) == sum(map(len, o)) for o in parts)
    assert read_frames(ix, [3, 17, 35], size=(12, 16)).shape == (3, 12, 16, 3)
    def broken(ix, groups, row, canvas):
        if groups[0][0]: raise D._Damage('planted')
        return one(ix, groups, row, canvas)
    one = D._read_part
    monkeypatch.setattr(D, '_read_part', broken)
    assert np.array_equal(read_frames(ix, [35, 3]), [true[35], true[3]])


def test_times(tmp_path):
    vfr = [33*t if t < 20 else 2000 + 100*t for t in range(40)]
    ix = index_video(encode(tmp_path/'v.mp4', times=vfr))
    assert np.abs(ix.times - (np.array(vfr) - vfr[0])/1000).max() < 2e-3 and ix.fps == pytest.approx(39/ix.times[-1],
            rel=.05)
    assert index_video(encode(tmp_path/'n.mp4', rate=Fraction(30000, 1001))).fps == pytest.approx(30000/1001, rel=1e-9)
    # exactly: published samplers truncate it
    assert index_video(encode(tmp_path/'m.mp4', rate=25)).fps == 25


@pytest.mark.parametrize('first', [7, 20, 33])
def test_cut(first, tmp_path):
    "A stream-copied cut: packets before the cut are there and hidden; decord, which hangs or lies here, is never asked"
    src = encode(tmp_path/'a.mp4', g=250)
    cut = copy(src, tmp_path/'cut.mp4', shift=-first)
    true, ix = sequential(cut), index_video(cut)
    assert ix.n == len(true) == 40 - first and ix.discarded == first
    assert np.array_equal(read_frames(cut, [0, ix.n-1]), [true[0], true[-1]])
    assert np.array_equal(true[0], sequential(src)[first])
    assert 'edit list' in ix.decoders['decord']


@pytest.mark.parametrize('angle', [0, 90, 180, 270])
def test_rotation(angle, tmp_path):
    path = encode(tmp_path/'a.mp4')
    if not hasattr(av.video.stream.VideoStream, 'set_display_rotation'):
        pytest.skip('this PyAV cannot write a display matrix')
    turned = copy(path, tmp_path/'r.mp4', matrix=angle)
    true, ix = sequential(turned), index_video(turned)
    assert (ix.width, ix.height) == ((H, W) if angle % 180 else (W, H))
    for name in ('pyav', 'decord', 'auto'):
        if name == 'decord' and not D._installed('decord'): continue
        assert np.array_equal(read_frames(ix, [3, 30], decoder=name), [true[3], true[30]])
        assert read_frames(ix, [3], decoder=name, size=(60, 50)).shape == (1, 60, 50, 3)


@pytest.mark.parametrize('matrix,kr,kb', [('bt709', .2126, .0722), ('smpte170m', .299, .114), (None, .299, .114)])
@pytest.mark.parametrize('span', ['tv', 'pc'])
def test_colours(matrix, kr, kb, span, tmp_path):
    "A file's tags of colour space and range are obeyed: by the formulas of ITU-R BT.709 and BT.601, read and scaled"
    red, green, blue = colour = np.array([200., 60., 30.])
    y = kr*red + (1-kr-kb)*green + kb*blue
    u, v = (blue - y)/(2 - 2*kb), (red - y)/(2 - 2*kr)
    levels = (y, u + 128, v + 128) if span == 'pc' else (16 + y*219/255, 128 + u*224/255, 128 + v*224/255)
    planes = np.concatenate([np.full(H*W//k, round(level), np.uint8) for k, level in zip((1, 4, 4), levels)]).reshape(H*3//2, W)
    path = tmp_path/'a.mp4'
    tags = ':'.join(['qp=1', *([f'colormatrix={matrix}'] if matrix else []), *(['fullrange=on'] if span == 'pc' else [])])
    with av.open(str(path), 'w') as c:
        s = c.add_stream('libx264', rate=25, options={X264: tags})
        s.width, s.height, s.pix_fmt = W, H, 'yuv420p'
        for _ in range(3): c.mux(s.encode(av.VideoFrame.from_ndarray(planes, format='yuv420p')))
        c.mux(s.encode(None))
    for kw in ({}, dict(size=(60, 50), decoder='pyav')):
        got = read_frames(path, [1], **kw)[0].mean((0, 1))
        assert np.abs(got - colour).max() < 3, (kw, got)


def test_tags_that_are_not_utf8(tmp_path):
    "HMDB51's AVI files carry such titles"
    path, title = tmp_path/'a.avi', 'Müll und Öl'.encode()
    with av.open(str(path), 'w') as c:
        c.metadata['title'] = title.decode()
        s = c.add_stream('mpeg4', rate=25)
        s.width, s.height, s.pix_fmt = W, H, 'yuv420p'
        for t in range(5): c.mux(s.encode(av.VideoFrame.from_ndarray(np.full((H, W, 3), 40*t, np.uint8), format='rgb24')))
        c.mux(s.encode(None))
    data = path.read_bytes()
    assert title in data
    path.write_bytes(data.replace(title, title.replace(b'\xc3', b'\xfc')))
    assert np.array_equal(read_frames(path, [0, 4], decoder='pyav'), [sequential(path)[i] for i in (0, 4)])


def test_size_is_the_picture_scaled(tmp_path):
    path = encode(tmp_path/'a.mp4')
    big, small = read_frames(path, [5]), read_frames(path, [5], size=(60, 80), decoder='pyav')
    mean = big.reshape(1, 60, 2, 80, 2, 3).mean((2, 4))
    assert np.abs(small - mean).mean() < 8


def test_lost_packets(tmp_path):
    "Packets left out of the middle: the frames that exist, at their own times; nothing shifted or repeated"
    src = encode(tmp_path/'a.mp4', g=10, bf=0)
    hole = copy(src, tmp_path/'h.mp4', keep=lambda i, p: not 10 <= i < 20)                  # a whole group of pictures
    true, ix = sequential(src), index_video(hole)
    assert ix.n == 30 and ix.times[10] == pytest.approx(20/30)
    assert np.array_equal(read_frames(ix, [9, 10, 29]), [true[9], true[20], true[39]])


def overwrite(src, dst, packets, fill):
    data = bytearray(Path(src).read_bytes())
    with av.open(src) as c: where = [(p.pos, p.size) for p in c.demux(video=0) if p.size]
    for k in packets: pos, size = where[k]; data[pos:pos+size] = fill(size)
    Path(dst).write_bytes(data)
    return str(dst)


def test_zeros_and_filler(tmp_path):
    "Packets without a picture: what demuxing alone cannot count is decoded once"
    src = encode(tmp_path/'a.mp4', g=10, bf=0)
    for name, fill in (('zero.mp4', bytes), ('filler.mp4', lambda n: struct.pack('>IB', n-4,
            12) + b'\xff'*(n-6) + b'\x80')):
        path = overwrite(src, tmp_path/name, range(30, 40), fill)
        ix, true = index_video(path), sequential(path)
        assert ix.n == len(true) == 30 and ix.verdict == 'warn' and ix.how == 'decode' and 'decord' not in [k for k,
                v in ix.decoders.items() if v is None]
        with pytest.warns(VideoWarning, match='damaged'): got = read_frames(ix, range(30))
        assert np.array_equal(got, true)
        with pytest.raises(ValueError, match='frames 0 to 29'): read_frames(ix, [30])


def test_missing_frame(tmp_path):
    "A frame that the packets promise and the decoder does not give: an error naming it, or its neighbour and a warning"
    src = encode(tmp_path/'a.mp4', bf=0, g=250)
    # a slice header, then nothing
    path = overwrite(src, tmp_path/'b.mp4', [39], lambda n: struct.pack('>IBB', n-4, 0x41, 0x9a) + b'\0'*(n-6))
    ix = index_video(path)
    if ix.n == 39: pytest.skip('noticed by the index')
    try: got = read_frames(ix, [39], decoder='pyav')
    except VideoError as e:
        assert e.stage == 'decode' and e.frame == 39 and e.lost == [39]
        with pytest.warns(VideoWarning, match='stand in'):
            near = read_frames(ix, [0, 39], decoder='pyav', missing='nearest')
        assert np.array_equal(near[1], sequential(src)[38])
        deep = index_video(path, deep=True)
        assert deep.deep and deep.n == 39 and index_video(path).n == 39                    # the deep index stays
    # concealed as a sequential reader would
    else: assert np.array_equal(got[0], sequential(path)[39])


def test_concealed_like_sequential(tmp_path):
    "Flipped bits inside pictures: strict decoding notices; the result is that of the sequential decode, with a warning"
    src = encode(tmp_path/'a.mp4', g=20)
    data, rng = bytearray(Path(src).read_bytes()), np.random.default_rng(3)
    with av.open(src) as c: where = [(p.pos, p.size) for p in c.demux(video=0) if p.size]
    for k in (5, 25):
        for at in rng.integers(20, where[k][1], 5): data[where[k][0] + at] ^= 0x55
    path = tmp_path/'flip.mp4'
    path.write_bytes(data)
    true = sequential(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: got = read_frames(path, range(40), decoder='pyav')
        except VideoError: return
    assert len(got) == len(true) == 40 and any(issubclass(w.category, VideoWarning) for w in said)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert index_video(path, deep=True).verdict == 'warn'


@pytest.mark.parametrize('what', ['empty', 'html', 'half', 'header', 'audio', 'fifo', 'missing', 'empty folder',
                                  'bomb', 'playlist', 'device'])
def test_bad(what, tmp_path, monkeypatch):
    "One clear error that names the file and the stage, in seconds"
    path, src = tmp_path/'x.mp4', None
    if what == 'empty': path.touch()
    elif what == 'html': path.write_text('<html>404</html>'*40)
    elif what == 'half': path.write_bytes(Path(encode(tmp_path/'a.mp4')).read_bytes()[:4000])
    elif what == 'header':
        src = Path(encode(tmp_path/'a.mp4', movflags='faststart')).read_bytes()
        path.write_bytes(src[:src.index(b'mdat') + 4])
    elif what == 'audio':
        with av.open(str(path), 'w') as c:
            s = c.add_stream('aac', rate=16000)
            f = av.AudioFrame.from_ndarray(np.zeros((1, 4096), 'float32'), format='fltp', layout='mono'); f.rate = 16000
            c.mux(s.encode(f)); c.mux(s.encode(None))
    elif what == 'fifo': os.mkfifo(path)
    elif what == 'empty folder': path.mkdir()
    elif what == 'bomb':
        encode(path, w=640, h=480, n=2)
        monkeypatch.setattr(LIMITS, 'pixels', 640*480 - 1)
    elif what == 'playlist': path.write_text('#EXTM3U\n#EXTINF:1,\n' + encode(tmp_path/'a.ts') + '\n#EXT-X-ENDLIST\n')
    elif what == 'device': path = Path('/dev/zero')
    t = time.time()
    with pytest.raises(VideoError) as e: index_video(path)
    assert repr(str(path)) in str(e.value) and e.value.stage in ('open', 'index') and time.time() - t < 15
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.path, again.stage) == (str(e.value), e.value.path, e.value.stage)
    if what == 'audio': assert 'no video stream' in str(e.value)
    if what == 'bomb':
        assert 'LIMITS.pixels' in str(e.value)
        monkeypatch.undo()
        # a raised limit counts at once
        ix = index_video(path)
        monkeypatch.setattr(LIMITS, 'pixels', 640*480 - 1)
        with pytest.raises(VideoError, match='LIMITS.pixels'): read_frames(ix, [0])


def test_permission(tmp_path):
    path = Path(encode(tmp_path/'a.mp4'))
    path.chmod(0)
    if os.access(path, os.R_OK): pytest.skip('this user may read everything')
    with pytest.raises(VideoError, match='Permission'): index_video(path)


@pytest.mark.parametrize('name', ['a b.mp4', 'new\nline.mp4', 'per%03dcent.mp4', "quo'te\".mp4", 'concat:x.mp4',
                                  'http:', 'ünï.mp4', '-i.mp4', '#?&.mp4', b'bytes\xff\xfe.mp4'])
def test_names(name, tmp_path):
    src = encode(tmp_path/'a.mp4')
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name)))
    try: shutil.copy(src, path)
    except OSError: pytest.skip('this file system refuses the name')
    true = sequential(src)
    for decoder in ('auto', 'pyav'):
        assert np.array_equal(read_frames(path, [7, 3], decoder=decoder), [true[7], true[3]])
    assert np.array_equal(read_frames(path, [7], contained=True), [true[7]])
    link = tmp_path/'link.mp4'
    link.symlink_to(path)
    assert index_video(link).n == 40
    with pytest.raises(VideoError): index_video(path + '.none')


def test_limits(tmp_path, monkeypatch):
    path = encode(tmp_path/'a.mp4')
    monkeypatch.setattr(LIMITS, 'output', 3*W*H*3)
    assert len(read_frames(path, [0, 1, 2])) == 3
    with pytest.raises(VideoError, match='LIMITS.output'): read_frames(path, [0, 1, 2, 3])
    assert len(read_frames(path, range(12), size=(60, 80))) == 12


def test_cache_follows_the_file(tmp_path):
    path = Path(encode(tmp_path/'a.mp4', n=20))
    ix = index_video(path)
    encode(path, n=30)
    os.utime(path, ns=(1, ix.mtime + 10**9))
    assert index_video(path).n == 30
    with pytest.raises(VideoError, match='changed'): read_frames(ix, [0])
    I._recent.clear()
    t = time.time(); again = index_video(path)
    assert again.n == 30 and time.time() - t < .2 and np.array_equal(again.pts, index_video(path, cache=False).pts)
    name = _cache_name(str(path), *_stat(path)[:2])
    name.write_bytes(name.read_bytes()[:50]); I._recent.clear()                            # a torn record is made again
    assert index_video(path).n == 30


@pytest.fixture
def changed_library(tmp_path, monkeypatch):
    "The child finds a PyAV whose interface is another one"
    (tmp_path/'lib'/'av').mkdir(parents=True)
    (tmp_path/'lib'/'av'/'__init__.py').write_text('class FFmpegError(Exception): pass\nclass logging: set_level = print\n')
    with monkeypatch.context() as m:
        m.syspath_prepend(str(tmp_path/'lib')); _child().kill()
        yield
    _child().kill()


def test_a_fault_of_the_reader_is_no_verdict(tmp_path, changed_library, monkeypatch):
    "An AttributeError says nothing about the file: another kind of error, nothing remembered, a training does not begin"
    from vidlab.data.annots import Manifest
    from vidlab.data.clips import Clips
    from vidlab.data.sample import make_sampler
    path = encode(tmp_path/'a.mp4')
    for _ in range(2):
        with pytest.raises(ReaderError, match="a.mp4.*says nothing about the file: AttributeError: module 'av' has no attribute 'open'"): index_video(path)
    assert os.path.abspath(path) not in I._recent and not _cache_name(path, *_stat(path)[:2]).exists()
    row, = audit([path], workers=1)
    assert row['verdict'] == 'unknown' and 'AttributeError' in row['reasons'][0]
    (tmp_path/'m.csv').write_text('path,text\na.mp4,a clip\n')
    ds = Clips(Manifest.read(tmp_path/'m.csv'), make_sampler('segment', frames=2), train=True)
    with pytest.raises(ReaderError, match='1 of 1 files could not be looked at.*AttributeError'): ds.check(workers=1)
    sys.path.remove(str(tmp_path/'lib')); _child().kill()
    assert index_video(path).n == 40


def test_verdicts_are_of_one_version(tmp_path, monkeypatch):
    "Another PyAV or FFmpeg may see other frames: every verdict is asked for again"
    good, bad, asked = encode(tmp_path/'a.mp4'), tmp_path/'b.mp4', []
    bad.write_text('x'*100)
    make = I._make_record
    monkeypatch.setattr(I, '_make_record', lambda path, *a: asked.append(os.path.basename(path)) or make(path, *a))
    def look():
        for p in (good, bad):
            try: index_video(p)
            except VideoError: pass
    look(); look(); I._recent.clear(); look()
    assert asked == ['a.mp4', 'b.mp4']
    monkeypatch.setattr(F, '_versions', lambda: ('99.0',)); I._recent.clear(); look()
    assert asked == ['a.mp4', 'b.mp4', 'a.mp4', 'b.mp4']


@given(b=st.binary(min_size=1, max_size=60), lead=st.sampled_from([0, 1, 2, 4]))
def test_packets_of_any_bytes(b, lead):
    "Whatever a damaged packet holds, looking into it is no error"
    for data in (b, b'\0\0\1' + b, b + b'\0\0\1', len(b).to_bytes(4, 'big') + b):
        for look in LOOK.values(): assert len(look(data, lead)) == 4


def test_arguments(tmp_path):
    path = encode(tmp_path/'a.mp4')
    for bad in ([40], [-1], [[1]], [.5], 'ab'):
        with pytest.raises(ValueError): read_frames(path, bad)
    for kw in (dict(decoder='dcord'), dict(missing='skip'), dict(size=(0, 3)), dict(size=5*(1,))):
        with pytest.raises(ValueError): read_frames(path, [0], **kw)
    with pytest.raises(ValueError, match='own clock'): index_video(path, fps=3)
    assert read_frames(path, []).shape == (0, H, W, 3)


def test_cover_and_several_streams(tmp_path):
    "Cover pictures do not count, and of several videos the first is meant"
    path, (a, b) = tmp_path/'two.mp4', (encode(tmp_path/'a.mp4'), encode(tmp_path/'b.mp4', w=320, h=240))
    with av.open(a) as i, av.open(b) as j, av.open(str(path), 'w') as o:
        pairs = [(c, template(o, c.streams.video[0])) for c in (i, j)]
        for c, s in pairs:
            for p in c.demux(video=0):
                if p.dts is not None: p.stream = s; o.mux(p)
    ix = index_video(path)
    assert (ix.streams, ix.width, ix.n) == (2, W, 40) and '2 video streams' in ix.decoders['decord']
    assert np.array_equal(read_frames(path, [11]), [sequential(a)[11]])


def test_folder(tmp_path):
    from PIL import Image
    true = sequential(encode(tmp_path/'a.mp4', n=12))
    (tmp_path/'pics').mkdir()
    for i, x in enumerate(true): Image.fromarray(x).save(tmp_path/'pics'/f'f{i}.png')
    ix = index_video(tmp_path/'pics', fps=4)
    assert ix.files[2] == 'f2.png' and ix.files[10] == 'f10.png' and ix.times[4] == 1 and ix.fps == 4
    assert np.array_equal(read_frames(ix, [11, 2, 2]), [true[11], true[2], true[2]])
    assert read_frames(tmp_path/'pics', [0], size=(30, 40)).shape == (1, 30, 40, 3)
    (tmp_path/'pics'/'f5.png').write_bytes(b'no picture')
    with pytest.raises(VideoError) as e: read_frames(tmp_path/'pics', [4, 5])
    assert e.value.frame == 5 and 'f5.png' in str(e.value)
    with pytest.warns(VideoWarning, match='stand in'):
        assert np.array_equal(read_frames(tmp_path/'pics', [4, 5], missing='nearest'), [true[4], true[4]])
    with pytest.raises(VideoError): index_video(tmp_path/'pics', deep=True)


@pytest.fixture
def misbehaving(tmp_path, monkeypatch):
    "Decoders that sleep, spin, crash and lie"
    (tmp_path/'misbehaving.py').write_text('''
import os, time, numpy as np
from vidlab.data.decode import register_decoder
class Base:
    def refuses(self, ix): return None
@register_decoder('sleeps')
class Sleeps(Base):
    def read(self, ix, idx, size): time.sleep(1000)
@register_decoder('crashes')
class Crashes(Base):
    def read(self, ix, idx, size): os.abort()
@register_decoder('eats')
class Eats(Base):
    def read(self, ix, idx, size): return np.ones((60, 1 << 28), np.uint8)
@register_decoder('lies')
class Lies(Base):
    def read(self, ix, idx, size): return np.zeros((1, 2, 2, 3), np.uint8)
''')
    monkeypatch.syspath_prepend(str(tmp_path))
    import misbehaving
    yield
    for k in ('sleeps', 'crashes', 'eats', 'lies'): D._decoders.pop(k, None)
    sys.modules.pop('misbehaving', None)


def test_contained(tmp_path, misbehaving):
    "A reader that hangs, dies or takes all memory costs its own process; ours gets an error with the file name"
    path = encode(tmp_path/'a.mp4')
    ix = index_video(path)
    # the next one is told about the new folder
    _child().kill()
    for decoder, why in (('sleeps', 'killed'), ('crashes', 'died'), ('eats', 'LIMITS.memory'), ('lies', 'gave')):
        t = time.time()
        with pytest.raises(VideoError, match=why) as e:
            read_frames(ix, list(range(4)), decoder=decoder, contained=True, timeout=1.5)
        assert e.value.path == path and time.time() - t < 12
    assert np.array_equal(read_frames(ix, [5, 1], contained=True), read_frames(ix, [5, 1]))


class Stuck:
    "Hangs on its second item"
    def __init__(self, slots): self.slots = slots
    def __len__(self): return 2
    def __getitem__(self, i):
        with self.slots.using(f'video{i}.mp4'):
            if i: time.sleep(100)
            return i


def test_slots_name_the_hung_file(tmp_path):
    import torch.utils.data as tud
    from vidlab.data.clips import fork_server
    slots = DecodeSlots(1)
    loader = tud.DataLoader(Stuck(slots), num_workers=1, timeout=30, batch_size=1, multiprocessing_context=fork_server())
    batches = iter(loader)
    next(batches)
    batches._timeout = 2                                            # the first one may have to wait for imports
    with pytest.raises(RuntimeError, match='timed out'): next(batches)
    assert slots.paths() == ['video1.mp4'] and slots.busy()[0]['seconds'] > 1
    assert pickle.loads(pickle.dumps(slots)).paths() == ['video1.mp4']
    file = slots.file
    del slots, loader, batches
    import gc; gc.collect()
    assert not os.path.exists(file)


def test_audit(tmp_path):
    good, bad, rows = encode(tmp_path/'a.mp4'), tmp_path/'b.mp4', []
    bad.write_text('x')
    got = audit([good, bad, tmp_path/'none'], workers=2, each=rows.append)
    assert [r['verdict'] for r in got] == ['ok', 'bad',
                                           'bad'] and got[0]['n'] == 40 and len(rows) == 3 and all(r['reasons']
                                                                                                   for r in got[1:])
    assert audit([good], deep=True)[0]['how'] == 'decode'


MEDIA = Path(os.environ.get('VIDLAB_MEDIA') or '/nonexistent')

def _rows(kind):
    file = MEDIA/kind/'index.csv'
    if not file.exists(): return [pytest.param(None, marks=pytest.mark.skip(reason='VIDLAB_MEDIA is not set'))]
    with open(file, encoding='utf-8') as f: return [pytest.param(r, id=r['file']) for r in csv.DictReader(f)]


@pytest.mark.parametrize('row', _rows('real'))
def test_real(row):
    path = str(MEDIA/'real'/row['file'])
    ix = index_video(path)
    true = sequential(path)
    assert ix.n == len(true) == int(row['frames']) and ix.fps == pytest.approx(float(row['fps']), rel=1e-3)
    rng = np.random.default_rng(0)
    for name, why in ix.decoders.items():
        for idx in (rng.integers(0, ix.n, 10), [ix.n-1], [ix.n-1, 0, 0]):
            if why is None: assert np.array_equal(read_frames(ix, list(idx), decoder=name), [true[i] for i in idx])


@pytest.mark.parametrize('row', _rows('bad'))
def test_bad_media(row):
    path, expect = str(MEDIA/'bad'/row['file']), row['expect']
    t = time.time()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            ix = index_video(path)
            got = read_frames(ix, [0, ix.n//2, ix.n-1])
        except VideoError as e:
            assert os.path.basename(path) in str(e)
            assert 'rror' in expect or 'raise' in expect or 'refuse' in expect, str(e)
            return
        finally: assert time.time() - t < 20
        assert not expect.startswith('raise one clear error'), f'{ix.n} frames'
        assert got.shape == (3, ix.height, ix.width, 3)
        true = sequential(path) if 'cover' not in row['file'] else None
        if true is not None: assert ix.n == len(true)
        if row['frames_ffmpeg'] and not expect.startswith('tolerate'): assert ix.n == int(row['frames_ffmpeg'])
        if row['kind'] == 'bad' and ix.n < 112: assert ix.verdict == 'warn'


def test_pictures_of_flow_are_no_frames(tmp_path):
    from PIL import Image
    from vidlab.data.files import _pictures_in
    for n in ('img_00001.jpg', 'img_00002.jpg', 'flow_x_00001.jpg', 'flow_y_00001.jpg', 'flower1.jpg'): Image.new('RGB', (8, 8)).save(tmp_path/n)
    assert _pictures_in(tmp_path) == ['flower1.jpg', 'img_00001.jpg', 'img_00002.jpg']
    for n in ('img_00001.jpg', 'img_00002.jpg', 'flower1.jpg'): (tmp_path/n).unlink()
    with pytest.raises(VideoError, match='optical flow alone'): _pictures_in(tmp_path)


def test_the_folder_may_change(tmp_path, monkeypatch):
    "A relative path is one of the current folder, also after the process that reads has been started in another"
    for name, i in (('a', 0), ('b', 1)):
        (tmp_path/name).mkdir()
        shapes.encode(tmp_path/name/'clip.mp4', shapes.clip_item(i, shapes.rng(0, i))[0])
    for name in ('a', 'b', 'a'):
        monkeypatch.chdir(tmp_path/name)
        here = read_frames(index_video('clip.mp4'), [0, 5], contained=True)
        assert np.array_equal(here, read_frames(index_video(tmp_path/name/'clip.mp4'), [0, 5]))


def test_a_graph_serves_the_next_clip_too(tmp_path, monkeypatch):
    "It is built once for all files of a kind; a frame that was interrupted on its way does not come out in place of the next"
    built, whole = [], D._to_rgb
    class Graph:
        def __init__(self, *a): self.inner, self.stops = whole(*a), False; built.append(self)
        def pull(self): return self.inner.pull()
        def push(self, f):
            self.inner.push(f)
            if self.stops: raise KeyboardInterrupt
    ixs = [index_video(encode(tmp_path/f'{n}.mp4', n=n)) for n in (6, 12, 18)]
    want = [read_frames(ix, [1, 5], 'pyav', size=(32, 32)) for ix in ixs]
    monkeypatch.setattr(D, '_to_rgb', Graph)
    monkeypatch.setattr(D, '_graphs', D._Graphs())
    def same(): return all((read_frames(ix, [1, 5], 'pyav', size=(32, 32)) == w).all() for ix, w in zip(ixs, want))
    assert same() and len(built) == 1
    built[0].stops = True
    with pytest.raises(KeyboardInterrupt): read_frames(ixs[0], [3], 'pyav', size=(32, 32))
    assert same() and len(built) == 2
