"data_tools/subset.py: which clips, what goes with them, that a second call changes nothing and what is wrong is said."
import json, os, tarfile
from pathlib import Path
import pandas as pd
import pytest
from data_tools.subset import subset
from vidlab.data.manifest import Manifest
from vidlab.registry import create


@pytest.fixture
def big(tmp_path):
    "Three classes, two splits, two captions a clip; a caption file beside one, a folder of pictures, a member of a tar"
    d, rows = tmp_path/'big', []
    for split, n in dict(train=30, val=9).items():
        for i in range(n):
            p = f'videos/{split}/{i:02}.mp4'
            (d/p).parent.mkdir(parents=True, exist_ok=True)
            (d/p).write_bytes(f'{split} {i}'.encode())
            rows += [dict(id=f'{split}{i}', path=p, text=f'clip {i} {k}', label=('run', 'jump', 'sit')[i % 3], split=split) for k in 'ab']
    (d/'videos/train/00.srt').write_text('1\n')
    (d/'pics').mkdir()
    for n in ('1.jpg', '2.jpg'): (d/'pics'/n).write_bytes(n.encode())
    (d/'m.txt').write_bytes(b'inside')
    with tarfile.open(d/'s.tar', 'w') as t: t.add(d/'m.txt', 'a/m.mp4')
    rows += [dict(id='pics', path='pics', text='pictures', label='run', split='val'), dict(id='tar', path='s.tar::a/m.mp4', text='in a tar', label='sit', split='val')]
    pd.DataFrame(rows).to_csv(d/'m.csv', index=False)
    return d

def read(out): return Manifest.read(out/'manifest.csv')
def ids(out): return list(dict.fromkeys(read(out).column('id').to_pylist()))
def times(out): return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob('*') if p.is_file()}


def test_some_of_each_class(big, tmp_path, run):
    "All captions of the clips that stay, the files under the same names, numbers of classes as before"
    code, said, err = run('subset', big/'m.csv', tmp_path/'small', '--per_class', 2)
    assert code == 0 and '12 of 41 clips' in said, said + err
    small, whole = read(tmp_path/'small'), Manifest.read(big/'m.csv')
    rows = [small.row(i) for i in range(len(small))]
    of = {r['id']: r for r in map(whole.row, range(len(whole)))}
    assert all(r['label'] == of[r['id']]['label'] for r in rows) and (tmp_path/'small'/'classes.txt').read_text().split() == whole.classes
    assert {(s, c) for s in ('train', 'val') for c in range(3)} == {(r['split'], r['label']) for r in rows}
    for r in rows:
        if r['id'] not in ('pics', 'tar'): assert Path(r['path']).read_bytes() == Path(of[r['id']]['path']).read_bytes() and Path(r['path']).relative_to(tmp_path/'small') == Path(of[r['id']]['path']).relative_to(big)
        assert sum(q['id'] == r['id'] for q in rows) == (1 if r['id'] in ('pics', 'tar') else 2)
    report = json.loads((tmp_path/'small'/'manifest.report.json').read_text())
    assert report['hash'] == small.hash() and report['missing'] == []


def test_the_same_words_give_the_same_clips(big, tmp_path):
    "Nothing changes the second time; another seed chooses otherwise; the first ones are the first ones"
    subset(big/'m.csv', tmp_path/'a', n=5)
    before = times(tmp_path/'a')
    subset(big/'m.csv', tmp_path/'a', n=5)
    after = times(tmp_path/'a')
    assert {p: v[1] for p, v in before.items()} == {p: v[1] for p, v in after.items()} and all(before[p] == after[p] for p in before if p.suffix == '.mp4')
    subset(big/'m.csv', tmp_path/'b', n=5)
    subset(big/'m.csv', tmp_path/'c', n=5, seed=1)
    subset(big/'m.csv', tmp_path/'d', first=3, splits=('train',))
    assert ids(tmp_path/'a') == ids(tmp_path/'b') != ids(tmp_path/'c') and len(ids(tmp_path/'a')) == 10
    assert ids(tmp_path/'d') == ['train0', 'train1', 'train2'] and (tmp_path/'d'/'videos/train/00.srt').exists()


@pytest.mark.parametrize('files', ['copy', 'link', 'none'])
def test_by_ids_with_files_of_every_kind(big, tmp_path, files):
    (tmp_path/'ids.txt').write_text('pics\ntar\ntrain3\n')
    subset(big/'m.csv', tmp_path/'s', ids=(str(tmp_path/'ids.txt'),), files=files)
    m = Manifest.read(tmp_path/'s'/'manifest.csv')
    at = {r['id']: Path(r['path']) for r in map(m.row, range(len(m)))}
    assert sorted(at) == ['pics', 'tar', 'train3'] and at['train3'].read_bytes() == b'train 3'
    if files == 'none': assert at['train3'] == big/'videos/train/03.mp4' and not (tmp_path/'s'/'videos').exists()
    else: assert sorted(os.listdir(at['pics'])) == ['1.jpg', '2.jpg'] and at['tar'].read_bytes() == b'inside' and at['tar'].relative_to(tmp_path/'s').as_posix() == 's/a/m.mp4'
    if files == 'link': assert at['train3'].stat().st_ino == (big/'videos/train/03.mp4').stat().st_ino


def test_lists_are_read_by_the_formats_of_published_code(big, tmp_path):
    "`path label` and {path: captions} say what the table says"
    subset(big/'m.csv', tmp_path/'s', per_class=3, splits=('train',))
    m, s = read(tmp_path/'s'), tmp_path/'s'
    labels = create('data', 'list', path=s/'lists'/'train.txt', root=s)
    assert {(r['path'], r['label']) for r in map(labels.row, range(len(labels)))} == {(r['path'], r['label']) for r in map(m.row, range(len(m)))}
    said = create('data', 'captions', path=s/'lists'/'train.json', root=s)
    assert sorted((r['path'], r['text']) for r in map(said.row, range(len(said)))) == sorted((r['path'], r['text']) for r in map(m.row, range(len(m))))


def test_what_is_missing_and_what_is_wrong(big, tmp_path, run):
    (big/'videos/train/02.mp4').unlink()
    code, said, _ = run('subset', big/'m.csv', tmp_path/'s', '--first', 4, '--splits', 'train')
    assert code == 1 and '02.mp4' in said and '1 files missing' in said
    assert Manifest.read(tmp_path/'s'/'manifest.csv', missing='drop').report['missing'] == ['videos/train/02.mp4']
    for args, why in ((['--n', 3, '--first', 3], 'one way'), ([], 'what is wanted'), (['--splits', 'tran'], "did you mean 'train'"), (['--ids', 'train99'], 'unknown id'),
                      (['--n', -1], 'above 0'), (['--n', 2, '--files', 'move'], "unknown --files")):
        code, _, err = run('subset', big/'m.csv', tmp_path/'x', *args)
        assert code == 2 and why in err and not (tmp_path/'x').exists(), err
    code, _, err = run('subset', big/'m.csv', big, '--n', 2)
    assert code == 2 and 'folder of its own' in err
