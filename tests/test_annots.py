"""Manifests from bad and good files, and the importers on small official-looking folders."""
import json, os, pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from vidlab.data import annots as A
from vidlab.data.manifest import _paths, inside_root
from vidlab.data.sets.lists import _short_folders
from vidlab.data.annots import Manifest


@pytest.fixture
def videos(tmp_path):
    for i in range(10): (tmp_path/f'{i}.mp4').touch()
    return tmp_path


BAD = {   # name -> (file name, content, words the error must hold)
    'missing column':  ('m.csv', 'pth,text\n0.mp4,a\n', ["'pth'", "did you mean 'path'"]),
    'unusual name':    ('m.csv', 'paht,caption\n0.mp4,a\n', ["did you mean 'path'"]),
    'misspelt column': ('m.csv', 'path,txet\n0.mp4,a\n', ["did you mean 'text'"]),
    'two alike':       ('m.csv', 'path,text,text\n0.mp4,a,b\n', ["two columns are called 'text'"]),
    'index column':    ('m.csv', ',path\n0,0.mp4\n', ['index=False']),
    'nan caption':     ('m.csv', 'path,text\n0.mp4,a\n1.mp4,\n', ['row 2', "'text'", 'empty or NaN']),
    'nan in json':     ('m.jsonl', '{"path": "0.mp4", "text": "a"}\n{"path": "1.mp4", "text": NaN}\n',
                        ['row 2', 'NaN']),
    'the word nan':    ('m.csv', 'path,text\n0.mp4,a\n1.mp4,nan\n', ['row 2']),
    'no path':         ('m.csv', 'path,text\n0.mp4,a\n ,b\n', ['row 2', "'path'"]),
    'absolute path':   ('m.csv', 'path\n0.mp4\n/etc/passwd\n', ['row 2', "'/etc/passwd'", 'outside the root']),
    'way out':         ('m.csv', 'path\n0.mp4\nx/../../0.mp4\n', ['row 2', 'outside the root']),
    'windows way out': ('m.csv', 'path\n0.mp4\n..\\0.mp4\n', ['row 2']),
    'missing video':   ('m.csv', 'path\n0.mp4\n77.mp4\n', ['1 of 2 videos are missing', "'77.mp4'", "missing='drop'"]),
    'start no number': ('m.csv', 'path,start\n0.mp4,1\n1.mp4,0:10\n', ['row 2', "'start'", "'0:10'"]),
    'start negative':  ('m.csv', 'path,start\n0.mp4,-1\n', ['row 1', "'start'"]),
    'start infinite':  ('m.csv', 'path,start\n0.mp4,inf\n', ['row 1']),
    'end first':       ('m.csv', 'path,start,end\n0.mp4,0,2\n1.mp4,5,2\n', ['row 2', '5..2']),
    'empty range':     ('m.csv', 'path,start,end\n0.mp4,5,5\n', ['row 1']),
    'id of two clips': ('m.csv', 'id,path\na,0.mp4\nb,1.mp4\na,2.mp4\n', ['rows 1 and 3', "'a'", "'path'"]),
    'id of two times': ('m.csv', 'id,path,start\na,0.mp4,1\na,0.mp4,2\n', ['rows 1 and 2', "'start'"]),
    'id once timed':   ('m.csv', 'id,path,start\na,0.mp4,\na,0.mp4,2\n', ['rows 1 and 2', "'start'"]),
    'no id':           ('m.csv', 'id,path\na,0.mp4\n,1.mp4\n', ['row 2', "'id'"]),
    'negative class':  ('m.csv', 'path,label\n0.mp4,1\n1.mp4,-4\n', ['row 2', "'label'", '-4']),
    'field too many':  ('m.csv', 'path,text\n0.mp4,a\n1.mp4,a, b\n', ['row 2 (line 3)', '3 fields', 'quotes']),
    'field too few':   ('m.csv', 'path,text\n0.mp4\n', ['row 1', '1 fields']),
    'tsv fields':      ('m.tsv', 'path\ttext\n0.mp4\ta\tb\n', ['row 1', '3 fields']),
    'open quote':      ('m.csv', 'path,text\n0.mp4,"a\n', ['m.csv', 'line']),
    'not utf-8':       ('m.csv', 'path,text\n0.mp4,a\n1.mp4,caf\xe9\n'.encode('latin-1'),
                        ['line 3', 'utf-8', 'encoding=']),
    'jsonl not utf-8': ('m.jsonl', b'{"path": "0.mp4"}\n{"path": "\xff.mp4"}\n', ['line 2']),
    'utf-16':          ('m.csv', 'path,text\n0.mp4,a\n'.encode('utf-16'), ['line 1']),
    'empty':           ('m.csv', '', ['empty']),
    'blank first':     ('m.csv', '\npath\n0.mp4\n', ['first line is empty']),
    'only a header':   ('m.csv', 'path,text\n', ['no rows']),
    'empty jsonl':     ('m.jsonl', '\n', ['empty']),
    'broken json':     ('m.jsonl', '{"path": "0.mp4"}\n{"path"\n', ['line 2', 'JSON']),
    'json list':       ('m.jsonl', '["0.mp4"]\n', ['line 1', 'list']),
    'no parquet':      ('m.parquet', 'path\n', ['parquet']),
    'other ending':    ('m.doc', 'x', ['.parquet']),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files(videos, name):
    file, content, words = BAD[name]
    (videos/file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as e: Manifest.read(videos/file)
    for w in words: assert w in str(e.value), f'{w!r} not in: {e.value}'
    assert file in str(e.value) or name == 'other ending'


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError): Manifest.read(tmp_path/'m.csv')


GOOD = {  # name -> (file name, content, captions expected)
    'bom and crlf':   ('m.csv', '\ufeffpath,text\r\n0.mp4,a\r\n1.mp4,"b, c"\r\n', ['a', 'b, c']),
    'semicolons':     ('m.csv', 'Path;TEXT\n0.mp4;"a;\nb"\n;\n', ['a;\nb']),
    'blank lines':    ('m.csv', 'path,text\n\n0.mp4,a\n\n', ['a']),
    'quoted newline': ('m.csv', 'path,text\n0.mp4,"a\nb"\n', ['a\nb']),
    'tsv':            ('m.tsv', 'path\ttext\n0.mp4\ta, "b" c\n'.replace('"b"', 'b'), ['a, b c']),
    'json numbers':   ('m.jsonl', '{"path": "0.mp4", "text": "a", "start": 1, "end": 2.5}\n', ['a']),
    'json later key': ('m.jsonl', '{"path": "0.mp4"}\n{"path": "1.mp4", "text": "b", "label": 3}\n{"path": "2.mp4", '
                                  '"label": 1}', None),
    'no text':        ('m.csv', 'path,text\n0.mp4,\n1.mp4,\n', [None, None]),
    'label, no text': ('m.csv', 'path,text,label\n0.mp4,a,\n1.mp4,,2\n', ['a', None]),
    'another split':  ('m.csv', 'path,text,split\n0.mp4,a,train\n1.mp4,,test\n', ['a', None]),
    'dots inside':    ('m.csv', 'path,text\n./x/../0.mp4,a\n', ['a']),
}


@pytest.mark.parametrize('name', GOOD)
def test_good_files(videos, name):
    file, content, texts = GOOD[name]
    (videos/file).write_bytes(content.encode())
    if name == 'json later key':
        with pytest.raises(ValueError, match='row 1'): Manifest.read(videos/file)
        return
    m = Manifest.read(videos/file)
    assert [m.row(i)['text'] for i in range(len(m))] == texts
    assert all(os.path.exists(m.row(i)['path']) for i in range(len(m)))


def test_duplicates(videos):
    cols = dict(path=['0.mp4', '1.mp4', '0.mp4'], text=['a', 'b', 'a'])
    assert Manifest.build(cols, videos).report['duplicates'] == 1
    assert len(Manifest.build(cols, videos, duplicates='drop')) == 2
    with pytest.raises(ValueError, match='row 3 repeats row 1'): Manifest.build(cols, videos, duplicates='error')
    assert Manifest.build(dict(path=['0.mp4']*2, text=['a', 'b'], ), videos,
                          duplicates='error').report['duplicates'] == 0
    with pytest.raises(ValueError, match='duplicates'): Manifest.build(cols, videos, duplicates='warn')


def test_missing_policies(videos):
    cols = dict(path=['0.mp4', '0.mp4', 'gone.mp4', '1.mp4', 'd/gone2.mp4'], text=list('abcde'))
    m = Manifest.build(cols, videos, missing='drop')
    assert (len(m), m.report['missing'], m.report['dropped_rows']) == (3, ['gone.mp4', 'd/gone2.mp4'], 2)
    assert len(Manifest.build(cols, videos, missing='keep')) == 5
    with pytest.raises(ValueError, match='missing_limit'):
        Manifest.build(cols, videos, missing='drop', missing_limit=.4)
    with pytest.raises(ValueError, match='missing policy'): Manifest.build(cols, videos, missing='ignore')


def test_root(videos, tmp_path):
    "Paths may be relative to the table's folder, to a root, or absolute inside the root"
    (videos/'tables').mkdir()
    (videos/'tables'/'m.csv').write_text(f'path\n0.mp4\n{videos}/1.mp4\n')
    m = Manifest.read(videos/'tables'/'m.csv', root=videos)
    assert m.column('path').to_pylist() == ['0.mp4', '1.mp4']
    with pytest.raises(ValueError): Manifest.read(videos/'tables'/'m.csv')


def test_labels_of_two_files(videos):
    a = Manifest.build(dict(path=['0.mp4', '1.mp4'], label=['run', 'swim']), videos)
    assert (a.classes, a.label_kind) == (['run', 'swim'], 'class')
    b = Manifest.build(dict(path=['0.mp4'], label=['swim']), videos, classes=a.classes)
    assert b.row(0)['label'] == 1 and b.row(0)['label_name'] == 'swim' and b.classes == ['run', 'swim']
    with pytest.raises(ValueError, match="'swin' is not in the class list"):
        Manifest.build(dict(path=['0.mp4'], label=['swin']), videos, classes=a.classes)
    with pytest.raises(ValueError, match='label kind'):
        Manifest.build(dict(path=['0.mp4'], label=['1']), videos, label='klass')
    with pytest.raises(ValueError, match="row 1, column 'label': 'x'"):
        Manifest.build(dict(path=['0.mp4'], label=['x']), videos, label='float')


@pytest.mark.parametrize('label,kind,want', [(['3', '', '1'], 'class', [3, None, 1]),
                                             (['1 4', '', '2'], 'several', [[1, 4], None, [2]]),
                                             ([0.5, None, 3.0], 'float', [.5, None, 3.]),
                                             ([[1, 4], [2], [0]], 'several', [[1, 4], [2], [0]]),
                                             (np.array([1, 2, 0]), 'class', [1, 2, 0])])
@pytest.mark.parametrize('ext', A.FORMATS)
def test_label_kinds_survive(videos, label, kind, want, ext):
    m = Manifest.build(dict(path=['0.mp4', '1.mp4', '2.mp4'], label=label), videos)
    back = Manifest.read(m.write(videos/f'm{ext}'))
    for o in (m, back): assert o.label_kind == kind and [o.row(i)['label'] for i in range(3)] == want
    assert back.hash() == m.hash()


text = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), min_size=1,
               max_size=20).filter(lambda s: s.strip() and s not in ('nan', 'NaN'))
rows = st.lists(st.tuples(st.integers(0, 9), text, st.sampled_from(['train', 'test', 'val']),
                          st.one_of(st.none(), st.integers(0, 99)),
                          st.one_of(st.none(), st.floats(0, 1e4))), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows)
def test_round_trip(videos, rows):
    "Every format gives back what went in: any Unicode caption, quotes, newlines, times to the last bit"
    cols = dict(path=[f'{r[0]}.mp4' for r in rows], text=[r[1] for r in rows], split=[r[2] for r in rows],
                label=[r[3] for r in rows], start=[r[4] for r in rows], note=[r[1] for r in rows])
    m = Manifest.build(cols, videos)
    for ext in A.FORMATS:
        back = Manifest.read(m.write(videos/f'm{ext}'))
        assert back.hash() == m.hash()
        assert [back.row(i) for i in range(len(m))] == [m.row(i) for i in range(len(m))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(['..', '.', 'a', 'b.mp4', '', '...', '..a', '\\', '..\\..']), min_size=1, max_size=6))
def test_paths_stay_inside(parts):
    p = '/'.join(parts)
    got = inside_root(p, '/data/set')
    if got is not None:
        assert os.path.normpath(os.path.join('/data/set', got)).startswith('/data/set')
        assert not got.startswith('/')
    elif not p.startswith('/') and '\\' not in p:
        assert not (os.path.normpath(os.path.join('/data/set', p)) + '/').startswith('/data/set/')


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_groups(ids):
    m = Manifest.build(dict(id=[f'i{i}' for i in ids], path=[f'{i}.mp4' for i in ids],
                            text=[str(i) for i in range(len(ids))]), '.', missing='keep')
    g, seen = m.groups(), list(dict.fromkeys(ids))
    assert len(g) == len(seen)
    assert [g.rows(i).tolist() for i in range(len(g))] == [[j for j, o in enumerate(ids) if o == s] for s in seen]
    assert g.first.tolist() == [ids.index(s) for s in seen]
    assert g.code.tolist() == [seen.index(o) for o in ids]


def test_buffers_not_lists(videos):
    "Nothing in a manifest is a Python list that forked workers would copy page by page"
    import pyarrow as pa
    m = Manifest.build(dict(path=['0.mp4', '1.mp4'], text=['a', 'b'], label=[[1, 2], [3]], note=['x', 'y']), videos)
    assert all(isinstance(v, (pa.Array, np.ndarray)) and getattr(v, 'dtype', None) != object for v in m.cols.values())
    again = pickle.loads(pickle.dumps(m))
    assert again.hash() == m.hash() and again.row(1) == m.row(1)


def test_rows_and_select(videos):
    m = Manifest.build(dict(path=[f'{i}.mp4' for i in range(4)], text=list('abcd'),
                            split=['train', 'test', 'train', None]), videos)
    assert [m.row(i)['text'] for i in (0, -1)] == ['a', 'd']
    assert m.split('train').column('text').to_pylist() == ['a', 'c']
    assert m.select([3, 0]).column('text').to_pylist() == ['d', 'a'] and len(m.select(np.zeros(4, bool))) == 0
    for i in (4, -5):
        with pytest.raises(IndexError): m.row(i)
    with pytest.raises(ValueError, match="did you mean 'test'"): m.split('tests')
    with pytest.raises(ValueError, match="no column 'split'"):
        Manifest.build(dict(path=['0.mp4']), videos).split('train')
    assert m.hash() != m.select([1, 0, 2, 3]).hash()


# --- importers

def write_msvd(d, said, **lists):
    for s in ('train', 'val', 'test'): (d/f'{s}_list.txt').write_text('\n'.join(lists.get(s, [])))
    (d/'raw-captions.pkl').write_bytes(said if isinstance(said, bytes) else pickle.dumps(said))


class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.mark.parametrize('evil', [Call(os.system, 'true'), Call(eval, '1'), Call(getattr, 1, 'real'), np.float64(1),
                                  Path('x')], ids=['system', 'eval', 'getattr', 'numpy', 'path'])
def test_pickles_are_plain(tmp_path, evil):
    write_msvd(tmp_path, {'a': [['x']], 'b': evil})
    with pytest.raises(ValueError, match='raw-captions.pkl.*plain'): A.read_msvd(tmp_path, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_no_pickle(tmp_path, raw):
    (tmp_path/'x.pkl').write_bytes(raw)
    try: A.load_plain_pickle(tmp_path/'x.pkl')
    except ValueError as e: assert 'x.pkl' in str(e)


@pytest.mark.parametrize('said,words', [({'a': []}, 'must be a list'), ({'a': 'text'}, 'must be a list'),
                                        ({'a': [[1, 2]]}, 'list of words'), (['a'], 'not a dictionary'),
                                        ({'b': [['x']]}, "no caption: 'a'")])
def test_msvd_bad(tmp_path, said, words):
    (tmp_path/'a.mp4').touch()
    write_msvd(tmp_path, said, train=['a'])
    with pytest.raises(ValueError, match=words): A.read_msvd(tmp_path, tmp_path)


def test_msvd_policies(tmp_path):
    (tmp_path/'deep').mkdir(); (tmp_path/'deep'/'a.b.avi').touch(); (tmp_path/'c.mp4').touch()
    write_msvd(tmp_path, {k: [['one'], 'two words'] for k in ('a.b', 'c', 'gone')}, train=['a.b', 'gone'],
               test=['c', 'bare'])
    with pytest.raises(ValueError, match='bare'): A.read_msvd(tmp_path, tmp_path)
    m = A.read_msvd(tmp_path, tmp_path, missing='drop')
    assert (m.report['missing'], m.report['without_caption'], m.report['dropped_rows']) == (['gone'], ['bare'], 2)
    assert m.column('path').to_pylist() == ['deep/a.b.avi']*2 + ['c.mp4']*2 and m.splits() == {'train': 2, 'test': 2}
    (tmp_path/'c.mkv').touch()
    with pytest.raises(ValueError, match="two files for the video 'c'"): A.read_msvd(tmp_path, tmp_path, missing='drop')
    (tmp_path/'val_list.txt').unlink()
    with pytest.raises(FileNotFoundError, match='val_list.txt'): A.read_msvd(tmp_path, tmp_path)


def test_msvd_json(tmp_path):
    "raw-captions.json needs no pickle"
    (tmp_path/'a.mp4').touch(); (tmp_path/'test_list.txt').write_text('a\n')
    (tmp_path/'raw-captions.json').write_text('{"a": ["a dog", ["it", "barks"]]}')
    assert A.read_msvd(tmp_path, tmp_path, splits=['test']).column('text').to_pylist() == ['a dog', 'it barks']


@pytest.mark.parametrize('line,words', [('a\t1\t2\t3\tx', 'row 2 has 5 fields'),
                                        ('a\t1\t2\t3\t4\tx\ty', 'row 2 has 7 fields'), ('a b c', 'row 2 has 1 fields')])
def test_lsmdc_bad(tmp_path, line, words):
    for n in A.LSMDC.values(): (tmp_path/n).write_text('ok\t0\t1\t0\t1\tHe sits.\n' + line)
    with pytest.raises(ValueError, match=words): A.read_lsmdc(tmp_path, tmp_path)


def test_lsmdc_not_utf8(tmp_path):
    for n in A.LSMDC.values(): (tmp_path/n).write_bytes(b'a\t0\t1\t0\t1\tcaf\xe9\n')
    with pytest.raises(ValueError, match='line 1'): A.read_lsmdc(tmp_path, tmp_path)


@pytest.mark.parametrize('data,words', [({}, 'sentences'), ({'sentences': [{'caption': 'x'}]}, 'video_id'),
                                        ([], 'sentences'), ('{', 'JSON')])
def test_msrvtt_bad(tmp_path, data, words):
    (tmp_path/'MSRVTT_train.9k.csv').write_text('video_id\nvideo0\n')
    (tmp_path/'MSRVTT_data.json').write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=words): A.read_msrvtt(tmp_path, tmp_path, test_csv=None)


def test_msrvtt_columns(tmp_path):
    (tmp_path/'MSRVTT_JSFUSION_test.csv').write_text('key,vid,sentences\nr,v,x\n')
    with pytest.raises(ValueError, match="no column 'video_id'; nearest: vid"):
        A.read_msrvtt(tmp_path, tmp_path, train_csv=None)
    with pytest.raises(FileNotFoundError, match='nearest there: MSRVTT_JSFUSION_test.csv'):
        A.read_msrvtt(tmp_path, tmp_path, train_csv=None, test_csv='MSRVTT_JSFUSION_tests.csv')


def test_paragraph_bad(tmp_path):
    (tmp_path/'train_ids.json').write_text('["v_a"]')
    (tmp_path/'train.json').write_text('{"v_a": {"sentences": ["x"]}}')
    with pytest.raises(ValueError, match="'v_a' needs 'sentences' and 'duration'"):
        A.read_activitynet(tmp_path, tmp_path, splits=['train'])
    (tmp_path/'val_list.txt').write_text('a.mp4\n'); (tmp_path/'val_data.json').write_text('[{"video": "a.mp4"}]')
    with pytest.raises(ValueError, match='entry 1'): A.read_didemo(tmp_path, tmp_path, splits=['val'])
    with pytest.raises(ValueError, match='split'): A.read_activitynet(tmp_path, tmp_path, splits=['test'])


def test_folders(tmp_path):
    for p in ['a/1.mp4', 'a/2.MOV', 'b/1.webm', 'b/notes.txt', '.hidden/x.mp4', 'b/.y.mp4']:
        (tmp_path/p).parent.mkdir(exist_ok=True); (tmp_path/p).touch()
    os.symlink(tmp_path, tmp_path/'a'/'loop')                                    # a link back up must not loop for ever
    assert A.from_folder(tmp_path).column('path').to_pylist() == ['a/1.mp4', 'a/2.MOV', 'b/1.webm']
    m = A.from_class_folders(tmp_path, split='train')
    assert m.classes == ['a', 'b'] and m.column('label').tolist() == [0, 0, 1] and m.splits() == {'train': 3}
    assert A.from_class_folders(tmp_path, classes=['b', 'c', 'a']).column('label').tolist() == [2, 2, 0]
    (tmp_path/'top.mp4').touch()
    with pytest.raises(ValueError, match="'top.mp4' lies in no class folder"): A.from_class_folders(tmp_path)
    with pytest.raises(ValueError, match='no such folder'): A.from_folder(tmp_path/'nowhere')


def test_folder_name_not_utf8(tmp_path):
    try: open(os.fsencode(tmp_path) + b'/caf\xe9.mp4', 'w').close()
    except OSError: pytest.skip('this file system takes only valid UTF-8')
    with pytest.raises(ValueError, match='not valid UTF-8'): A.from_folder(tmp_path)


def test_wide_fields(videos):
    "A transcript of 300 kB in one field"
    m = Manifest.build(dict(path=['0.mp4'], asr=['x'*300_000]), videos)
    assert len(Manifest.read(m.write(videos/'m.csv')).row(0)['asr']) == 300_000


# --- lists that many systems share

@pytest.mark.parametrize('said,words', [('{"a": 5}', 'captions of'), ('[1]', 'holds a list'), ('{"a": ["x", 3]}', 'a caption of'),
                                        ('{"a": []}', "no caption: 'a'"), ('{', 'JSON'), ('{"../a": "x"}', 'outside the root')])
def test_captions_bad(tmp_path, said, words):
    (tmp_path/'c.json').write_text(said)
    with pytest.raises(ValueError, match=words): A.read_captions(tmp_path/'c.json', tmp_path)


def test_captions(tmp_path):
    for n in ('a.mp4', 'b.avi', 'v_1.5'): (tmp_path/n).touch()
    (tmp_path/'c.json').write_text(json.dumps({'b.avi': ['x', 'y'], 'a': 'z', 'gone.mp4': 'w', 'v_1.5': ['q'], 'bare': []}))
    m = A.read_captions(tmp_path/'c.json', tmp_path, split='test', missing='drop')
    assert [(r['id'], Path(r['path']).name, r['text']) for r in map(m.row, range(len(m)))] == [
        ('b.avi', 'b.avi', 'x'), ('b.avi', 'b.avi', 'y'), ('a', 'a.mp4', 'z'), ('v_1.5', 'v_1.5', 'q')]
    assert (m.report['missing'], m.report['without_caption'], m.splits()) == (['gone.mp4'], ['bare'], {'test': 4})
    assert len(A.read_captions(tmp_path/'c.json', tmp_path, paragraph=True, missing='drop')) == 3


LINES = {  # text of the list, options, words of the error
    'number': ('a.mp4 x\n', dict(label_offset=1), "row 1: label 'x'"), 'negative': ('a.mp4 0\n', dict(label_offset=-1), 'label -1'),
    'cover': ('a.mp4 0\na.mp4 2\n', dict(classes=['x', 'y']), 'row 2: label 2.*holds 2 names'),
    'cover several': ('a.mp4 0 2\n', dict(fields='path labels', classes=['x', 'y']), 'label 2 is not a class'),
    'name': ('a.mp4 z\n', dict(classes=['x', 'y']), "'z' is not in the class list"),
    'short': ('a.mp4\n', {}, 'row 1 has 1 fields, not 2'), 'long': ('a.mp4 1 2\n', {}, "'path labels'"),
    'commas': ('a.mp4,1,2\n', dict(sep=','), 'row 1 has 3 fields'), 'empty': ('\n', {}, 'no rows'),
    'field': ('a.mp4 1\n', dict(fields='path lable'), "did you mean 'label'"), 'no path': ('1\n', dict(fields='label'), "'path' once"),
    'both': ('a.mp4 1 2\n', dict(fields='path label labels'), 'instead of'),
    'frames': ('folder 3 1\n', dict(fields='path frames label'), r"folder \(1 of 3\)")}


@pytest.mark.parametrize('name', LINES)
def test_list_bad(tmp_path, name):
    text, kw, words = LINES[name]
    (tmp_path/'a.mp4').touch(); (tmp_path/'folder').mkdir(); (tmp_path/'folder'/'1.jpg').touch()
    (tmp_path/'l.txt').write_text(text)
    with pytest.raises(ValueError, match=words): A.read_list(tmp_path/'l.txt', tmp_path, **kw)


def test_list(tmp_path):
    for n in ('a b/1.mp4', 'c.webm', 'folder/1.jpg', 'folder/2.jpg'):
        (tmp_path/n).parent.mkdir(exist_ok=True); (tmp_path/n).touch()
    def read(text, **kw):
        (tmp_path/'l.txt').write_text(text)
        return A.read_list(tmp_path/'l.txt', tmp_path, **kw)
    assert read('a b/1.mp4 3\nc.webm 0\n').column('label').tolist() == [3, 0]
    m = read('a b/1.mp4 2\nc.webm 1\n', label_offset=-1, classes=['x', 'y', 'z'], split='val')
    assert (m.column('label').tolist(), m.classes, m.row(0)['label_name']) == ([1, 0], ['x', 'y', 'z'], 'y')
    assert read('a b/1.mp4 y\nc.webm x\n', classes=['x', 'y']).column('label').tolist() == [1, 0]
    m = read('file,label\n"a b/1.mp4",0.5\nc.webm,3\n', sep=',', header=True, label='float')
    assert (m.label_kind, m.column('label').tolist()) == ('float', [.5, 3.])
    assert read('c.webm 1 4\nc.webm 2\n', fields='path labels').column('label').to_pylist() == [[1, 4], [2]]
    m = read('folder 2 5\n', fields='path frames label')
    assert (m.row(0)['path'], m.row(0)['frames'], m.row(0)['label']) == (str(tmp_path/'folder'), '2', 5)
    m = read('folder 2 5\nfolder 3 5\n', fields='path frames label', missing='keep')
    assert len(m) == 2
    assert read('a dog\tc.webm\n', fields='text path', sep='\t').row(0)['text'] == 'a dog'


def test_frame_folders_drop(tmp_path):
    for n in ('v1/000001.jpg', 'v1/000002.jpg', 'v2/000001.jpg'): (tmp_path/n).parent.mkdir(exist_ok=True); (tmp_path/n).touch()
    (tmp_path/'l.csv').write_text('v1,2\nv2,2\nv3,9\n')
    m = A.read_frame_folders(tmp_path/'l.csv', tmp_path, missing='drop')
    assert (m.column('id').to_pylist(), m.report['missing'], m.report['short_folders']) == (['v1'], ['v3'], ['v2 (1 of 2)'])


def test_class_names(tmp_path):
    f = tmp_path/'c.txt'
    f.write_text('\ufeffrun\r\njump high\r\n\r\n')
    assert A.read_class_names(f) == ['run', 'jump high']
    for text, words in (('', 'empty'), ('a\n\nb', 'line 2 is empty'), ('a\nb\nb', 'line 3 repeats'), ('\na', 'line 1')):
        f.write_text(text)
        with pytest.raises(ValueError, match=words): A.read_class_names(f)
    with pytest.raises(FileNotFoundError, match='nearest there: c.txt'): A.read_class_names(tmp_path/'cc.txt')


@pytest.mark.parametrize('head', ['videoid,contentUrl,duration,page_dir,name', 'name,page_idx,page_dir,videoid,contentUrl,duration'])
def test_webvid(tmp_path, head):
    (tmp_path/'00').mkdir(); (tmp_path/'00'/'5.mp4').touch()
    row = dict(videoid='5', contentUrl='u', duration='PT10S', page_dir='00', page_idx='3', name='"Sea, at night"')
    (tmp_path/'w.csv').write_text(head + '\n' + ','.join(row[k] for k in head.split(',')) + '\n')
    r = A.read_webvid(tmp_path/'w.csv', tmp_path, split='train').row(0)
    assert (r['id'], r['path'], r['text'], r['split']) == ('5', str(tmp_path/'00'/'5.mp4'), 'Sea, at night', 'train')
    (tmp_path/'w.csv').write_text('video,page_dir,name\n1,2,3\n')
    with pytest.raises(ValueError, match="no column 'videoid'; nearest: video"): A.read_webvid(tmp_path/'w.csv', tmp_path)


@given(st.lists(st.text('ab./\\:\0 ', min_size=1, max_size=8), min_size=1, max_size=5))
def test_paths_fast_and_slow_agree(paths):
    "Names that need no tidying are passed over; the result is that of looking at each"
    paths = [p for p in paths if p.strip()] or ['a']
    each = [inside_root(p, '/r') for p in paths]
    try: got = _paths(paths, '/r', 's').to_pylist()
    except ValueError: assert None in each; return
    assert got == each


# ---- recognition ----------------------------------------------------------------------------------------------------

def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for n, text in files.items(): (folder/n.replace('__', '.').replace('_dash_', '-')).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


@pytest.mark.parametrize('file,words', [('label,youtube_id\na,b\n', "no column 'time_start'"), ('label,youtube_id,time_start,time_end,split\na,b,x,9,val\n', 'not a number of seconds')])
def test_kinetics_bad(tmp_path, file, words):
    with pytest.raises(ValueError, match=words): A.read_kinetics(put(tmp_path, k__csv=file)/'k.csv', tmp_path)


def test_kinetics(tmp_path):
    "Three ways to name a file, sorted classes, what is missing by its name"
    put(tmp_path, k__csv='label,youtube_id,time_start,time_end,split,is_cc\nrun,a,0,10,val,0\nbow,b,3,13,val,1\nrun,c,7.0,17,val,0\n')
    (tmp_path/'v'/'run').mkdir(parents=True)
    for n in ('run/a_000000_000010.mp4', 'b.mkv'): (tmp_path/'v'/n).touch()
    m = A.read_kinetics(tmp_path/'k.csv', tmp_path/'v', missing='drop', split='test')
    assert m.report['missing'] == ['c_000007_000017.mp4'] and m.splits() == {'test': 2} and m.column('label').tolist() == [1, 0]
    with pytest.raises(ValueError, match='c_000007_000017'): A.read_kinetics(tmp_path/'k.csv', tmp_path/'v')
    put(tmp_path, k__json={'a': dict(annotations=dict(label='run', segment=[0, 10]))})
    with pytest.raises(ValueError, match='subset'): A.read_kinetics(tmp_path/'k.json', tmp_path/'v')


def test_something(tmp_path):
    "Labels in the order of their numbers, not of the file or the alphabet; both versions; a class that is not listed"
    put(tmp_path, labels__json={'B something': '1', 'A something': '2', 'C something': '0'},
        train__json=[dict(id='1', template='A [something]', label='a cup', placeholders=['cup'])], validation__json=[dict(id=2, template='D [something]', label='a')])
    m = A.read_something(tmp_path, tmp_path, ['train'], missing='keep')
    assert m.classes == ['C something', 'B something', 'A something'] and m.row(0)['label'] == 2 and m.row(0)['path'].endswith('1.webm') and m.row(0)['text'] == 'a cup'
    with pytest.raises(ValueError, match="'D something' is not in the class list of 3"): A.read_something(tmp_path, tmp_path, missing='keep')
    with pytest.raises(ValueError, match="did you mean 'val'"): A.read_something(tmp_path, tmp_path, ['vall'])
    with pytest.raises(ValueError, match='place for its number'): A.read_something(tmp_path, tmp_path, ['train'], template='x.jpg', missing='keep')
    put(tmp_path, labels__json={'A something': '1'})
    with pytest.raises(ValueError, match='not 0 to 0'): A.read_something(tmp_path, tmp_path, ['train'])
    old = put(tmp_path/'v1', **{'sth-v1-labels__csv': 'Tearing it\nHolding it\n', 'sth-v1-train__csv': '5;Holding it\n6\n'})
    with pytest.raises(ValueError, match='row 2 is not id;class'): A.read_something(old, old, ['train'])
    put(old, **{'copy-train__csv': 'x'})
    with pytest.raises(FileNotFoundError, match='2 files end in train.json or train.csv'): A.read_something(old, old, ['train'])


def test_ucf_and_hmdb(tmp_path):
    put(tmp_path, classInd__txt='1 Zoo\n2 Act\n', trainlist02__txt='Act/a.avi 2\nZoo/b.avi 1\n', testlist02__txt='Zoo/c.avi\n')
    m = A.read_ucf101(tmp_path, tmp_path, 2, missing='keep')
    assert m.column('label').tolist() == [1, 0, 0] and m.classes == ['Zoo', 'Act'] and m.splits() == dict(train=2, test=1)
    put(tmp_path, testlist02__txt='Zoology/c.avi\n')
    with pytest.raises(ValueError, match="'Zoology' is not in the class list of 2; nearest: Zoo"): A.read_ucf101(tmp_path, tmp_path, 2, missing='keep')
    put(tmp_path, classInd__txt='0 Zoo\n')
    with pytest.raises(ValueError, match='1 Name'): A.read_ucf101(tmp_path, tmp_path, 2)
    put(tmp_path, run_test_split3__txt='a #1.avi 1 \nb.avi 3\n')
    with pytest.raises(ValueError, match='row 2 does not end in 0, 1 or 2'): A.read_hmdb51(tmp_path, tmp_path, 3)
    with pytest.raises(FileNotFoundError, match='split1'): A.read_hmdb51(tmp_path, tmp_path)


def test_few_shot_is_a_function_of_seed_and_class(tmp_path):
    "Rows of a clip stay together; another class more or less changes nothing; a choice contains the smaller ones"
    def table(classes, caps=2): return A.Manifest.build(dict(id=[f'{c}-{i}' for c in classes for i in range(9) for _ in range(caps)], path=[f'{c}/{i}.mp4' for c in classes for i in range(9) for _ in range(caps)],
                                                             label=[c for c in classes for _ in range(9*caps)]), tmp_path, missing='keep')
    ids = lambda m: set(m.column('id').to_pylist())
    m = table([0, 1, 2]).few_shot(3, 7)
    assert len(m) == 18 and len(ids(m)) == 9 and np.bincount(m.column('label')).tolist() == [6]*3
    assert ids(table([0, 2]).few_shot(3, 7)) == {i for i in ids(m) if i[0] != '1'}
    for k in range(1, 9): assert ids(table([0, 1]).few_shot(k, 7)) < ids(table([0, 1]).few_shot(k + 1, 7))
    assert len(table([0]).few_shot(99)) == 18
    with pytest.raises(ValueError, match='0 clips'): table([0]).few_shot(0)


def test_mirrored_classes():
    names = ['Turning left', 'Turning right', 'Leftover soup', 'from left to right, Right side', 'from right to left, Left side']
    assert A.mirrored_classes(names).tolist() == [1, 0, 2, 4, 3]
    assert A.mirrored_classes([*names[:1], 'pulling it right out']).tolist() == [0, 1]          # without a partner: it stays


def test_listed_frames(tmp_path):
    (tmp_path/'a').mkdir()
    for i in (1, 2, 4): (tmp_path/'a'/f'{i:05d}.jpg').touch()
    read = lambda text, **kw: A.read_list(put(tmp_path, l__txt=text)/'l.txt', tmp_path, 'path frames label', template='{:05d}.jpg', **kw)
    assert read('a 2 0\n').row(0)['frames'] == '2'
    with pytest.raises(ValueError, match='2 of 4, no 00003.jpg'): read('a 4 0\n')
    absent = read('b 3 0\n', missing='keep')
    with pytest.raises(ValueError, match='0 of 3'): _short_folders(absent, 'l', 'error', .5, '{:05d}.jpg')
    with pytest.raises(ValueError, match="'x' is not a number of frames"): read('a x 0\n')
    with pytest.raises(ValueError, match='no row has 9 frames'): read('a 2 0\n', min_frames=9)
    assert A.pictures_of('{}.png', ['1.png', '2.png', '4.png']) == (['1.png', '2.png'], None)
    assert A.read_class_names(put(tmp_path, n__csv='id,name\n0,"a, b"\n1,c\n')/'n.csv') == ['a, b', 'c']
    assert A.read_class_names(put(tmp_path, n__csv='id,name\n1,a\n0,c\n')/'n.csv') == ['c', 'a']
    with pytest.raises(ValueError, match='not 0 to 1'): A.read_class_names(put(tmp_path, n__csv='id,name\n1,a\n3,c\n')/'n.csv')


def test_another_ending_or_another_folder(tmp_path):
    "An id finds its file whatever the ending; two files of one name, or one in another folder, are told"
    for n in ('1.MP4', '2.avi', '3.mkv', '3.mp4', 'sub/4.mp4'):
        (tmp_path/n).parent.mkdir(exist_ok=True)
        (tmp_path/n).touch()
    found = A.Manifest.build(dict(path=['1.mp4', '2']), tmp_path)
    assert found.column('path').to_pylist() == ['1.MP4', '2.avi'] and found.report['other_spelling'] == {'1.mp4': '1.MP4', '2': '2.avi'}
    with pytest.raises(ValueError, match="'3'"): A.Manifest.build(dict(path=['1.mp4', '3']), tmp_path)
    with pytest.raises(ValueError, match="elsewhere: 'sub/4.mp4'"): A.Manifest.build(dict(path=['4.mp4']), tmp_path)
    assert A.Manifest.build(dict(path=['4']), tmp_path).report['other_spelling'] == {'4': 'sub/4.mp4'}

def test_files_of_names_in_their_usual_forms(tmp_path):
    want = ['Archery', 'Arm wrestling', 'Biking']
    forms = dict(a__csv='action\nArchery\nArm wrestling\nBiking\n', b__txt='1 Archery\n2 Arm wrestling\n3 Biking\n', c__txt='0\tArchery\n1\tArm wrestling\n2\tBiking\n',
                 d__csv='name,id\nArchery,0\nArm wrestling,1\nBiking,2\n', e__txt='"Archery"\n"Arm wrestling"\n"Biking"\n')
    for name in forms: assert A.read_class_names(put(tmp_path, **{name: forms[name]})/name.replace('__', '.')) == want, name
    assert A.read_class_names(put(tmp_path, f__txt='action\n100 metres\n200 metres\n')/'f.txt') == ['action', '100 metres', '200 metres']

def test_class_folders_beside_splits(tmp_path):
    from vidlab.data.sets.folders import class_folders
    for n in ('train/run/1.mp4', 'val/run/2.mp4', 'samples/3.mp4'):
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/n).touch()
    with pytest.raises(ValueError, match='train, val are splits with folders of classes in them, and samples beside them is none'): class_folders(tmp_path)


def _coco(n, ask=lambda i: dict(coco_url=f'http://x.org/train2017/{i:012}.jpg', file_name='elsewhere.jpg')):
    return dict(info={}, images=[dict(id=100 + i, **ask(i)) for i in range(n)], annotations=[dict(id=k, image_id=100 + k % n, caption=f'caption {k}') for k in range(2*n + 1)])


@pytest.mark.parametrize('said,names', [
    (_coco(3), [f'train2017/{i:012}.jpg' for i in (0, 1, 2, 0, 1, 2, 0)]),
    (_coco(2, lambda i: dict(file_name=f'p{i}.jpg')), ['p0.jpg', 'p1.jpg', 'p0.jpg', 'p1.jpg', 'p0.jpg']),
    ([dict(image=f'/any/where/{i}.jpg', caption=f'caption {i}', dir_id=1 + i % 2) for i in range(3)], ['VG_100K/0.jpg', 'VG_100K_2/1.jpg', 'VG_100K/2.jpg']),
    ([dict(image='a/b.jpg', caption=['caption 0', 'caption 1'])], ['a/b.jpg']*2)], ids=['coco', 'coco without addresses', 'genome', 'plain list'])
def test_captions_of_pictures(said, names, tmp_path):
    "COCO's and Visual Genome's own files: rows in their order, pictures where the published loaders look"
    (tmp_path/'c.json').write_text(json.dumps(said))
    for n in names: (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).touch()
    m = A.read_captions(tmp_path/'c.json', tmp_path)
    assert [m.row(i)['path'] for i in range(len(m))] == [str(tmp_path/n) for n in names]
    assert m.column('text').to_pylist() == [f'caption {i}' for i in range(len(names))] and len(m.groups()) == len(set(names))
    whole = A.read_captions(tmp_path/'c.json', tmp_path, paragraph=True)
    assert whole.column('text').to_pylist() == [' '.join(f'caption {i}' for i, n in enumerate(names) if n == o) for o in dict.fromkeys(names)]


@pytest.mark.parametrize('said,word', [([dict(image='a.jpg')], "without 'caption'"), (dict(images=[dict(id=1)], annotations=[]), "without 'file_name'"),
                                       (dict(images=[], annotations=[dict(image_id=7, caption='x')]), 'without 7'), (['a'], 'holds a list, not')])
def test_captions_of_pictures_that_are_none(said, word, tmp_path):
    (tmp_path/'c.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match=word): A.read_captions(tmp_path/'c.json', tmp_path)


@pytest.mark.parametrize('header', [True, False])
def test_pairs_with_and_without_a_header(header, tmp_path):
    "Conceptual Captions begins with a pair; TVTS's lists with names. Commas stay, names without extension too when asked"
    rows = [('caption', 'file')]*header + [('a dog, asleep, at home', '0'), ('"the end"', '1.jpg'), ('a cat', '2')]
    (tmp_path/'c.tsv').write_text(''.join(f'{a}\t{b}\n' for a, b in rows))
    m = A.read_pairs(tmp_path/'c.tsv', tmp_path, header=header, ext='none', missing='keep')
    assert [(r['text'], r['path']) for r in map(m.row, range(len(m)))] == [('a dog, asleep, at home', f'{tmp_path}/0'), ('the end', f'{tmp_path}/1.jpg'), ('a cat', f'{tmp_path}/2')]
    assert len(A.read_pairs(tmp_path/'c.tsv', tmp_path, header=not header, missing='keep')) == (4 if header else 2)
