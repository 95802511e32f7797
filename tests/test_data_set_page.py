"A data set from outside: one page in a copy of the tree, nothing else touched."
import json, os, re, shutil, sys, textwrap
import pytest
import warm
from outside import add_pages


DOORS = '''
"""Doors that open and close: a list `id door what split` beside the videos."""
from vidlab.data.manifest import Manifest, find_videos, from_rows
from vidlab.data.tables import lines_of
from vidlab.registry import register_data
#---
@register_data
def doors(path, # the list: id, door, opens or closes, split
          root, # folder of the videos, searched
          prefix:str='door', # what the names of the pairs begin with
          missing:str='error', # 'error', 'drop' or 'keep'
          missing_limit:float=.5 # most that may be dropped
         ) -> Manifest:
    "Doors: one row per clip, pairs that differ only in the order of time"
    rows = [dict(zip(('id', 'door', 'label', 'split'), line.split())) for line in lines_of(path)]
    found = find_videos(root, {r['id'] for r in rows})
    for r in rows: r |= dict(path=found.get(r['id']), pair=f"{prefix} {r['door']}", text=f"a {r['door']} {r['label']}")
    return from_rows(rows, root, str(path), missing, missing_limit, classes=['stays', 'opens', 'closes'], by='door')
'''
@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp('doors')
    assert add_pages(root, {'data/sets/90_doors.ipynb': ('data.sets.doors', DOORS)}) == {'_modidx.py', 'doors.py'}
    return root

@pytest.fixture
def videos(tmp_path):
    (tmp_path/'v').mkdir()
    for i in range(4): (tmp_path/'v'/f'{i}.mp4').touch()
    (tmp_path/'list.txt').write_text('0 red opens train\n1 red closes train\n2 blue opens test\n3 blue closes test\n')
    return tmp_path

def python(tree, code, *args):
    env = {**os.environ, 'PYTHONPATH': str(tree), 'VIDLAB_OUTPUTS': str(tree/'outputs'), 'OMP_NUM_THREADS': '1'}
    return warm.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], cwd=tree, env=env, capture_output=True, text=True)

def tool(tree, *args):
    return warm.run([sys.executable, tree/'data_tools'/'make_manifest.py', *map(str, args)], cwd=tree, env={**os.environ, 'PYTHONPATH': str(tree)}, capture_output=True, text=True)

def test_it_is_a_data_set(tree, videos):
    "Listed, made by name; its classes, pairs and breakdown go with every part of it"
    r = python(tree, '''
    import sys
    from vidlab.registry import create, names, options
    assert 'doors' in names('data') and [o.name for o in options('data', 'doors').values() if not o.given] == ['prefix']
    m = create('data', 'doors', path=sys.argv[1] + '/list.txt', root=sys.argv[1] + '/v', prefix='gate')
    for part, n in ((m, 4), (m.split('test'), 2), (m.select([0]), 1), (m.few_shot(1), 2)):
        assert len(part) == n and part.classes == ['stays', 'opens', 'closes'] and part.by == 'door'
    assert m.split('test').column('pair').to_pylist() == ['gate blue'] * 2 and m.split('test').column('label').tolist() == [1, 2]
    assert create('data', 'doors', path=sys.argv[1] + '/list.txt', root=sys.argv[1] + '/v').hash() == m.hash()
    try: create('data', 'doors', path='', root='', prefx='gate')
    except ValueError as e: assert "unknown option of doors 'prefx'; did you mean 'prefix'?" in str(e), e
    else: raise AssertionError('no error')
    ''', videos)
    assert r.returncode == 0, r.stderr

def test_its_command_line(tree, videos):
    "Its option is there without a word about it anywhere else, and what it does not take is refused by its name"
    args = ['doors', '--root', videos/'v', '--annots', videos/'list.txt', '--out', videos/'m.csv']
    assert re.search('\n  doors +Doors: one row per clip', tool(tree, '--help').stdout)
    assert 'what the names of the pairs begin with (default: door)' in ' '.join(tool(tree, 'doors', '--help').stdout.split())
    r = tool(tree, *args, '--prefix', 'gate')
    assert r.returncode == 0 and '4 rows, 4 clips, train 2, test 2, labels: class (3 names)' in r.stdout, r.stderr
    assert 'gate blue' in (videos/'m.csv').read_text() and json.loads((videos/'m.report.json').read_text())['classes'] == ['stays', 'opens', 'closes']
    for bad, words in {'--prefx': '--prefx has no meaning for format doors; did you mean --prefix?', '--fold': '--fold has no meaning for format doors.'}.items():
        r = tool(tree, *args, bad, 'x')
        assert r.returncode == 1 and r.stderr.startswith('make_manifest: ' + words), r.stderr
    r = tool(tree, *args[:3], '--out', videos/'n.csv')
    assert r.returncode == 1 and 'format doors needs --annots, the list: id, door, opens or closes, split' in r.stderr

def test_a_word_with_two_owners(tree, tmp_path):
    "An option that is a word of a model, or of the run, is an error at registration that names both"
    shutil.copytree(tree/'vidlab', tmp_path/'vidlab')
    page = tmp_path/'vidlab'/'data'/'sets'/'doors.py'
    page.write_text(page.read_text().replace('prefix', 'head'))
    r = python(tmp_path, '''
    from vidlab.registry import list_models, names, reserve
    list_models()
    try: names('data')
    except ValueError as e: assert str(e).startswith("data 'doors': option 'head' is a word of model") and str(e).endswith('give it another name'), e
    else: raise AssertionError('no error')
    try: reserve(['missing', 'fold'], 'the run')
    except ValueError as e: assert "data 'ucf101': option 'fold' is a word of the run" in str(e), e
    else: raise AssertionError('no error')
    ''')
    assert r.returncode == 0, r.stderr

@pytest.mark.slow
def test_it_trains_and_is_measured(tree, tmp_path):
    "Named in a config like any other: trained, measured with its pairs and its column, resumed; a further training set and the run page know its option too"
    from conftest import encode
    lines = [f'{i} {door} {what} {split}' for i, (split, door, what) in enumerate((s, d, w) for s in ('train', 'train2', 'test') for d in ('red', 'blue') for w in ('opens', 'closes'))]
    (tmp_path/'list.txt').write_text('\n'.join(l.replace('train2', 'train') for l in lines) + '\n')
    for i in range(len(lines)): encode(tmp_path/'v'/f'{i}.mp4', n=12, light=lambda t, i=i: 20*t if i % 2 else 240 - 20*t)
    r = python(tree, '''
    import sys
    from vidlab.config import config_from, make_config, parameters_cell
    from vidlab.results import breakdown, comparison, eval_table, load_eval
    from vidlab.train import evaluation_config, load_manifest, run, run_eval
    at = dict(data='doors', data_path=sys.argv[1] + '/list.txt', video_root=sys.argv[1] + '/v', prefix='gate')
    cfg = make_config(**at, model='probe', preset='tiny', weights='random', task='recognition', sampler='segment', max_frames=4, epochs=2, batch_size=4, eval_batch_size=4, workers=0, val_split='', device='cpu')
    f = run(cfg)
    e, rows = load_eval(f), load_manifest(cfg, 'test')
    assert f.status()['state'] == 'done' and e['metrics']['clips'] == 4 and e['protocol']['data'] == 'doors'
    assert set(breakdown({'a': f}, rows).index) == {'red', 'blue'} and 'within pair' in comparison({'a': f}, rows).columns
    assert run_eval(evaluation_config(dict(workers=0), run=str(f.path))).status()['state'] == 'done'
    both = make_config(data='shapes', more=[dict(at)])
    assert both.more[0]['prefix'] == 'gate' and any(l.startswith('prefix:str = None') and 'doors: what the names of the pairs begin with' in l for l in parameters_cell().splitlines())
    for bad, said in ((dict(at, data='list'), 'data list has no option prefix: it belongs to data doors'), (dict(at, prefx=1), "did you mean 'prefix'")):
        try: make_config(**bad)
        except ValueError as e: assert said in str(e), e
        else: raise AssertionError(said)
    ''', tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
