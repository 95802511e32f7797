"""Shards in a bucket or on a web server: the same rows, order and pixels as the folder; what fails is tried again, then counted; a bounded folder for all processes."""
import os, re, shutil, signal, subprocess, sys, threading, time
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('av')
pytest.importorskip('aiohttp')
from conftest import HERE, encode
from vidlab.core import rng
from vidlab.data import files, remote
from vidlab.data.child import _child
from vidlab.data.clips import Clips, Loader, TooManyUnread
from vidlab.data.files import VideoError, read_member
from vidlab.data.manifest import Manifest
from vidlab.data.remote import RemoteError, copy_of, kept_files, range_handler, serve_folder
from vidlab.data.sample import SegmentSampler
from vidlab.data.shards import WindowOrder, from_shards, shard_of, window_order


@pytest.fixture(autouse=True, scope='module')
def _cache(tmp_path_factory):
    "A cache of our own, which the child knows from its start, and no long pauses"
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('VIDLAB_CACHE', str(tmp_path_factory.mktemp('cache')))
        mp.delenv('VIDLAB_REMOTE_GIB', raising=False)
        mp.setattr(remote, 'PAUSE', .01)
        yield
        _child().kill()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Twelve clips in three shards, as `make_shards` packs them"
    from data_tools.make_shards import make_shards
    d = tmp_path_factory.mktemp('clips')
    for i in range(12): encode(d/f'{i}.mp4', 10, 48, 32, light=lambda t: (20*i + 5*t) % 256)
    Manifest.build(dict(path=[f'{i}.mp4' for i in range(12)], text=[f'clip {i}' for i in range(12)], label=[i % 3 for i in range(12)], split=['train']*8 + ['test']*4), d).write(d/'m.csv')
    make_shards(str(d/'m.csv'), str(d/'set'), samples=4)
    return d/'set'


class Trouble:
    "What a server does wrong: `fail(path, headers)` -> None or the code it answers with; 'half': half of the body, then the end"
    def __init__(self): self.fail, self.asked = lambda path, headers: None, []

    def handler(trouble):
        class Handler(range_handler()):
            def do_GET(self):
                trouble.asked.append((self.path, self.headers.get('Range')))
                self.wrong = trouble.fail(self.path, self.headers)
                if isinstance(self.wrong, int): return self.send_error(self.wrong)
                super().do_GET()

            def copyfile(self, source, out):
                if self.wrong != 'half' or self.left is None: return super().copyfile(source, out)
                out.write(source.read(self.left//2))
                self.close_connection = True
        return Handler


@pytest.fixture
def trouble(): return Trouble()

@pytest.fixture
def http(folder, trouble):
    with serve_folder(folder, trouble.handler()) as url: yield url


@pytest.fixture(scope='module')
def bucket(folder):
    "The folder in a bucket of a server that speaks S3"
    pytest.importorskip('s3fs')
    server, boto3 = pytest.importorskip('moto.server').ThreadedMotoServer('127.0.0.1', 0, verbose=False), pytest.importorskip('boto3')
    with pytest.MonkeyPatch.context() as mp:
        server.start()
        said = dict(AWS_ACCESS_KEY_ID='x', AWS_SECRET_ACCESS_KEY='x', AWS_DEFAULT_REGION='us-east-1', AWS_ENDPOINT_URL=f'http://127.0.0.1:{server.get_host_and_port()[1]}')
        for k, v in said.items(): mp.setenv(k, v)
        s3 = boto3.client('s3')
        s3.create_bucket(Bucket='videos')
        for f in sorted(folder.iterdir()): s3.upload_file(str(f), 'videos', f'set/{f.name}')
        yield 's3://videos/set'
        server.stop()


COLUMNS = dict(label='json.label', split='json.split')

def rows(where, **kw): return from_shards(where, columns=COLUMNS, **kw)

def loader(m, workers=0, rank=0, world=1, window=2, **kw):
    ds = Clips(m, SegmentSampler(3), size=16, train=True, seed=2, augment='rrc')
    return Loader(ds, 4, workers, True, True, 5, rank, world, permute=WindowOrder(shard_of(m), window), timeout=100, **kw)

def batches(dl, start=0):
    try: return list(dl.epoch(1, start))
    finally: dl.close()

def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x['caption'] == y['caption'] and (x['video'] == y['video']).all() and (x['sid'] == y['sid']).all()


# --------------------------------------------------------------------------------------------------- the same as the folder

@pytest.mark.parametrize('where,workers', [('http', 0), ('bucket', 0), pytest.param('bucket', 2, marks=pytest.mark.slow), pytest.param('http', 2, marks=pytest.mark.long)])
def test_order_pixels_and_resume_are_those_of_the_folder(folder, request, where, workers):
    "Rows, an epoch, the same epoch from its second batch on, and the parts of two ranks"
    m, local = rows(request.getfixturevalue(where)), rows(folder)
    assert m.hash() == local.hash() and all(m.column(k).equals(local.column(k)) for k in ('path', 'text')) and str(m.root) != str(local.root)
    whole = batches(loader(local))
    dl = loader(m, workers)
    try:
        assert_same(list(dl.epoch(1)), whole)
        assert_same(list(dl.epoch(1, start=1)), whole[1:])
    finally: dl.close()
    if workers: return
    halves = [batches(loader(m, rank=r, world=2)) for r in (0, 1)]
    assert_same(halves[1], batches(loader(local, rank=1, world=2)))
    assert [s for a, b in zip(*halves) for x in (a, b) for s in x['sid'].tolist()] == [s for b in whole for s in b['sid'].tolist()]


def test_shards_without_tables_are_indexed_by_their_headers(folder, tmp_path, trouble):
    "As video2dataset leaves them; fields that a table lacks; a table of another shard is not believed"
    bare = tmp_path/'bare'; bare.mkdir()
    for f in folder.glob('*.tar'): shutil.copy(f, bare)
    with serve_folder(bare, trouble.handler()) as url:
        m = rows(url)
        assert m.hash() == rows(folder).hash() and m.root == url
        assert read_member(m.row(5)['path']) == read_member(rows(folder).row(5)['path'])
        n = len(trouble.asked)
        assert rows(url).hash() == m.hash() and not [o for o in trouble.asked[n:] if o[1]]           # known: no byte is read
        assert from_shards(f'{url}/{{00000..00001}}.tar').column('text').to_pylist() == [f'clip {i}' for i in map(int, re.findall(r'clip (\d+)', str(m.column('text').to_pylist())))][:8]
        shutil.copy(folder/'00001.parquet', bare/'00000.parquet')
        (bare/'00000.tar').write_bytes((folder/'00000.tar').read_bytes() + bytes(10240))
        assert rows(url).hash() == m.hash() and read_member(m.row(1)['path']) == read_member(rows(folder).row(1)['path'])


def test_a_table_saves_the_headers(folder, http, trouble):
    "One request a shard besides its size; a member is one more, and is asked for once"
    m = rows(http)
    assert sorted(p for p, r in trouble.asked if r) == [f'/0000{i}.parquet' for i in range(3)]
    n = len(trouble.asked)
    for _ in range(2): read_member(m.row(3)['path'])
    assert [p for p, _ in trouble.asked[n:]] == ['/00000.tar']


def test_manifests_by_address(folder, http, tmp_path):
    local = Manifest.read(folder/'manifest.parquet')
    m = Manifest.read(f'{http}/manifest.parquet')
    assert m.hash() == local.hash() and m.root == http and m.row(2)['path'] == f"{http}/{local.column('path')[2].as_py()}"
    assert m.shares(local) == [] and m.shares(m) == sorted(o['path'] for o in map(m.row, range(12)))
    again = Manifest.read(m.write(tmp_path/'there.csv'))
    assert again.root == http and again.column('path').equals(m.column('path'))
    assert Manifest.read(m.select([0]).write(tmp_path/'one.csv')).root == http
    root = Manifest.read(folder/'manifest.parquet', root=http + '/')
    assert root.row(0) == m.row(0)
    with pytest.raises(ValueError, match=r"1 of 2 videos are missing.*00000.tar::nobody.mp4"):
        Manifest.build(dict(path=[m.column('path')[0].as_py(), '00000.tar::nobody.mp4']), http)
    with pytest.raises(ValueError, match='lies outside the root folder'): Manifest.build(dict(path=['s3://elsewhere/a.tar::b.mp4']), http)
    with pytest.raises(VideoError, match='make_shards'): files._stat(f'{http}/clip.mp4')


def test_a_shard_that_was_replaced_is_another_one(folder, tmp_path):
    "New rows and new bytes under the old name, not what is kept of it"
    d = tmp_path/'set'; shutil.copytree(folder, d)
    with serve_folder(d) as url:
        m = rows(url)
        path = m.row(0)['path']
        first, tar = read_member(path), d/m.column('path')[0].as_py().partition('::')[0]
        at, size, _ = files.find_member(path)
        data = bytearray(tar.read_bytes()); data[at + size//2] ^= 255
        tar.write_bytes(data); os.utime(tar, (9e8, 9e8))             # web servers tell dates to the second
        assert rows(url).hash() == m.hash() and read_member(path) == bytes(data[at:at + size]) != first
        shutil.copy(folder/'00002.tar', tar); shutil.copy(folder/'00002.parquet', tar.with_suffix('.parquet'))
        new = from_shards(f'{url}/{tar.name}')
        assert read_member(new.row(0)['path']) == read_member(from_shards(folder/'00002.tar').row(0)['path']) != first


def test_tools_take_addresses(http, tmp_path, capsys):
    "A manifest of shards by their address; what then looks into the videos, or takes some of them here"
    from data_tools import check_videos, extract_frames, make_manifest, subset
    from vidlab.audit import audit
    out = tmp_path/'out.csv'
    assert make_manifest.main(['shards', '--root', http, '--out', str(out)]) == 0
    assert check_videos.main([str(out), '--workers', '1']) == 0 and '12 ok' in capsys.readouterr().out
    assert subset.main([str(out), str(tmp_path/'few'), '--n', '2']) == 0 and len(list((tmp_path/'few').rglob('*.mp4'))) == 2
    assert extract_frames.main([str(out), str(tmp_path/'frames')]) == 0
    found = audit(out, copies=True, workers=1)
    assert not [f for f in found.findings if f.kind == 'files'] and len(found.verdicts) == 12


# --------------------------------------------------------------------------------------------------- what fails

def fails(tar, answer, times=10**9, left={}):
    "A server that fails at runs of bytes of a shard, so many times"
    left[tar] = times
    def fail(path, headers):
        if path != f'/{tar}' or not headers.get('Range') or not left[tar]: return
        left[tar] -= 1
        return answer
    return fail

@pytest.mark.parametrize('answer', [503, 'half'])
def test_a_moment_of_trouble_costs_nothing(folder, http, trouble, answer):
    m, whole = rows(http), batches(loader(rows(folder)))
    trouble.fail = fails('00001.tar', answer, 3)
    assert_same(batches(loader(m)), whole)
    assert len([p for p, _ in trouble.asked if p == '/00001.tar']) >= 4 + 3


def test_a_shard_that_fails_is_tried_again_and_then_counted(folder, http, trouble):
    "Left out of training and named, as an unreadable file is; above the limit the run stops; in an evaluation it is an error, or a miss"
    m = rows(http)
    assert len(batches(loader(m))) == 3
    shutil.rmtree(Path(os.environ['VIDLAB_CACHE'])/'remote')
    trouble.fail = fails('00001.tar', 500)
    n = len(trouble.asked)
    dl = loader(m, window=3)                                      # every batch has others, too
    with pytest.warns(UserWarning, match=r"left out: http.*00001.tar::.*read: shard 'http.*/00001.tar': 4 tries failed, the last with .*500"): got = batches(dl)
    assert sum(len(b['sid']) for b in got) == 8 and len(dl.unread) == 4 and all('00001.tar::' in p for p in dl.unread)
    assert {r.partition(':')[0] for r in dl.unread.values()} == {'read'}
    tried = len([p for p, _ in trouble.asked[n:] if p == '/00001.tar'])
    assert 4 <= tried <= 4*4 + 4                                  # four for the first, fewer for the others, one ahead of each
    with pytest.warns(UserWarning), pytest.raises(TooManyUnread, match='00001.tar'): batches(loader(m, window=3, bad_limit=.1))
    test = m.split('test')
    bad = next(i for i in range(len(m)) if '00001.tar' in m.row(i)['path'])
    with pytest.raises(VideoError, match='00001.tar.*1 try failed'): Clips(m, SegmentSampler(2), size=16)[bad]
    trouble.fail = lambda *a: None
    assert Clips(m, SegmentSampler(2), size=16)[bad]['video'].shape[0] == 2 and len(test) == 4      # no verdict was kept


def test_what_waiting_does_not_mend_is_said_at_once(folder, http, trouble, monkeypatch):
    trouble.fail = lambda path, headers: 403 if path == '/00002.tar' else None
    m = rows(http)
    path = next(r['path'] for r in map(m.row, range(12)) if '00002.tar' in r['path'])
    n = len(trouble.asked)
    with pytest.raises(RemoteError, match='403'): read_member(path)
    assert len(trouble.asked) == n + 1
    with serve_folder(folder, SimpleHTTPRequestHandler) as plain, pytest.raises(RemoteError, match='knows byte ranges'): read_member(rows(f'{plain}').row(0)['path'])
    with pytest.raises(ValueError, match='7 of 9 shards cannot be read.*00003.tar: No such file'): from_shards(f'{http}/{{00001..00009}}.tar')
    with pytest.raises(ValueError, match='two data sets'): from_shards([str(folder), http])
    with pytest.raises(ValueError, match='empty.*No such file'): from_shards(f'{http}/empty')
    with pytest.raises(ValueError, match=r'4 tries failed.*\{00000\.\.00099\}'): from_shards('http://127.0.0.1:9/set')


def test_the_package_that_is_missing_is_named_before_any_work(monkeypatch, tmp_path):
    from vidlab.build import load_manifest
    from vidlab.train import make_config
    for module, url, extra in (('s3fs', 's3://bucket/set', 's3'), ('gcsfs', 'gs://bucket/set', 'gs'), ('aiohttp', 'https://host/set', 'http')):
        monkeypatch.setitem(sys.modules, module, None)
        cfg = make_config(model='clip4clip', data='shards', data_path=url, val_split='', test_split='')
        with pytest.raises(ImportError, match=rf'{url}.*pip install "vidlab\[{extra}\]"'): load_manifest(cfg, 'train')
    with pytest.raises(ValueError, match='nope'): from_shards('nope://bucket/set')
    with pytest.raises(ValueError, match='VIDLAB_REMOTE_GIB=none'): monkeypatch.setenv('VIDLAB_REMOTE_GIB', 'none'); remote.remote_room()


# --------------------------------------------------------------------------------------------------- the folder of what was fetched

READER = """
import sys
from vidlab.data.remote import copy_of
url, seed = sys.argv[1], int(sys.argv[2])
for k in range(14):
    n = (k*7 + seed*3) % 20
    with open(copy_of(url, (n, 60_000, 0)), 'rb') as f: assert f.read() == bytes((n + i) % 251 for i in range(60_000)), n
print('ok')
"""

def spawn(code, *args): return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(HERE.parent)))

@pytest.fixture
def numbers(tmp_path, monkeypatch):
    "A folder with one file of 100 kB, to be served; an empty cache"
    monkeypatch.setenv('VIDLAB_CACHE', str(tmp_path/'cache'))
    (tmp_path/'d').mkdir()
    (tmp_path/'d/n.bin').write_bytes(bytes(i % 251 for i in range(100_000)))
    return tmp_path/'d'

def test_processes_share_a_folder_that_is_never_too_large(numbers, tmp_path, monkeypatch):
    "Three processes, twenty runs of bytes, room for eight: every byte is right, and at no moment there is more than that"
    monkeypatch.setenv('VIDLAB_REMOTE_GIB', str(500_000/2**30))
    with serve_folder(numbers) as url:
        procs, most = [spawn(READER, f'{url}/n.bin', s) for s in range(3)], 0
        while any(p.poll() is None for p in procs):
            most = max(most, sum(o[1] for o in kept_files()))
            time.sleep(.005)
    said = [p.communicate() for p in procs]
    assert [o[0] for o in said] == ['ok\n']*3, said
    assert 300_000 < most <= 500_000 and (tmp_path/'cache/remote/used').read_text() == str(sum(o[1] for o in kept_files()))


def test_a_killed_process_leaves_nothing_in_the_way(numbers, tmp_path, monkeypatch):
    "It dies in the middle of a run of bytes: the next one fetches it whole, and what it left of another goes when room is needed"
    monkeypatch.setenv('VIDLAB_REMOTE_GIB', str(200_000/2**30))
    class Slow(range_handler()):
        def copyfile(self, source, out):
            out.write(source.read(30_000)); out.flush()
            if Slow.slow: time.sleep(30)
            out.write(source.read(self.left - 30_000))
    Slow.slow = True
    with serve_folder(numbers, Slow) as url:
        two = [spawn(f"from vidlab.data.remote import copy_of; copy_of({f'{url}/n.bin'!r}, ({k}, 90_000, 0))") for k in (0, 1)]
        end = time.monotonic() + 60
        while len([o for o in kept_files() if o[2].endswith('.part') and o[1]]) < 2 and time.monotonic() < end: time.sleep(.02)
        for p in two: p.send_signal(signal.SIGKILL); p.communicate()
        assert sorted(o[1] for o in kept_files()) == [90_000]*2 and all(o[2].endswith('.part') for o in kept_files())
        Slow.slow = False
        for k in (0, 5, 6): assert Path(copy_of(f'{url}/n.bin', (k, 90_000, 0))).read_bytes()[:3] == bytes([k, k + 1, k + 2])
    assert not [o for o in kept_files() if o[2].endswith('.part')] and sum(o[1] for o in kept_files()) <= 200_000


def test_what_is_wanted_by_several_is_fetched_once(numbers):
    asked = []
    class Counting(range_handler()):
        def do_GET(self): asked.append(self.path); time.sleep(.2); super().do_GET()
    with serve_folder(numbers, Counting) as url:
        got = []
        threads = [threading.Thread(target=lambda: got.append(copy_of(f'{url}/n.bin', (0, 1000, 0)))) for _ in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert len(asked) == 1 and len(set(got)) == 1 and len(got) == 6


def test_batches_are_fetched_ahead(http, trouble):
    "When the first batch is there, the two behind it are under way; nothing is asked for twice"
    m = rows(http)
    dl = loader(m)
    it = dl.epoch(0)
    next(it)
    end = time.monotonic() + 20
    fetched = lambda: [o for o in trouble.asked if o[0].endswith('.tar')]
    while len(fetched()) < 12 and time.monotonic() < end: time.sleep(.01)
    assert len(fetched()) == 12
    list(it)
    assert len(fetched()) == len(set(fetched())) == 12
    dl.close()


# --------------------------------------------------------------------------------------------------- ten million rows

def plain_order(shard, seed, epoch, window):
    "The order as it is defined: all samples sorted at once"
    g, n = rng(seed, epoch), int(shard.max(initial=-1)) + 1
    place = np.empty(n, np.int64)
    place[g.permutation(n)] = np.arange(n)
    return np.argsort(place[shard]//window + g.random(len(shard)), kind='stable')

def test_the_order_by_windows_is_the_order_sorted_at_once():
    g = np.random.default_rng(0)
    for shard in (g.integers(0, 13, 500), np.repeat(np.arange(40), g.integers(0, 30, 40)), np.zeros(7, np.int64), g.permutation(9)):
        for w in (1, 3, 16, 99):
            ref, parts = plain_order(shard, 5, 2, w), WindowOrder(shard, w)(5, 2)
            assert (window_order(shard, 5, 2, w) == ref).all() and len(parts) == len(ref)
            for a in g.integers(0, len(ref), 20): assert (parts[a:a + 37] == ref[a:a + 37]).all()
            assert len(parts[len(ref):]) == 0

def test_ten_million_rows_go_on_in_the_middle_within_a_second():
    from vidlab.data.clips import Order
    shard = np.repeat(np.arange(10_000), 1000)
    permute = WindowOrder(shard)
    o = Order(len(shard), 128, True, 0, True, permute=permute)
    o.epoch, o.start = 3, len(shard)//256
    t = time.process_time()
    keys = next(iter(o))
    assert time.process_time() - t < 1 and len(keys) == 128
    assert [k[1] for k in keys] == plain_order(shard, 0, 3, 16)[o.start*128:(o.start + 1)*128].tolist()


# --------------------------------------------------------------------------------------------------- runs

def losses(where, nproc=1, resume='', **kw):
    "Of the steps of a run whose data set is a folder or an address; and its folder"
    from vidlab.core import RunFolder
    from vidlab.train import launch, make_config, run
    cfg = make_config(**{**dict(model='clip4clip', preset='tiny', clip='random', head='meanP', data='shards', data_path=str(where), sampler='segment', max_frames=2, epochs=2,
                                batch_size=4, eval_batch_size=4, workers=0, log_every=1, device='cpu', val_split='', test_split='', max_words=16, check=False), **kw})
    out = launch(cfg, nproc=nproc, resume=resume) if nproc > 1 else run(cfg, resume=resume)
    folder = RunFolder(out.path)
    return [r['loss'] for r in folder.metrics() if r['kind'] == 'step'], folder

def test_a_run_by_address_is_the_run_on_the_folder(folder, http, outputs):
    "Every loss; and a run names the address of a shard that it could not read"
    whole = losses(folder)[0]
    assert len(whole) == 6 and losses(http)[0] == whole

@pytest.mark.long
def test_two_processes_train_as_on_the_folder(folder, bucket, outputs, warm_ranks):
    "gloo, each with its part of every batch"
    whole = losses(folder, 2)[0]
    assert len(whole) == 6 and losses(bucket, 2)[0] == whole

@pytest.mark.parametrize('where', ['http', pytest.param('bucket', marks=pytest.mark.long)])
def test_a_run_by_address_that_is_stopped_goes_on_as_if_nothing_had_been(folder, request, outputs, monkeypatch, where):
    "In the middle of the second epoch, on a machine that has kept nothing of what it fetched: losses, weights and the state of the optimiser are those of the run that was not stopped, and of the one on the folder"
    import os, shutil, signal
    from vidlab.ckpt import load_checkpoint
    from vidlab.core import cache_dir
    from vidlab.learner import Learner
    address, more = request.getfixturevalue(where), dict(batch_size=2, head='seqTransf', temporal_layers=1, augment='rrc')
    whole, here = losses(folder, **more)
    step = Learner.one_step
    def stopped(learn, *a):
        if learn.step == 8: os.kill(os.getpid(), signal.SIGTERM)          # in the ninth of twelve steps
        return step(learn, *a)
    with monkeypatch.context() as stop:
        stop.setattr(Learner, 'one_step', stopped)
        cut, there = losses(address, **more)
    assert there.status()['state'] == 'stopped' and there.status()['epoch'] == 1 and len(cut) == 9 and cut == whole[:9]
    shutil.rmtree(cache_dir('remote'))
    again, there = losses(address, resume=str(there.path), **more)
    assert len(whole) == 12 and there.status()['state'] == 'done' and again == whole
    a, b = (load_checkpoint(f/'ckpt'/'last') for f in (here, there))
    assert all((a['weights'][k] == b['weights'][k]).all() for k in a['weights'])
    moments, theirs = a['state']['optimizer']['state'], b['state']['optimizer']['state']
    assert moments.keys() == theirs.keys() and all((moments[i][k] == theirs[i][k]).all() for i in moments for k in moments[i])
