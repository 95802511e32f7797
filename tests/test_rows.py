"Tables as people have them, rows that are odd, and numbers that only look fine"
import io, json, math, os, shutil, tarfile, time
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import encode
from vidlab.data.manifest import Manifest, told_twice
from vidlab.data.tables import read_class_names, read_table
from vidlab.registry import create
from vidlab.train import load_manifest, make_config

ROWS = [(f'v/{i}.mp4', f'clip {i}, "é"') for i in range(6)]
SPLIT = [('train', 'val', 'test')[i//2] for i in range(6)]


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    d = tmp_path_factory.mktemp('rows')
    for i in range(6): encode(d/'v'/f'{i}.mp4', n=4, w=48, h=32, rate=8, light=lambda t: 30*i + 5*t)
    return d


def table(d, name, text, enc='utf-8'):
    (d/name).write_bytes(text if isinstance(text, bytes) else text.encode(enc))
    return d/name


def line(sep, values): return sep.join('"' + str(v).replace('"', '""') + '"' for v in values)
def text_of(sep, head, rows): return '\n'.join([sep.join(head), *(line(sep, r) for r in rows)]) + '\n'
def records(**names): return [{names.get(k, k): v for k, v in dict(path=p, text=t, split=s).items()} for (p, t), s in zip(ROWS, SPLIT)]
HEAD, FULL = ('path', 'text', 'split'), [(*r, s) for r, s in zip(ROWS, SPLIT)]
FORMS = {f'separator {s!r}': ('m.csv', text_of(s, HEAD, FULL), 'utf-8') for s in ',;\t| '} | {
    f'encoding {e}': ('m.csv', text_of(';', HEAD, FULL), e) for e in ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'latin-1')} | {
    'txt': ('m.txt', text_of('\t', HEAD, FULL), 'utf-8'), 'carriage returns': ('m.csv', text_of(',', HEAD, FULL).replace('\n', '\r\n'), 'utf-8'),
    'json': ('m.json', json.dumps(records()), 'utf-8'), 'json lines': ('m.ndjson', '\n'.join(map(json.dumps, records())), 'utf-8'),
    'json lines called json': ('m.json', '\n'.join(map(json.dumps, records())), 'utf-8'), 'json under a name': ('m.json', json.dumps(dict(info={}, videos=records())), 'utf-16'),
    'columns in json': ('m.json', json.dumps({k: [r[k] for r in records()] for k in HEAD}), 'utf-8'),
    "pandas' json": ('m.json', json.dumps({k: {str(i): r[k] for i, r in enumerate(records())} for k in HEAD}), 'utf-8'),
    'other names': ('m.json', json.dumps(records(path='Video Path', text='Caption', split='subset')), 'utf-8'),
    'ids': ('m.csv', text_of(',', ('video_id', 'sentence', 'split'), [(p[2:-4], t, s) for p, t, s in FULL]), 'utf-8'),
    'by id': ('m.json', json.dumps({r['path'][2:-4]: dict(description=r['text'], split=r['split']) for r in records()}), 'utf-8'),
    'backslashes': ('m.csv', text_of(',', HEAD, [(p.replace('/', '\\'), t, s) for p, t, s in FULL]), 'utf-8')}


@pytest.mark.parametrize('form', FORMS)
def test_a_table_is_read_in_a_run(videos, form, capsys):
    m = load_manifest(make_config(data='manifest', data_path=str(table(videos, *FORMS[form]))), 'val')
    assert [m.row(i)['path'] for i in range(2)] == [str(videos/p) for p, _ in ROWS[2:4]]
    assert m.column('text').to_pylist() == [t for _, t in ROWS[2:4]]


def test_whole_paths_need_no_root(videos, tmp_path):
    rows = [(str(videos/p), t, s) for p, t, s in FULL]
    cfg = dict(data='manifest', data_path=str(table(tmp_path, 'm.csv', text_of(',', HEAD, rows))))
    assert load_manifest(make_config(**cfg), 'val').row(0)['path'] == rows[2][0]
    with pytest.raises(ValueError, match='row 1.*outside the root folder.*leave video_root empty'): load_manifest(make_config(**cfg, video_root=str(tmp_path)), 'val')


@pytest.mark.parametrize('said', [json.dumps(['a "dog"', 'it barks']), "['a \"dog\"', 'it barks']"])
def test_a_list_of_captions_is_a_row_each(videos, said):
    m = Manifest.read(table(videos, 'm.csv', text_of(';', ('video', 'captions', 'n'), [('v/0.mp4', said, 1), ('v/1.mp4', '["one"]', 2)])))
    assert m.column('text').to_pylist() == ['a "dog"', 'it barks', 'one'] and m.column('n').to_pylist() == ['1', '1', '2'] and len(m.groups()) == 2
    plain = Manifest.read(table(videos, 'm.csv', text_of(';', ('video', 'caption'), [('v/0.mp4', '[music] a dog'), ('v/1.mp4', '["one"]')])))
    assert plain.column('text').to_pylist() == ['[music] a dog', '["one"]']


REFUSED = {'two files of a name': ('m.csv', 'video_id,text\nx,a\n', "'x'.*Files of such names lie elsewhere: '[ab]/x"), 'a caption with spaces between spaces': ('m.csv', 'path text\nv/0.mp4 a dog\n', 'fields with spaces in them need quotes'),
           'no header': ('m.csv', 'v/0.mp4,a dog\nv/1.mp4,b\n', "looks like a row.*data 'list'"), 'a note above': ('m.csv', 'my videos\npath,text\nv/0.mp4,a\n', "'my videos', is not the header"),
           'a spreadsheet': ('m.xlsx', b'PK', 'save its sheet as CSV'), 'packed': ('m.csv.gz', b'x', 'unpack it'), 'another system': ('m.csv', 'path\nC:\\v\\0.mp4\n', 'a path of another system'),
           'captions by name': ('m.json', '{"v/0.mp4": ["a"]}', "data 'captions'"), 'some are missing': ('m.csv', 'path\nv/0.mp4\nv/77.mp4\n', r"1 of 2 .*: 'v/77.mp4'. Take their rows out, or"),
           'all are missing': ('m.csv', 'path\nw/0.mp4\nw/1.mp4\n', 'Check video_root'), 'another split': ('m.csv', 'path,split\nv/0.mp4,training\n', "train_split: unknown split 'train'; did you mean 'training'"),
           'a group that is not there': ('m.csv', 'path,person\nv/0.mp4,a\n', "split_by 'persn'; did you mean 'person'")}

@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_read_says_the_one_thing_to_do(videos, tmp_path, what):
    name, text, said = REFUSED[what]
    shutil.copytree(videos/'v', tmp_path/'v')
    for d in 'ab': (tmp_path/d).mkdir(); (tmp_path/d/'x.mp4').touch()
    more = dict(split_by='persn') if 'group' in what else {}
    with pytest.raises(ValueError, match=said) as e: load_manifest(make_config(data='manifest', data_path=str(table(tmp_path, name, text)), **more), 'train')
    assert name in str(e.value)


def test_the_tool_speaks_of_its_options(videos, run):
    for text, said in (('recording,text\nv/0.mp4,a\n', '--columns recording=path'), ('path\nw.mp4\n', 'Check --root, or pass --missing drop')):
        code, out, err = run('make_manifest', 'table', '--root', videos, '--annots', table(videos, 'm.csv', text if 'record' not in text else text.replace('recording', 'paths')), '--out', videos/'out.csv')
        assert code == 1 and said.replace('recording', 'paths') in err, err
    code, out, err = run('make_manifest', 'table', '--root', videos, '--annots', table(videos, 'm.csv', 'Video,Caption\nv/0.mp4,a\n'), '--out', videos/'out.csv')
    assert code == 0 and 'Video is read as path, Caption is read as text; --columns says otherwise' in out


def test_groups_stay_together(videos):
    "And by the seed: the same table is dealt out alike, also when rows are added"
    def part(n, **kw):
        m = Manifest.build(dict(path=[f'{i}.mp4' for i in range(n)], person=[f'p{i//5}' for i in range(n)]), videos, missing='keep').shared(.2, .2, by='person', **kw)
        return {}, *({p: s for p, s in zip(m.cols[k].to_pylist(), m.cols['split'].to_pylist())} for k in ('person', 'path'))
    _, persons, paths = part(100)
    assert all(paths[f'{i}.mp4'] == persons[f'p{i//5}'] for i in range(100)) and {*persons.values()} == {'train', 'val', 'test'}
    assert all(part(200)[1][p] == s for p, s in persons.items()) and part(100, seed=1)[1] != persons


def test_pictures_counted_from_nothing(tmp_path):
    "A folder of a list whose first picture is 0; where both counts fit, the published one is meant"
    from PIL import Image
    from vidlab.data.clips import Clips
    from vidlab.data.sample import SegmentSampler
    for name, numbers in (('zero', range(4)), ('one', range(1, 5)), ('both', range(5))):
        (tmp_path/name).mkdir()
        for i in numbers: Image.new('RGB', (32, 32), (40*i,)*3).save(tmp_path/name/f'img_{i:05d}.png')
    table(tmp_path, 'l.txt', 'zero 4 0\none 4 1\nboth 4 0\n')
    m = create('data', 'list', path=tmp_path/'l.txt', root=tmp_path, fields='path frames label', template='img_{:05d}.png')
    ds = Clips(m, SegmentSampler(4), size=32)
    assert [(ds[i]['video'][:, 0, 0, 0]//40).tolist() for i in range(3)] == [[0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]


def test_points_in_the_keys_of_a_shard(videos, tmp_path, cache):
    from vidlab.data.index import index_video
    from vidlab.data.shards import from_shards
    with tarfile.open(tmp_path/'0.tar', 'w') as tar:
        for i in range(3):
            for end, data in (('mp4', (videos/'v'/f'{i}.mp4').read_bytes()), ('txt', f'clip {i}'.encode())):
                info = tarfile.TarInfo(f'film.2011.{i}.{end}'); info.size = len(data); tar.addfile(info, io.BytesIO(data))
    m = from_shards(tmp_path/'0.tar')
    assert m.column('text').to_pylist() == ['clip 0', 'clip 1', 'clip 2'] and index_video(m.row(1)['path']).n == 4


# ------------------------------------------------------------------------------------------- the same in two splits

def test_copies_and_captions_in_two_splits_are_told(videos, tmp_path):
    "By name, by content, by words; files of one size that differ are not"
    for i in range(3): shutil.copy(videos/'v'/f'{i}.mp4', tmp_path/f'{i}.mp4')
    shutil.copy(tmp_path/'0.mp4', tmp_path/'copy.mp4')
    data = bytearray((tmp_path/'1.mp4').read_bytes()); data[len(data)//2] ^= 255; (tmp_path/'other.mp4').write_bytes(data)
    m = Manifest.build(dict(path=['0.mp4', '1.mp4', '2.mp4', 'copy.mp4', 'other.mp4', '2.mp4'], text=['a', 'b', 'c', 'd', 'b', 'e'], split=['train']*3 + ['test']*3), tmp_path)
    said = told_twice({s: m.split(s) for s in ('train', 'test')}, 'train')
    assert len(said) == 3 and "1 video, '2.mp4'" in said[0] and "under other names, '0.mp4 = copy.mp4'" in said[1] and "1 of 3 captions of test" in said[2]
    assert len(told_twice({s: m.split(s) for s in ('train', 'test')}, 'train', content=False)) == 2 and told_twice({'test': m.split('test')}, 'train') == []


# --------------------------------------------------------------------------------------------------- numbers

def test_what_is_no_number_is_a_miss_in_every_task():
    "One clip of four says nothing: counted, never right, and the others are measured as before"
    from vidlab.metrics import dual_softmax, retrieval_metrics, same_class_retrieval, sorted_right
    from vidlab.tasks import MaskedTask, RecognitionTask, RegressionTask, SameClassTask
    from vidlab.tasks.recognition import average_precision
    nan, sid = float('nan'), torch.arange(4)
    part = dict(sid=sid, view=sid*0)
    reg = RegressionTask.score(None, dict(video=dict(part, logits=torch.tensor([[1.], [2.], [nan], [4.]]), target=sid.float())))['metrics']
    assert reg['nan_clips'] == 1 and all(math.isnan(reg[k]) for k in ('mse', 'mae', 'r2', 'spearman'))
    x = torch.tensor([[1., 0], [1, .1], [nan, nan], [0, 1]]); y = torch.tensor([0, 0, 1, 1])
    same = SameClassTask.score(None, dict(video=dict(part, video=x, label=y)))['metrics']
    assert same['nan_clips'] == 1 and same['v2v/R1'] == 50
    assert same_class_retrieval(torch.full((4, 2), nan), y)['R1'] == 0
    assert MaskedTask.score(None, dict(video=dict(part, align=torch.tensor([1., nan, 1, 1]))))['metrics']['nan_clips'] == 1
    order = torch.eye(3).repeat(2, 1, 1); order[0, 0] = nan
    assert sorted_right(order).tolist() == [[False, True, True], [True]*3]
    sim = torch.eye(4)*5; sim[1, 1] = nan
    for s in (sim, sim.numpy()):
        m = retrieval_metrics(dual_softmax(s))
        assert m['t2v/R1'] == 75 and m['t2v/nan_queries'] == 1
    prob = torch.tensor([[.9, .1], [nan, nan], [.2, .8]])
    assert average_precision(prob, torch.tensor([[1, 0], [1, 0], [0, 1]]), 'none').tolist() == pytest.approx([5/6, 1.])
    from vidlab.tasks.base import Evaluation
    e = Evaluation(dict(prob=prob, label=torch.tensor([0, 0, 1]), sid=torch.arange(3)), names=['a', 'b'])
    t = RecognitionTask.class_table(e)
    assert t['clips'].tolist() == [2, 1] and t['accuracy'].tolist() == [50, 100]


@pytest.mark.parametrize('n', [0, 1])
def test_a_contrastive_batch_of_one_compares_nothing(n):
    from vidlab.losses import contrastive
    with pytest.raises(ValueError, match=f'batch of {n} has nothing to compare'): contrastive(torch.zeros(n, n))


# --------------------------------------------------------------------------------------------------- class names

NAMES = ['Archery', 'Arm wrestling', '7 minutes']
LISTS = {'plain': '\n'.join(NAMES), 'from 0': ''.join(f'{i} {n}\n' for i, n in enumerate(NAMES)), 'from 1': ''.join(f'{i}\t{n}\n' for i, n in enumerate(NAMES, 1)), 'behind': ''.join(f'{n},{i}\n' for i, n in enumerate(NAMES)),
         'comma': ''.join(f'{i},{n}\n' for i, n in enumerate(NAMES)), 'header': 'id,name\n' + ''.join(f'{i},"{n}"\n' for i, n in enumerate(NAMES)), 'column': 'name\n' + '\n'.join(NAMES), 'quoted': ''.join(f'"{n}"\n' for n in NAMES),
         'out of order': ''.join(f'{i};{NAMES[i]}\n' for i in (2, 0, 1)), 'by name': json.dumps({n: i for i, n in enumerate(NAMES)}), 'by number': json.dumps({str(i): n for i, n in enumerate(NAMES)}), 'from 1 in json': json.dumps({n: i for i, n in enumerate(NAMES, 1)}),
         'a list': json.dumps(NAMES), 'of objects': json.dumps([dict(id=i, name=n) for i, n in enumerate(NAMES)])}

@pytest.mark.parametrize('form', LISTS)
@pytest.mark.parametrize('enc', ['utf-8-sig', 'utf-16'])
def test_a_file_of_class_names_in_any_usual_form(tmp_path, form, enc):
    name = 'c.json' if LISTS[form][0] in '{[' else 'c.csv'
    assert read_class_names(table(tmp_path, name, LISTS[form], enc)) == NAMES

@pytest.mark.parametrize('text,said', [('0 a\n2 b\n', 'not 0 to 1'), ('{"a": 0, "b": 2}', 'not 0 to 1'), ('{"a": 0, "b": "x"}', 'class names'), ('[1, 2]', 'class names'), ('a\na\n', 'repeats'), ('["a", "a"]', 'repeats'), ('caf\xe9\n'.encode('latin-1'), 'save the file as UTF-8$')])
def test_a_file_of_class_names_that_is_none(tmp_path, text, said):
    with pytest.raises(ValueError, match=said): read_class_names(table(tmp_path, 'c.json' if isinstance(text, str) and text[0] in '{[' else 'c.txt', text))


def classes_of(d, **kw):
    "{split: labels}, names of the classes, or what the error says"
    from vidlab.build import all_rows
    cfg = make_config(**{**dict(model='videomamba', preset='tiny', task='recognition', data='manifest', val_split=''), **kw})
    rows, names = all_rows(cfg)
    return {s: m.column('label').to_pylist() if hasattr(m.column('label'), 'to_pylist') else m.column('label').tolist() for s, m in rows.items()}, names


@pytest.fixture
def labelled(videos, tmp_path):
    "Folders of classes, tables for each split, a second set; test lacks the first class everywhere"
    shutil.copytree(videos/'v', tmp_path/'v')
    for s, cs in (('train', ('bird', 'cat', 'dog')), ('test', ('cat', 'dog'))):
        for c in cs: (tmp_path/'f'/s/c).mkdir(parents=True); shutil.copy(videos/'v'/'0.mp4', tmp_path/'f'/s/c/f'{c}.mp4')
        table(tmp_path/'v', f'{s}.csv', 'path,label\n' + ''.join(f'{i}.mp4,{c}\n' for i, c in enumerate(cs)))
        table(tmp_path/'v', f'{s}.txt', ''.join(f'{i}.mp4 {c}\n' for i, c in enumerate(cs)))
    table(tmp_path/'v', 'other.csv', 'path,label,split\n0.mp4,dog,test\n1.mp4,cat,test\n2.mp4,cat,train\n')
    table(tmp_path, 'names.txt', 'dog\nbird\ncat\n')
    return tmp_path

PLACES = {'folders': dict(data='class_folders', video_root='f'), 'a folder for each split': dict(data='class_folders', video_root='f/{split}'), 'a table for each split': dict(data_path='v/{split}.csv'),
          'a list for each split': dict(data='list', data_path='v/{split}.txt', video_root='v'), 'a second set': dict(data_path='v/{split}.csv', eval_data='manifest', eval_path='v/other.csv'),
          'a second set of folders': dict(data_path='v/{split}.csv', eval_data='class_folders', eval_root='f')}

@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('named', [False, True])
def test_a_name_is_one_number_in_every_split(labelled, where, named):
    "By the training rows, or in the order of the file of names; a name that is not there is told with the nearest"
    kw = {k: str(labelled/v) if k.endswith(('path', 'root')) else v for k, v in PLACES[where].items()}
    if named: kw['classes'] = str(labelled/'names.txt')
    rows, names = classes_of(labelled, **kw)
    assert names == (['dog', 'bird', 'cat'] if named else ['bird', 'cat', 'dog'])
    said = lambda s: [names[i] for i in rows[s]]
    assert said('train') == ['bird', 'cat', 'dog'] and said('test') == (['dog', 'cat'] if 'manifest' in kw.values() else ['cat', 'dog'])
    table(labelled, 'names.txt', 'dog\nbirds\ncat\n')
    if named:
        with pytest.raises(ValueError, match="'bird' is not in the class list of 3; nearest: birds"): classes_of(labelled, **kw)


@pytest.mark.parametrize('name,text', [('m.csv', 'path,label,split\n0.mp4,cat;dog,train\n1.mp4,dog,train\n2.mp4,cat,test\n'), ('m.csv', 'path,label,split\n0.mp4,dog | cat,train\n1.mp4,dog,train\n2.mp4,cat,test\n'),
                                       ('m.json', json.dumps([dict(path=f'{i}.mp4', labels=l, split=s) for i, l, s in ((0, ['cat', 'dog'], 'train'), (1, ['dog'], 'train'), (2, ['cat'], 'test'))]))])
def test_several_names_of_a_clip(videos, name, text):
    rows, names = classes_of(videos, data_path=str(table(videos/'v', name, text)))
    assert names == ['cat', 'dog'] and {s: [sorted(o) for o in v] for s, v in rows.items()} == dict(train=[[0, 1], [1]], test=[[0]])
    with pytest.raises(ValueError, match=r"row 1.*\('(cat|dog)'\) is not in the class list"): classes_of(videos, data_path=str(videos/'v'/name), classes='5')


@pytest.mark.parametrize('labels,said', [(('1.0', '0.0', '1.0'), "label='class' reads 1.0"), (('0.5', '1', '2'), "id 0.mp4: 0.5.*task 'regression'"), (('-1', '0', '1'), "'-1' is not a class number"), (('1', '2', '3'), 'label 3 is not a class'), (('1', '', '0'), "1 of 2 rows have no label.*id 1.mp4")])
def test_odd_labels_are_refused_by_row(videos, labels, said):
    file = table(videos/'v', 'm.csv', 'path,label,split\n' + ''.join(f'{i}.mp4,{l},{"test" if i == 2 else "train"}\n' for i, l in enumerate(labels)))
    with pytest.raises(ValueError, match=said): classes_of(videos, data_path=str(file), classes='3')
    if labels[0] == '1.0': assert classes_of(videos, data_path=str(file), classes='3', label='class')[0] == dict(train=[1, 0], test=[1])


# --------------------------------------------------------------------------------------------------- parameters

@pytest.mark.parametrize('key,value', [('lr', float('inf')), ('lr', float('nan')), ('optimizer', 'adm'), ('decoder', 'decrd'), ('callbacks', ['tensorbord']), ('augment', 'rcc'), ('augment', 'rrc-q3'), ('milestones', [2]), ('wave', [.1]), ('warmup', 2), ('keep_every', -1), ('layer_decay', 0.)])
def test_a_value_that_no_run_can_have_names_its_parameter(key, value):
    with pytest.raises(ValueError, match=f'^(unknown )?{key.removesuffix("s")}'): make_config(**{key: value})

def test_a_page_names_its_own_parameter(capsys):
    from vidlab.config import page_config, page_parameters
    for word, own, meant in (('resme', ('resume', 'nproc'), 'resume'), ('spilt', ('run', 'split'), 'split'), ('rnu', ('run', 'split'), 'run')):
        with pytest.raises(ValueError, match=f"unknown parameter '{word}'; did you mean '{meant}'"): page_parameters({word: 'x'}, own)
    assert page_config(dict(classes=10)).classes == '10'


# --------------------------------------------------------------------------------------------------- time

@pytest.mark.parametrize('what', ['label', 'word', 'columns', 'folder'])
def test_no_error_takes_longer_than_seconds(tmp_path, what):
    "A wrong label among 300,000, a wrong word among a million, a column too many of 2,000, a name in a full folder; and nobody reads a message of megabytes"
    from vidlab.core import unknown
    n = 300_000
    if what == 'label': f = lambda: Manifest.build(dict(path=['a.mp4']*n, label=[f'class {i}' for i in range(n)], id=[str(i) for i in range(n)]), tmp_path, missing='keep', classes=[f'class {i}' for i in range(n - 1)] + ['clas x'])
    elif what == 'word':
        words = [f'video{i:07d}' for i in range(1_000_000)]
        def f(): raise unknown('id', 'video05000x0', words)
    elif what == 'columns': f = lambda: Manifest.read(table(tmp_path, 'm.csv', ','.join(f'c{i}' for i in range(2000)) + '\n' + ','.join('x'*2000) + '\n'))
    else:
        from vidlab.data.tables import beside
        os_names = [f'clip_{i}.csv' for i in range(1_000_000)]
        def f(): raise ValueError(beside(tmp_path/'clip_7x.csv'))
        mp = pytest.MonkeyPatch(); mp.setattr('vidlab.data.tables.os.listdir', lambda p: os_names)
    t = time.perf_counter()
    with pytest.raises(ValueError) as e: f()
    if what == 'folder': mp.undo()
    assert time.perf_counter() - t < 6 and len(str(e.value)) < 20_000
