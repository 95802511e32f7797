"Rows that are read and checked once and then mapped: what they are, when they are made anew, and what a start then costs"
import io, pickle, tarfile, warnings
import numpy as np
import pytest
from vidlab.data import manifest, shards
from vidlab.data.clips import Clips, _Shipment
from vidlab.data.manifest import Manifest, told_twice
from vidlab.data.sample import SegmentSampler
from vidlab.data.shards import WindowOrder, from_shards, shard_of
from vidlab.data.tables import write_table


@pytest.fixture(autouse=True)
def all_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, 'KEPT_FROM', 1)
    monkeypatch.setenv('VIDLAB_CACHE', str(tmp_path/'cache'))


def write_tar(path, members):
    with tarfile.open(path, 'w') as f:
        for name, data in members:
            o = tarfile.TarInfo(name)
            o.size = len(data)
            f.addfile(o, io.BytesIO(data))


def tars(folder, n=3, each=4, said='walks'):
    folder.mkdir(exist_ok=True)
    for s in range(n):
        members = [(f'{s}{i}.{k}', v) for i in range(each) for k, v in [('mp4', b'x'), ('txt', f'number {s}{i} "{said}"'.encode())]]
        write_tar(folder/f'{s:05}.tar', members)
    return folder


def rows(file, n=12, **more):
    cols = dict(id=[f'v{i//2}' for i in range(n)], path=[f'{i//2}.mp4' for i in range(n)], text=[f'caption {i}' for i in range(n)],
                split=['train' if i < n - 4 else 'test' for i in range(n)], label=[str(i//2 % 3) for i in range(n)])
    return write_table(file, cols | more)


def same(a, b):
    assert a.hash() == b.hash() and [a.row(i) for i in range(len(a))] == [b.row(i) for i in range(len(b))]
    assert (a.report, a.names, a.by, str(a.root), a.summary(), a.splits()) == (b.report, b.names, b.by, str(b.root), b.summary(), b.splits())
    for k in ('code', 'order', 'offset', 'first', 'view', 'counts'): np.testing.assert_array_equal(getattr(a.groups(), k), getattr(b.groups(), k))


@pytest.fixture
def reads(monkeypatch):
    "Counts what is read and checked"
    seen, was = [], Manifest.build
    monkeypatch.setattr(Manifest, 'build', classmethod(lambda cls, *a, **k: (seen.append(a), was(*a, **k))[1]))
    return seen


def test_shards_are_read_once(tmp_path, monkeypatch, reads):
    folder = tars(tmp_path/'set')
    bare = from_shards(folder, split='train', cache=False)
    first, again = from_shards(folder, split='train'), from_shards(folder, split='train')
    assert bare.kept is None and first.kept and again.kept and len(reads) == 2
    same(first, bare)
    same(again, bare)
    np.testing.assert_array_equal(shard_of(again), shard_of(bare))
    assert not again.column('start').flags.writeable
    assert len(from_shards(folder, split='test').splits()) == 1 and len(reads) == 3           # other options are other rows
    monkeypatch.setattr(manifest, 'KEPT_FROM', 100)
    assert from_shards(tars(tmp_path/'few')).kept is None


def test_a_changed_shard_is_seen_and_the_old_rows_go(tmp_path):
    folder = tars(tmp_path/'set')
    old = from_shards(folder)
    was = old.hash()
    tars(folder, said='RUNS!')                                                        # as many bytes, another date
    new = from_shards(folder)
    assert new.hash() != was and new.row(0)['text'] == 'number 00 "RUNS!"'
    assert not old.kept.folder.exists() and new.kept.folder.parent == old.kept.folder.parent
    tars(folder, n=4, said='RUNS!')
    assert len(from_shards(folder)) == 16
    (folder/'00001.tar').unlink()
    assert len(from_shards(folder)) == 12
    (folder/'00002.tar').write_bytes((folder/'00002.tar').read_bytes()[:2000])
    with pytest.raises(ValueError, match='00002.tar: it breaks off'): from_shards(folder)


@pytest.mark.parametrize('harm', ['byte', 'short', 'gone', 'note'])
def test_damage_is_named_and_made_good(tmp_path, reads, harm):
    folder = tars(tmp_path/'set')
    good = from_shards(folder, cache=False)
    m = from_shards(folder)
    file = next(f for f in m.kept.folder.glob('rows.*.arrow') if b'number 11' in f.read_bytes())
    if harm == 'note': file = m.kept.folder/'rows.json'
    data = file.read_bytes()
    at = data.index(b'number 11' if harm != 'note' else b'sha256')
    if harm in ('byte', 'note'): file.write_bytes(data[:at] + b'X' + data[at + 1:])
    if harm == 'short': file.write_bytes(data[:-8])
    if harm == 'gone': file.unlink()
    with pytest.warns(UserWarning, match=f'{file.name}.*made anew from its source'): again = from_shards(folder)
    same(again, good)
    assert len(reads) == 3
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same(from_shards(folder), good)
    assert len(reads) == 3


def test_a_table_is_read_once_and_its_videos_are_looked_for_each_time(tmp_path, reads):
    table = rows(tmp_path/'all.csv')
    for i in range(6): (tmp_path/f'{i}.mp4').touch()
    first, again = Manifest.read(table), Manifest.read(table)
    assert first.kept and again.kept and len(reads) == 1
    same(again, first)
    (tmp_path/'3.mp4').unlink()
    with pytest.raises(ValueError, match=r"1 of 6 videos are missing .*3\.mp4"): Manifest.read(table)
    less = Manifest.read(table, missing='drop')
    assert less.kept is None and len(less) == 10 and less.report['missing'] == ['3.mp4'] and len(reads) == 1
    rows(table, end=['9']*11 + ['0:12'])
    with pytest.raises(ValueError, match="all.csv: row 12, column 'end': '0:12' is not a number"): Manifest.read(table, missing='keep')


def test_a_split_is_kept_as_well_and_says_what_the_whole_says(tmp_path, monkeypatch):
    whole = Manifest.read(rows(tmp_path/'all.csv'), missing='keep')
    want = {s: of_split(whole, s) for s in ('train', 'test')}
    parts = {s: whole.split(s) for s in want}
    with monkeypatch.context() as no:
        no.setattr(Manifest, 'select', lambda *a: pytest.fail('rows are taken anew'))
        for s, m in want.items(): same(whole.split(s), m)
    assert len({m.kept.folder for m in (*parts.values(), whole)}) == 3
    other = Manifest.read(tmp_path/'all.csv', missing='keep', classes=None)
    other.names = ['a', 'b', 'c']                                     # another run gives the classes names
    assert other.split('train').names == ['a', 'b', 'c'] and whole.split('train').names is None


def of_split(m, s): return m.select([o == s for o in m.column('split').to_pylist()])


def test_what_is_in_two_splits_is_asked_once(tmp_path, monkeypatch):
    table = rows(tmp_path/'all.csv', path=[f'{i % 5}/a.mp4' for i in range(12)], id=[f'v{i}' for i in range(12)], text=['one', 'two']*6)
    m = Manifest.read(table, missing='keep')
    kept, bare = {s: m.split(s) for s in ('train', 'test')}, {s: of_split(m, s) for s in ('train', 'test')}
    want = told_twice(bare, 'train')
    assert len(want) == 2 and '4 videos' in want[0] and '2 of 2 captions' in want[1] and told_twice(kept, 'train') == want
    monkeypatch.setattr(manifest, '_twice', lambda *a: pytest.fail('compared anew'))
    assert told_twice(kept, 'train') == want
    with pytest.raises(pytest.fail.Exception): told_twice(dict(kept, test=bare['test'].select([0])), 'train')


def test_shares_is_that_of_all_paths(tmp_path):
    names = [f'{a}/{b}' for a in 'xyz' for b in ('1.mp4', '2.mp4', 't.tar::k/1.mp4', 't.tar::1.mp4')]
    a = Manifest.build(dict(path=names), tmp_path, missing='keep')
    b = Manifest.build(dict(path=['1.mp4', '3.mp4', 't.tar::k/1.mp4']), tmp_path/'y', missing='keep')
    assert a.shares(b) == b.shares(a) == [str(tmp_path/'y/1.mp4'), str(tmp_path/'y/t.tar::k/1.mp4')]


def test_workers_are_given_the_name_of_the_folder(tmp_path, monkeypatch):
    folder = tars(tmp_path/'set', each=400)
    m = from_shards(folder)
    ds = Clips(m, SegmentSampler(4), train=True)
    box = _Shipment(ds)
    box.pack()
    assert len(box.data) < 5000 and not box.spans
    there = pickle.loads(box.data)
    same(there.manifest, m)
    assert len(there) == len(ds) == 1200 and there.row_of(700) == 700 and there.rows.tolist() == ds.rows.tolist()
    ds._left = np.arange(5, 50)
    assert len(ds) == 45 and ds.row_of(0) == 5
    for f in m.kept.folder.iterdir(): f.unlink()
    with pytest.raises(RuntimeError, match='start again'): pickle.loads(box.data)


def test_rows_in_the_order_of_their_shards_need_no_list(tmp_path):
    ordered = np.repeat(np.arange(7), 9)
    here, listed = WindowOrder(ordered, 2), WindowOrder(ordered, 2)
    assert here.by_shard is None
    listed.by_shard = np.argsort(ordered, kind='stable')
    assert np.array_equal(here(3, 1)[:], listed(3, 1)[:]) and sorted(here(3, 1)[:]) == list(range(63))
    mixed = np.random.default_rng(0).permutation(ordered)
    assert WindowOrder(mixed, 2).by_shard is not None
    assert [len(set(mixed[WindowOrder(mixed, 2)(3, 1)[i:i+18]])) for i in (0, 18, 36)] == [2]*3
