"Files that mean harm, and trouble around files: nothing of theirs is run, nothing hangs, nothing eats the memory, and a verdict is of the bytes alone."
import contextlib, errno, io, os, pickle, resource, socket, subprocess, sys, tarfile, time, zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip('av')
from conftest import encode
from vidlab.data import files as F, index as I
from vidlab.data.child import DecodeSlots, _child
from vidlab.data.decode import audit, read_frames
from vidlab.data.files import LIMITS, ReaderError, VideoError, _cache_name, _stat
from vidlab.data.index import index_video


@pytest.fixture(autouse=True)
def own(cache):
    I._recent.clear()
    yield
    I._recent.clear()


@contextlib.contextmanager
def soon(seconds=10):
    "What would block for ever must answer at once"
    import signal
    def late(*_): raise TimeoutError('blocked')
    was = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)


class Hostile:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.mkdir, (str(self.file),)


def script(folder, code): # the class as a file: TorchScript wants its source
    (folder/'hostile_module.py').write_text('import torch\nfrom torch import nn\n' + code)
    sys.path.insert(0, str(folder))
    try: return __import__('hostile_module')
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop('hostile_module', None)


@pytest.mark.filterwarnings('ignore')
def test_torchscript_runs_nothing(tmp_path):
    "PyTorch's loader runs the program of an archive; ours reads tensors, of an archive whose state is plain, and refuses the others"
    import torch
    from vidlab.ckpt import WeightsError, read_weights
    mark = tmp_path/'mark'
    m = script(tmp_path, '''class Bad(nn.Module):
    def __init__(self, file):
        super().__init__()
        self.w, self.file = nn.Parameter(torch.ones(2)), file
    @torch.jit.export
    def __getstate__(self): return (self.w, self.file, self.training)
    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.file, self.training = state[1], state[2]
        self.w = torch.from_file(self.file, True, 2)
    def forward(self, x): return x + self.w
class Sub(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w, self.mask = w, torch.ones(3)
        self.register_buffer('b', torch.arange(3))
    def forward(self, x): return x @ self.w + self.mask
class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Sub(nn.Parameter(torch.randn(3, 3).half()))
        self.tied, self.layers, self.names = Sub(self.a.w), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), ['x']
    def forward(self, x): return self.a(x)
''')
    torch.jit.script(m.Bad(str(mark))).save(str(tmp_path/'bad.pt'))
    with pytest.raises(WeightsError, match='bad.pt.*only its own code can read'): read_weights(tmp_path/'bad.pt')
    assert not mark.exists()
    torch.jit.load(tmp_path/'bad.pt')
    assert mark.exists()                                        # that is what must not happen
    torch.jit.script(m.Good()).save(str(tmp_path/'good.pt'))
    got, want = read_weights(tmp_path/'good.pt'), torch.jit.load(tmp_path/'good.pt').state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)


def test_archives_that_lie(tmp_path):
    "A tensor larger than its storage, a storage larger than its member, a member that unfolds, a module that holds itself, a call of a real function"
    from vidlab.ckpt import WeightsError, read_weights
    def archive(name, body, members={'data/0': bytes(8)}, how=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path/name, 'w') as z:
            z.writestr('m/data.pkl', b'\x80\x02' + body + b'.')
            z.writestr('m/constants.pkl', b'\x80\x02).')
            for k, v in members.items(): z.writestr(f'm/{k}', v, how)
        return tmp_path/name
    module = lambda state: b'c__torch__\nM\n)\x81' + state + b'b'
    def tensor(n=2, size=b'K\x02\x85', stride=b'K\x01\x85'):
        where = b'(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0' + b'0X\x03\0\0\0cpuK' + bytes([n]) + b'tQ'
        return b'}X\x01\0\0\0w' + b'ctorch._utils\n_rebuild_tensor_v2\n(' + where + b'K\0' + size + stride + b'\x89}tRs'
    assert read_weights(archive('ok.pt', module(tensor())))['w'].tolist() == [0, 0]
    huge = b'\x8a\x05\0\0\0\0\x10\x85'                            # a size of 2**36
    for name, body, more in (('large', module(tensor(size=huge, stride=b'K\0\x85')), {}), ('short', module(tensor(n=9)), {}),
                             ('packed', module(tensor(n=200)), dict(members={'data/0': bytes(800)}, how=zipfile.ZIP_DEFLATED)),
                             ('self', b'c__torch__\nM\n)\x81q\0}X\x01\0\0\0ah\0sb', {}),
                             ('call', b'cos\nsystem\nX\x05\0\0\0mkdir\x85R', {}), ('none', module(b'}'), {})):
        with pytest.raises(WeightsError, match=f'{name}.pt'): read_weights(archive(f'{name}.pt', body, **more))


def test_pickles_run_nothing(tmp_path):
    import torch
    from vidlab.ckpt import WeightsError, read_weights
    from vidlab.data.tables import load_plain_pickle
    mark = tmp_path/'mark'
    torch.save(dict(model=dict(w=torch.ones(1)), x=Hostile(mark)), tmp_path/'w.pt')
    (tmp_path/'raw.pkl').write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(WeightsError, match='mkdir'): read_weights(tmp_path/'w.pt')
    with pytest.raises(ValueError, match='mkdir'): load_plain_pickle(tmp_path/'raw.pkl')
    assert not mark.exists()


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'clip/000.jpg', 'clip/000.webp'])
def test_no_picture_starts_a_program(name, tmp_path, monkeypatch):
    "PostScript under the name of a picture: Pillow would start Ghostscript"
    file = tmp_path/name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n')
    started = []
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: started.append(a) or 1/0)
    monkeypatch.setattr(os, 'system', started.append)
    path = file if file.parent == tmp_path else file.parent
    with pytest.raises(VideoError, match='cannot identify'): index_video(path)
    assert not started


@pytest.mark.parametrize('kind', ['fifo', 'socket', 'device', 'link'])
def test_nothing_blocks(kind, tmp_path):
    "A pipe, a socket, a device or a link to one: as picture, in a folder, its clock, as video, as tar, among videos"
    def make(p):
        p.parent.mkdir(exist_ok=True)
        if kind == 'fifo': os.mkfifo(p)
        elif kind == 'socket':
            with contextlib.chdir(p.parent) if hasattr(contextlib, 'chdir') else contextlib.nullcontext(): socket.socket(socket.AF_UNIX).bind(p.name)
        elif kind == 'device': p.symlink_to('/dev/zero')
        else:
            os.mkfifo(tmp_path/f'{p.name}.pipe')
            p.symlink_to(tmp_path/f'{p.name}.pipe')
        return p
    if kind == 'socket' and not hasattr(contextlib, 'chdir'): pytest.skip('needs short names')
    for p in ('a.jpg', 'a.mp4', 'clip/000.jpg', 'b.tar'): make(tmp_path/p)
    Image.new('RGB', (8, 8)).save(tmp_path/'clip/001.jpg')
    (tmp_path/'timed').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'timed/001.jpg')
    make(tmp_path/'timed/clock.json')
    with soon():
        for p in ('a.jpg', 'a.mp4', 'clip', 'timed', 'b.tar::x.mp4'):
            with pytest.raises(VideoError, match='not a regular file'): index_video(tmp_path/p)
        assert not F.holds_member(tmp_path/'b.tar::x.mp4')
        from vidlab.data.shards import from_shards
        with pytest.raises(ValueError, match='not a regular file'): from_shards(tmp_path/'b.tar', caption=None, timeout=8)


def test_a_number_is_no_memory(tmp_path):
    "One label of two thousand million is an error that names its row, at once"
    from vidlab.data.annots import Manifest
    for label in ('2000000000', '99999999999999999999999', '1e400', '3 2000000000', '-1'):
        (tmp_path/'m.csv').write_text(f'path,label\na.mp4,0\nb.mp4,{label}\n')
        with soon(), pytest.raises(ValueError, match="row 2, column 'label'"):
            Manifest.read(tmp_path/'m.csv', missing='keep', label='several' if ' ' in label else 'class')
    from vidlab.data.tables import class_list
    with soon(), pytest.raises(ValueError, match='classes=2000000000'): class_list('2000000000')


def test_members_are_no_way_out(tmp_path):
    "Names of members are keys, whatever they look like; links within a tar lead nowhere"
    from vidlab.data.shards import from_shards
    from vidlab.data.manifest import inside_root
    (tmp_path/'in').mkdir()
    inner, loose = encode(tmp_path/'inner.mp4', n=5), encode(tmp_path/'loose.mp4', n=9)
    names = ['../loose.mp4', 'x/../../loose.mp4', str(loose), './y.mp4', 'x//z.mp4']
    with tarfile.open(tmp_path/'in/a.tar', 'w') as t:
        for i, n in enumerate(names):
            o = tarfile.TarInfo(n)
            o.size, o.mtime = inner.stat().st_size, int(loose.stat().st_mtime)
            with open(inner, 'rb') as f: t.addfile(o, f)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            o = tarfile.TarInfo(f'link{kind[0]}.mp4')
            o.type, o.linkname = kind, str(loose)
            t.addfile(o)
    for n in names:
        path = f'{tmp_path}/in/a.tar::{n}'
        assert index_video(path).n == 5 and inside_root(f'in/a.tar::{n}', tmp_path) == f'in/a.tar::{n}'
        assert F.full_path(path) == path and len(read_frames(path, [4])) == 1
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE): assert not F.holds_member(f'{tmp_path}/in/a.tar::link{kind[0]}.mp4')
    assert inside_root('../a.tar::x.mp4', tmp_path) is None
    m = from_shards(tmp_path/'in/a.tar', caption=None, missing='drop', missing_limit=1.)
    assert {index_video(m.row(i)['path']).n for i in range(len(m))} == {5} and len(m) >= 4


def test_bombs(tmp_path, monkeypatch):
    "Pictures of a thousand million pixels in a few bytes are refused by number, before memory is taken"
    import struct, zlib
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    head = struct.pack('>IIBBBBB', 40000, 40000, 8, 2, 0, 0, 0)
    (tmp_path/'b.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(9))) + chunk(b'IEND', b''))
    with soon(), pytest.raises(VideoError, match='pixels'): index_video(tmp_path/'b.png')
    small = encode(tmp_path/'a.mp4', n=3)
    monkeypatch.setattr(LIMITS, 'pixels', 160*120 - 1)
    with pytest.raises(VideoError, match='LIMITS.pixels'): index_video(small)


def kept(path): return _cache_name(str(path), *_stat(str(path))[:2]).exists()


def fails_once(path, why, error, then=6):
    "The real cause, nothing remembered: when the trouble is over the file is as good as ever"
    with pytest.raises(error, match=why) as e: index_video(path)
    assert str(path) in str(e.value) and not kept(path) and os.path.abspath(path) not in I._recent
    return e.value


@pytest.fixture
def child():
    _child().kill()
    yield _child()
    _child().kill()


def test_no_process_no_verdict(tmp_path, child):
    "No file handle left for a child, none left in it, a child that the system kills: of this process, and the run stops"
    a = encode(tmp_path/'a.mp4', n=6)
    _stat(str(a)), kept(a)                                        # what is imported on the way
    was = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, was[1]))
    try: fails_once(a, 'Too many open files.*ulimit -n.*nothing about the file', ReaderError)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, was)
    assert index_video(a).n == 6
    b, c = (encode(tmp_path/f'{n}.mp4', n=6) for n in 'bc')
    resource.prlimit(child.proc.pid, resource.RLIMIT_NOFILE, (3, was[1]))
    fails_once(b, 'Too many open files', ReaderError)
    child.kill()
    row, = audit([b], workers=1, cache=False)
    assert row['verdict'] == 'ok'                                 # by the next child
    child.kill()
    child.start()
    child.out.poll(20), child.out.recv()
    os.kill(child.proc.pid, 19)                                   # stopped, so that the kill comes first
    import threading
    threading.Timer(.3, child.proc.kill).start()
    fails_once(c, 'killed from outside.*memory runs out', ReaderError)
    assert index_video(c).n == 6


@pytest.mark.parametrize('when', ['open', 'bytes', 'warn'])
def test_a_disk_that_fails_is_no_bad_file(when, tmp_path, monkeypatch):
    "Errors of reading while the file is opened, while its packets are read, and behind a file that only seems to be damaged"
    from types import SimpleNamespace
    a = encode(tmp_path/'a.mp4', n=6)
    here = SimpleNamespace(call=lambda name, *args, **kw: getattr(I, name.split(':')[1])(*args))
    monkeypatch.setattr(I, '_child', lambda: here)
    def broken(*args, **kw): raise OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as m:
        if when == 'open': m.setattr(I, '_open', broken)
        elif when == 'bytes': m.setattr(I, '_scan', lambda *x: 1/0 if False else (_ for _ in ()).throw(av.error.InvalidDataError(1094995529, 'Invalid data')))
        else: m.setattr(I, '_reasons', lambda *x: ['damaged: 5 frames decode of 6 promised'])
        m.setattr(F, 'open', broken, raising=False)
        e = fails_once(a, 'cannot read: Input/output error; this says nothing', VideoError)
        assert e.stage == 'read'
    assert index_video(a).n == 6 and kept(a)
    with monkeypatch.context() as m:
        m.setattr(F, 'open', broken, raising=False)
        m.setattr('vidlab.data.decode._open', broken)
        with pytest.raises(VideoError, match='cannot read: Input/output error'): read_frames(a, [0])


def test_a_picture_on_a_disk_that_fails(tmp_path, monkeypatch):
    a = tmp_path/'clip/a.png'
    a.parent.mkdir()
    Image.new('RGB', (8, 8)).save(a)
    def broken(*args, **kw): raise OSError(errno.EIO, os.strerror(errno.EIO))
    for path in (a, a.parent):
        with monkeypatch.context() as m:
            m.setattr(Image, 'open', broken)
            with pytest.raises(VideoError, match='Input/output error; this says nothing'): index_video(path)
        assert index_video(path).n == 1


def test_no_memory_is_no_verdict(tmp_path, monkeypatch):
    from types import SimpleNamespace
    from vidlab.data import decode as D
    a = encode(tmp_path/'a.mp4', n=6)
    def none(*args): raise MemoryError
    with monkeypatch.context() as m:
        m.setattr(I, '_scan', none)
        m.setattr(I, '_child', lambda: SimpleNamespace(call=lambda name, *x, **kw: I._index_file(*x)))
        with pytest.raises(MemoryError): index_video(a)            # which the child reports as its limit
        assert not kept(a)
    ix = index_video(a)
    monkeypatch.setattr(D.PyAV, 'fill', none)
    with pytest.raises(ReaderError, match='Cannot allocate memory.*smaller batches'): read_frames(ix, [0])


@pytest.mark.parametrize('how', ['a file in the way', 'homeless', 'read-only', 'full'])
def test_a_cache_is_an_aid(how, tmp_path, monkeypatch):
    "Wherever the cache cannot be, the same videos are used; it is said once"
    import warnings
    from vidlab import core
    from vidlab.data.annots import Manifest
    from vidlab.data.clips import Clips
    from vidlab.data.sample import make_sampler
    for i in range(4): encode(tmp_path/f'v/{i}.mp4', n=6)
    (tmp_path/'v/m.csv').write_text('path,text\n' + ''.join(f'{i}.mp4,clip\n' for i in range(4)))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'tmp')); (tmp_path/'tmp').mkdir()
    monkeypatch.setenv('VIDLAB_CACHE_SAID', '')
    real = os.access
    if how == 'a file in the way': (tmp_path/'cache').write_text('')
    elif how == 'read-only': monkeypatch.setattr(os, 'access', lambda p, m, **k: real(p, m, **k) and not str(p).startswith(str(tmp_path/'cache')))
    elif how == 'homeless':
        monkeypatch.delenv('VIDLAB_CACHE')
        monkeypatch.setattr(Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('Could not determine home directory.')))
    else:
        def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, 'fsync', full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        ds = Clips(Manifest.read(tmp_path/'v/m.csv'), make_sampler('segment', frames=2), 32, train=True)
        assert ds.check(workers=1) == {} and len(ds) == 4 and ds[0]['video'].shape == (2, 3, 32, 32)
        I._recent.clear()
        assert index_video(tmp_path/'v/0.mp4').n == 6
    told = [str(w.message) for w in said if 'cache' in str(w.message)]
    assert len(told) == 1, told
    if how == 'homeless': assert core.tilde('/x/y') == '/x/y'


def test_slots_find_their_room(monkeypatch):
    "Shared memory without room would end a worker; the slots take their room at once, or another place"
    real, asked = os.posix_fallocate, []
    def full(fd, at, n):
        asked.append(os.readlink(f'/proc/self/fd/{fd}'))
        if asked[-1].startswith('/dev/shm'): raise OSError(errno.ENOSPC, 'No space left on device')
        return real(fd, at, n)
    monkeypatch.setattr(os, 'posix_fallocate', full)
    slots = DecodeSlots(2)
    with slots.using('a.mp4', 1): assert slots.paths() == ['a.mp4']
    assert not slots.file.startswith('/dev/shm') and not (asked[0].startswith('/dev/shm') and os.path.exists(asked[0]))


def test_too_many_open_files_are_named():
    "In the workers or on the way from them: no video is blamed"
    from types import SimpleNamespace
    from vidlab.data.clips import Loader
    closed = []
    loader = SimpleNamespace(workers=2, close=lambda **k: closed.append(1))
    for e in (OSError(errno.EMFILE, 'Too many open files'), RuntimeError('received 0 items of ancdata')):
        said = str(Loader.blame(loader, e))
        assert 'ulimit -n' in said and 'too many open files' in said and closed
    assert Loader.blame(loader, ValueError('x')) is None


@pytest.mark.parametrize('n', [3, 12])
def test_a_closed_folder_is_told(n, tmp_path, monkeypatch):
    "Videos in a folder that cannot be looked into are not simply missing"
    from vidlab.data.manifest import absent
    real = os.scandir
    def closed(p='.'):
        if str(p).endswith('locked'): raise PermissionError(errno.EACCES, 'Permission denied', str(p))
        return real(p)
    monkeypatch.setattr(os, 'scandir', closed)
    (tmp_path/'locked').mkdir()
    paths = [f'locked/{i}.mp4' for i in range(n)]
    with pytest.warns(UserWarning, match='locked: Permission denied: what lies below counts as missing'): assert absent(paths, tmp_path) == paths
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert absent([f'none/{i}.mp4' for i in range(n)], tmp_path)
