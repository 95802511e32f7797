"""vidlab.data.shards and data_tools/make_shards.py: real clips into tars and back, against webdataset; broken shards."""
import csv, gzip, importlib, io, json, os, tarfile
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip('av')
wds = pytest.importorskip('webdataset')
from conftest import encode
from vidlab.data.child import _child
from vidlab.data.annots import Manifest, absent
from vidlab.data.clips import Clips, Loader
from vidlab.data.files import read_member, tar_table
from vidlab.data.decode import audit, read_frames, stream_frames
from vidlab.data.files import VideoError
from vidlab.data.index import index_video
from vidlab.data.sample import SegmentSampler
from vidlab.data.shards import from_shards, shard_of, window_order


@pytest.fixture(autouse=True, scope='module')
def _cache(tmp_path_factory):
    "A cache of our own"
    old = os.environ.get('VIDLAB_CACHE')
    os.environ['VIDLAB_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    _child().kill()
    os.environ.pop('VIDLAB_CACHE') if old is None else os.environ.update(VIDLAB_CACHE=old)


def moving(path, shade, n=12, codec='libx264'):
    "A bright square that moves over a shade"
    def picture(t):
        x = np.full((48, 64, 3), shade, np.uint8)
        x[8:24, 4*t % 40:4*t % 40+16] = 230
        return x
    return encode(path, n, 64, 48, 12, codec, picture=picture)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    "20 clips (mp4, avi, webm) and 4 pictures, and their manifest; clip 3 has two captions"
    from PIL import Image
    d = tmp_path_factory.mktemp('videos')
    names = [f'{i}.' + ('avi' if i == 5 else 'webm' if i == 6 else 'mp4') for i in range(20)]
    for i, n in enumerate(names):
        moving(d/n, 10*i, codec=dict(avi='mpeg4', webm='libvpx', mp4='libx264')[n.rpartition('.')[2]])
    for i in range(4): Image.fromarray(np.full((30, 40, 3), 60*i, np.uint8)).save(d/f'p{i}.{("jpg", "png")[i % 2]}')
    names += [p.name for p in sorted(d.glob('p*'))]
    rows = [dict(id=n, path=n, text=f'clip {i}', label=i % 3, split='train', note='x') for i, n in enumerate(names)]
    rows.append(dict(rows[3], text='another of 3'))
    m = Manifest.build({k: [r[k] for r in rows] for k in rows[0]}, d)
    m.write(d/'m.csv')
    return d


@pytest.fixture
def run(monkeypatch, capsys):
    "The tool in this process; (exit code, stdout, stderr)"
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    def call(*args):
        code = importlib.import_module('data_tools.make_shards').main([str(a) for a in args])
        return (code, *capsys.readouterr())
    return call


@pytest.fixture(scope='module')
def packed(videos, tmp_path_factory):
    "The shards of the clips, seven samples each"
    from data_tools.make_shards import make_shards
    out = tmp_path_factory.mktemp('shards')
    make_shards(str(videos/'m.csv'), str(out), samples=7)
    return out


def test_there_and_back(videos, packed):
    "Same frames, same captions, through Clips, from manifest.parquet and from the tars alone"
    src, m = Manifest.read(videos/'m.csv'), Manifest.read(packed/'manifest.parquet')
    assert len(m) == len(src) == 25 and sorted(p.name for p in packed.glob('*.tar')) == [f'0000{i}.tar' for i in range(4)]
    key = {(r['id'], r['text']): r for r in map(src.row, range(25))}
    for r in map(m.row, range(25)):
        o = key[r['id'], r['text']]
        assert (r['label'], r['split'], r['note']) == (o['label'], o['split'], o['note'])
        a, b = index_video(o['path']), index_video(r['path'])
        assert (a.n, a.codec, a.how, a.seek) == (b.n, b.codec, b.how, b.seek)
        assert (read_frames(a, range(a.n)) == read_frames(b, range(b.n))).all()
    again = from_shards(packed, caption='json.text', columns={k: f'json.{k}' for k in ('id', 'label', 'split', 'note')})
    assert again.hash() == m.hash() and again.column('path').equals(m.column('path'))
    ds = Clips(m, SegmentSampler(3), size=32, train=True, seed=1)
    assert ds.check() == {}
    one = next(Loader(ds, 25, shuffle=True).epoch(0))
    assert len(one['sid']) == 25 and one['video'].shape == (25, 3, 3, 32, 32)
    plain = Clips(src, SegmentSampler(3), size=32)
    for i in range(25):
        r = m.row(i)
        j = next(j for j in range(25) if (src.row(j)['id'], src.row(j)['text']) == (r['id'], r['text']))
        assert (Clips(m, SegmentSampler(3), size=32)[i]['video'] == plain[j]['video']).all()


def test_same_as_webdataset(packed):
    m = from_shards(f'{packed}/{{00000..00003}}.tar')
    stream = list(wds.WebDataset(f'{packed}/{{00000..00003}}.tar', shardshuffle=False))
    assert [p.rpartition('::')[2].partition('.')[0] for p in m.column('path').to_pylist()] == [s['__key__'] for s in stream]
    assert [r.encode() for r in m.column('text').to_pylist()] == [s['txt'] for s in stream]
    for i, s in enumerate(stream):
        path = m.row(i)['path']
        assert read_member(path) == s[path.rpartition('.')[2]]


def test_loader_resumes_with_workers(packed):
    ds = Clips(Manifest.read(packed/'manifest.parquet'), SegmentSampler(2), size=16, train=True, seed=2)
    whole = [b['video'] for b in Loader(ds, 5, shuffle=True, seed=4).epoch(1)]
    dl = Loader(ds, 5, workers=2, shuffle=True, seed=4, timeout=60)
    try: rest = [b['video'] for b in dl.epoch(1, start=2)]
    finally: dl.close()
    assert len(rest) == 3 and all((a == b).all() for a, b in zip(whole[2:], rest))


def test_tool_again(videos, tmp_path, run):
    "Nothing to do the second time; a changed source rewrites its shard; bytes decide as well; failures are named"
    d = tmp_path/'v'; d.mkdir()
    for i in range(6): (d/f'{i}.mp4').write_bytes((videos/f'{i if i < 5 else 7}.mp4').read_bytes())
    (d/'folder.d').mkdir(); (d/'empty.mp4').touch()
    (d/'m.csv').write_text('path,text\n' + ''.join(f'{n},t\n' for n in [f'{i}.mp4' for i in range(6)] +
                                                   ['gone.mp4', 'folder.d', 'empty.mp4']))
    out = tmp_path/'out'
    code, text, err = run(d/'m.csv', out, '--samples', 2)
    assert code == 1 and '9 files: 6 packed, 0 already there, 3 failed; 3 shards' in text, text + err
    for w in ("gone.mp4': No such file", 'a folder of pictures', 'the file is empty', 'shards_report.csv'): assert w in text
    tars = lambda: {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob('*.tar')}
    before, manifest = tars(), (out/'manifest.parquet').read_bytes()
    assert '0 packed, 6 already there, 3 failed' in run(d/'m.csv', out, '--samples', 2)[1] and tars() == before
    with open(out/'shards_report.csv') as f: of = {r['shard']: r['source'] for r in csv.DictReader(f)}
    os.utime(of['00000.tar'], (1, 1)); (out/'00002_stats.json').unlink()
    assert '4 packed, 2 already there' in run(d/'m.csv', out, '--samples', 2)[1]
    assert {k: v[1] for k, v in tars().items()} == {k: v[1] for k, v in before.items()}                  # reproducible
    assert (out/'manifest.parquet').read_bytes() == manifest
    stats = json.loads((out/'00000_stats.json').read_text())
    assert stats['successes'] == 2 and (out/'00000.parquet').exists()
    code, text, err = run(d/'m.csv', out, '--in_order', '--samples', 0, '--megabytes', 1)
    assert '1 shards' in text and sorted(p.name for p in out.glob('*.tar')) == ['00000.tar'], text
    assert Manifest.read(out/'manifest.parquet').column('text').to_pylist() == ['t']*6
    assert not list(out.glob('.*'))
    for bad in ([d/'m.xls', out], [d/'m.csv', out, '--samples', 0, '--megabytes', 0], [d/'none.csv', out]):
        assert run(*bad)[0] == 2


def write_tar(path, members, **kw):
    with tarfile.open(path, 'w', **kw) as f:
        for name, data in members:
            o = tarfile.TarInfo(name); o.size = len(data); f.addfile(o, io.BytesIO(data))
    return path


@pytest.fixture
def shard(videos, tmp_path):
    clip = (videos/'0.mp4').read_bytes()
    return write_tar(tmp_path/'00000.tar', [(f'{i}.{k}', b) for i in range(4) for k, b in (('mp4', clip), ('txt', b'text'))])


def test_torn_at_any_place(shard):
    "Cut anywhere: an error that names the shard; what is complete is read, nothing else"
    data, rows = shard.read_bytes(), tar_table(str(shard)).rows
    for cut in np.linspace(1, int((rows['at'] + rows['size']).max()), 17).astype(int):
        shard.write_bytes(data[:cut])
        with pytest.raises(ValueError, match='00000.tar'): from_shards(shard)
        try: m = from_shards(shard, missing='drop', missing_limit=1.)
        except ValueError as e: assert 'no samples' in str(e); continue
        assert m.report['broken_shards'] and all(index_video(r['path']).n == 12 for r in map(m.row, range(len(m))))
    head = int(np.sort(rows['at'])[3]) - 512
    shard.write_bytes(data[:head] + b'?'*512 + data[head+512:])
    with pytest.raises(ValueError, match='00000.tar: the header after 3 members is unreadable'): from_shards(shard)
    shard.write_bytes(data)
    assert len(from_shards(shard)) == 4 and len(rows) == 8


def test_what_is_lacking(shard, videos, tmp_path):
    clip = (videos/'0.mp4').read_bytes()
    write_tar(tmp_path/'00001.tar', [('a.txt', b'no video'), ('b.mp4', clip), ('c.mp4', clip), ('c.txt', b'\xff'), ('d.mp4', b''),
                                     ('d.txt', b'x'), ('e.mp4', clip), ('e.webm', clip), ('e.txt', b'x'), ('f.mp4', clip),
                                     ('f.txt', b' \n')])
    with pytest.raises(ValueError, match='3 of 10 samples have no video.*00001.tar::a: no video or picture'): from_shards(tmp_path)
    m = from_shards(tmp_path, missing='drop', missing_limit=.9)
    said = ' '.join(m.report['missing'] + m.report['without_caption'])
    assert len(m) == 4
    for w in ("a: no video", "b: no 'txt'", "c: its 'txt' is not UTF-8", "d: its 'mp4' is empty", "e: several", "f: no caption"):
        assert '00001.tar::' + w in said, said
    assert len(from_shards(tmp_path, media='mp4', missing='drop', missing_limit=.9)) == 5
    for kw, w in ((dict(missing='keep'), 'missing policy'), (dict(missing='drop', missing_limit=.1), 'missing_limit')):
        with pytest.raises(ValueError, match=w): from_shards(tmp_path, **kw)
    for name in ('b.tar.gz', 'b.tgz'):
        write_tar(tmp_path/name, [('a.mp4', clip)])
        with pytest.raises(ValueError, match='plain .tar'): from_shards(tmp_path/name)
    write_tar(tmp_path/'zipped.tar', [('a.mp4', clip)])
    (tmp_path/'zipped.tar').write_bytes(gzip.compress((tmp_path/'zipped.tar').read_bytes()))
    with pytest.raises(ValueError, match='gzip'): from_shards(tmp_path/'zipped.tar')
    with pytest.raises(ValueError, match='no .tar files'): from_shards(videos)


def test_paths_of_members(shard, videos):
    "Errors name shard and member, caches follow the shard, manifests and audits know members"
    p = f'{shard}::0.mp4'
    assert index_video(p).n == 12 and [r['verdict'] for r in audit([p, f'{shard}::9.mp4', f'{shard}::0.txt'], workers=1)] == [
        'ok', 'bad', 'bad']
    with pytest.raises(VideoError, match=r"00000.tar::9.mp4': cannot open.*holds no member '9.mp4'"): index_video(f'{shard}::9.mp4')
    with pytest.raises(VideoError, match="gone.tar::0.mp4': cannot open"): index_video(f'{shard.parent}/gone.tar::0.mp4')
    assert absent(['00000.tar::0.mp4', '00000.tar::9.mp4', 'x.tar::0.mp4'], shard.parent) == ['00000.tar::9.mp4', 'x.tar::0.mp4']
    with pytest.raises(ValueError, match='1 of 2 videos are missing'):
        Manifest.build(dict(path=['00000.tar::0.mp4', '00000.tar::9.mp4']), shard.parent)
    ix = index_video(p)
    for name in ('pyav', 'decord'): assert (read_frames(ix, [0, 11], name) == read_frames(ix, [0, 11])).all()
    assert (read_frames(ix, [3], contained=True) == np.stack(list(stream_frames(ix, [3])))).all()
    write_tar(shard, [('0.mp4', moving(videos/'long.mkv', 9, n=20).read_bytes())])
    with pytest.raises(VideoError, match='changed since'): read_frames(ix, [0])
    assert index_video(p).n == 20


def test_odd_names(videos, tmp_path):
    "Long names, commas and colons, a name that is not ASCII, ./ in front, two formats of tar"
    clip = (videos/'0.mp4').read_bytes()
    names = ['./a, b:c.mp4', 'd'*150 + '/' + 'e'*60 + '.mp4', 'ü 日.mp4', "q'uo\"te.mp4", 'x::y.mp4']
    for fmt in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = write_tar(tmp_path/'o, d:d.tar', [(n, clip) for n in names], format=fmt)
        m = from_shards(tar, caption=None)
        assert [p.partition('::')[2] for p in m.column('path').to_pylist()] == names
        for r in map(m.row, range(len(m))): assert len(read_frames(r['path'], [11])) == 1
        assert len(Manifest.read(m.write(tmp_path/'m.csv'))) == 5


def test_single_pictures(videos, tmp_path):
    from PIL import Image
    p = videos/'p0.jpg'
    ix = index_video(p)
    assert (ix.n, ix.width, ix.height, ix.how, ix.codec, ix.decoders['images']) == (1, 40, 30, 'image', 'jpeg', None)
    assert read_frames(ix, [0, 0], size=(10, 12)).shape == (2, 10, 12, 3)
    for name in ('pyav', 'decord'):
        with pytest.raises(VideoError, match='pictures'): read_frames(ix, [0], name)
    turned = Image.new('RGB', (40, 30)); exif = turned.getexif(); exif[0x112] = 6
    turned.save(tmp_path/'t.jpg', exif=exif)
    assert (index_video(tmp_path/'t.jpg').width, read_frames(tmp_path/'t.jpg', [0]).shape) == (30, (1, 40, 30, 3))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path/'cut.jpg')
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:4000])
    assert index_video(tmp_path/'cut.jpg').n == 1                                    # the header is fine
    for bad in (lambda: index_video(tmp_path/'cut.jpg', deep=True), lambda: read_frames(tmp_path/'cut.jpg', [0])):
        with pytest.raises(VideoError, match='cut.jpg'): bad()
    (tmp_path/'no.png').write_text('<html>')
    with pytest.raises(VideoError, match='no.png.*not a readable picture'): index_video(tmp_path/'no.png')
    assert (list(stream_frames(p, [0]))[0] == read_frames(p, [0])[0]).all()
    with pytest.raises(ValueError, match='fps'): index_video(p, fps=3)


def test_order():
    shard = np.random.default_rng(0).integers(0, 13, 500)
    for w in (1, 3, 13, 99):
        o = window_order(shard, 5, 2, w)
        assert (np.sort(o) == np.arange(500)).all() and (o == window_order(shard, 5, 2, w)).all()
        seen = [set(shard[o[i:i+1]]) for i in range(500)]
        last = {s: max(i for i, x in enumerate(seen) if s in x) for s in range(13)}
        opened = {s: min(i for i, x in enumerate(seen) if s in x) for s in range(13)}
        assert max(sum(opened[s] <= i <= last[s] for s in range(13)) for i in range(500)) <= w
    assert len(window_order(np.zeros(0, np.int64), 0, 0)) == 0
    with pytest.raises(ValueError, match='window=0'): window_order(shard, 0, 0, 0)
    with pytest.raises(ValueError, match='no member of a shard'):
        shard_of(Manifest.build(dict(path=['a.tar::b.mp4', 'c.mp4']), '/', missing='keep'))
