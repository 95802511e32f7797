"A task from outside: one page in a copy of the tree, nothing else touched, through runs, tables, figures, the run pages and the cost of a step."
import os, sys, textwrap
import pytest
import warm
from outside import add_pages
from vidlab.core import RunFolder
from vidlab.data.annots import Manifest
from vidlab.data.shapes import make_shapes
from vidlab.evaluate import save_eval
from vidlab.registry import KINDS, lookup, names, register_task
from vidlab.results import DRAW, breakdown, comparison, read_back
from vidlab.tasks import Task

HALVES = '''
"""Are the two halves of a clip in their order?"""
import torch, torch.nn.functional as F
from vidlab.core import rng
from vidlab.registry import register_task
from vidlab.tasks.base import Task
#---
@register_task
class HalvesTask(Task):
    "One output of the model says whether the halves of a clip were exchanged"
    monitor,measured = 'in_order',('exchanged',)
    def __init__(self, model, # with one output
                 exchanged:float=.5, # share of the clips whose halves are exchanged
                 seed:int=0 # of the choice
                ):
        super().__init__(model)
        self.exchanged,self.seed = exchanged,seed

    @classmethod
    def model_options(cls, classes): return dict(classes=1)

    def halves(self, batch): # -> logits (B), exchanged (B)
        b = self.prep(batch)
        swap = torch.tensor([rng(self.seed, s).random() < self.exchanged for s in b['sid'].tolist()], device=b['video'].device)
        v = torch.where(swap[:, None, None, None, None], b['video'].roll(b['video'].shape[1]//2, 1), b['video'])
        return self.model({**b, 'video': v})['logits'].float()[:, 0], swap

    def forward(self, batch):
        x,y = self.halves(batch)
        return dict(loss=F.binary_cross_entropy_with_logits(x, y.float()))

    def eval_step(self, batch):
        x,y = self.halves(batch)
        return dict(sid=batch['sid'], view=batch['view'], right=((x > 0) == y).float())

    def score(self, parts, expected=None):
        p = parts['video']
        return dict(metrics=dict(in_order=100*float(p['right'].mean())), arrays=p)
'''

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of pages and modules with one page more, exported"
    root = tmp_path_factory.mktemp('tree')
    assert add_pages(root, {'tasks/90_halves.ipynb': ('tasks.halves', HALVES)}) == {'_modidx.py', 'halves.py'}
    return root

@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=8, val=4, test=6)))

HEAD = '''
import json, sys, torch, yaml
from pathlib import Path
import vidlab
from vidlab.core import read_json
from vidlab.cost import step_cost
from vidlab.explain import clip_of_run, explain_run, load_run, methods_of
from vidlab.registry import lookup, names, options
from vidlab.results import breakdown, comparison, eval_table, load_eval, noise_task, part_by_part, show_curves, show_eval, worst
from vidlab.tasks import Task
from vidlab.train import config_from, load_config, load_manifest, run, run_eval

DATA, TREE, HOME = sys.argv[1:]
assert vidlab.__path__[0].startswith(TREE), vidlab.__path__
COMMON = dict(model='videomamba', preset='tiny', depth=2, data='shapes', data_path=DATA, sampler='segment', max_frames=4, epochs=1, batch_size=4, eval_batch_size=6, workers=0, log_every=1, lr=1e-3, device='cpu')

def recipe(name, **kw):
    path = Path(HOME)/f'{name}.yaml'
    path.write_text(yaml.safe_dump({**COMMON, **kw}))
    return str(path)
def fails(f, *words):
    try: f()
    except Exception as e:
        assert all(w in str(e) for w in words), e
        return
    raise AssertionError(f'no error with {words}')
def execute(page, **given):
    "The cells of a run page"
    ns = {}
    for c in json.loads((Path(TREE)/'nbs'/'runs'/page).read_text())['cells']:
        if c['cell_type'] == 'code': exec(''.join(c['source']), ns)
        if 'parameters' in c['metadata'].get('tags', []): ns.update(given)
    return ns
'''

def execute(tree, shapes, home, script):
    env = {**os.environ, 'PYTHONPATH': str(tree), 'VIDLAB_OUTPUTS': str(home/'outputs'), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    (home/'steps.py').write_text(HEAD + textwrap.dedent(script))
    r = warm.run([sys.executable, str(home/'steps.py'), str(shapes), str(tree), str(home)], capture_output=True, text=True, cwd=tree, env=env)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-5000:]


def test_every_task_says_what_it_is():
    "Nothing is missing, and the tables name only what is there"
    for n in names('task'):
        t = lookup('task', n)
        assert t.missing() == [] and t.monitor in t.columns and t.columns[t.monitor].lower == t.lower and set(t.sides.values()) <= {'clip', 'text', 'row'}, n

def test_a_task_that_keeps_nothing_but_its_metric(tmp_path):
    "Its table has the metric; what needs numbers per clip is empty or says so"
    class BareTask(Task):
        monitor = 'loss'
        lower = True
        def eval_step(self, batch): return dict(sid=batch['sid'], view=batch['view'])
        def score(self, parts, expected=None): return dict(metrics=dict(loss=.123456), arrays={})
    register_task(BareTask)
    try:
        folder = RunFolder(tmp_path/'bare'/'run')
        save_eval(folder, 'test', dict(BareTask(None).score({}), seconds=0.), dict(task='bare'))
        (tmp_path/'a.mp4').touch()
        rows = Manifest.build(dict(id=['a'], path=['a.mp4'], pair=['x']), tmp_path)
        assert comparison(dict(bare=folder), rows)['loss ↓'].tolist() == [.1235] and breakdown(dict(bare=folder), rows).dropna().empty
        task, e = read_back(folder, rows=rows)
        p = task.figure(e)
        assert len(task.worst(e)) == 0 and 'BareTask keeps no numbers' in DRAW[p.pop('draw')](**p).texts[0].get_text()
        with pytest.raises(TypeError, match="task 'less': LessTask has no score"):
            register_task(type('LessTask', (Task,), dict(monitor='x', eval_step=BareTask.eval_step)))
    finally: KINDS['task'].builders.pop('bare')

def test_its_options(tree, shapes, tmp_path):
    "Declared once, set from a recipe, refused when nobody knows them"
    execute(tree, shapes, tmp_path, '''
    assert 'halves' in names('task') and lookup('task', 'halves').columns.keys() == {'in_order'}
    own = {o.name: o for o in options('task', 'halves', helps=True).values() if not o.given}
    assert set(own) == {'exchanged'} and own['exchanged'].default == .5 and own['exchanged'].help.startswith('share of the clips')
    cfg = config_from(recipe('a', task='halves', exchanged=.25))
    assert cfg.options['exchanged'] == .25 and config_from(recipe('b', task='halves'), exchanged='0.75').options['exchanged'] == .75
    fails(lambda: config_from(recipe('c', task='halves', exchagned=.25)), "did you mean 'exchanged'")
    fails(lambda: config_from(recipe('d', task='recognition', exchanged=.25)), 'exchanged')
    fails(lambda: config_from(recipe('e', task='halfs')), "did you mean 'halves'")
    ''')

@pytest.mark.slow
def test_runs_tables_and_figures(tree, shapes, tmp_path):
    execute(tree, shapes, tmp_path, '''
    few, many = (run(config_from(recipe(n, task='halves', exchanged=x))) for n, x in (('few', .25), ('many', .75)))
    e, cfg = load_eval(few), load_config(few.path)
    assert 0 <= e['metrics']['in_order'] <= 100 and (e['protocol']['task'], e['protocol']['exchanged']) == ('halves', .25)
    assert load_eval(run_eval(config_from(recipe('few', task='halves', exchanged=.25), start=str(few.path))))['metrics'] == e['metrics']
    assert [r['in_order'] for r in few.metrics() if r['kind'] == 'epoch'] and read_json(few/'ckpt'/'best'/'card.json')

    t = eval_table(dict(few=few, many=many))
    assert t.columns.tolist() == ['in_order', 'protocol'] and t['protocol'].tolist() == ['A', 'B']
    rows = load_manifest(cfg, 'test')
    classes = run(config_from(recipe('classes', task='recognition')))
    c = comparison(dict(few=few, classes=classes), rows)
    assert {'in_order', 'top1', 'clips/s'} <= set(c.columns) and c['in_order'].isna().tolist() == [False, True]
    b = breakdown(dict(few=few), rows, by='motion')
    assert set(b.index) == {rows.row(i)['motion'] for i in range(len(rows))} and list(b.columns) == [('few', 'right')]
    w = worst(few, cfg, n=2)
    assert list(w.columns) == ['video', 'right'] and len(w) == 2 and len(part_by_part(few, cfg)) >= 1
    assert show_eval(few, cfg).axes and show_curves([few, many]).axes[2].get_title() == 'in_order on validation'

    task, cfg = load_run(few)
    clip = clip_of_run(cfg, task.model.card, sid=1)
    assert methods_of(task, clip) == ('raw', 'rollout') and set(explain_run(few, sid=1)) == {'patches', 'frames'}
    type(task).explains, type(task).evidence = (lambda self, batch: True), (lambda self, batch: self.halves(batch)[0])
    assert methods_of(task, clip)[-1] == task.model.explained_by and task.model.explained_by in explain_run(few, sid=1)['patches'].get_suptitle()
    ''')

@pytest.mark.slow
def test_run_pages_and_cost(tree, shapes, tmp_path):
    execute(tree, shapes, tmp_path, '''
    mine = recipe('mine', task='halves', exchanged=.25)
    task, batch = noise_task(mine, 2, 4)
    assert type(task).__name__ == 'HalvesTask' and task.exchanged == .25 and (step_cost({'a': task}, {'a': batch}, rounds=1, device='cpu')['step ms'] > 0).all()
    assert len(execute('cost.ipynb', recipes=[mine], rounds=1, precision='fp32', device='cpu')['table']) == 1
    ns = execute('compare.ipynb', recipes=[mine], device='cpu')
    assert ns['table'].index.tolist() == [f'{mine}, untrained', mine] and 'in_order' in ns['table'] and (ns['out']/'figs'/'patches.png').exists()
    folder = ns['runs'][mine]
    assert execute('evaluate.ipynb', run=str(folder.path))['cfg'].task == 'halves'
    assert set(execute('attention.ipynb', run=str(folder.path), sid=1)['figs']) == {'patches', 'frames'}
    ''')
