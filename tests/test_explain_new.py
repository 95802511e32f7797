"Maps, tables and figures for encoders over all frames, for scans and for sorted transcripts: of tiny models, of tiny runs, and on the run pages."
import os
from pathlib import Path
import numpy as np
import pyarrow as pa
import pytest
import torch
from vidlab.attend import capture_attention
from vidlab.core import read_json, rng
from vidlab.cost import noise_batch, step_cost
from vidlab.data.annots import Manifest
from vidlab.data.shapes import MOTIONS, make_shapes, partner
from vidlab.explain import METHODS, SORT_METHODS, clip_of_run, default_method, explain_run, frame_maps, load_run, methods_of, over_time, patch_maps, places_of, sort_maps
from vidlab.masks import keep_indices
from vidlab.registry import create_model
from vidlab.results import breakdown, comparison, eval_table, load_eval, noise_task, part_by_part, show_curves, show_eval, worst
from vidlab.tasks import Evaluation, RecognitionTask, RegressionTask, RetrievalTask, SameClassTask, SortingTask, Task
from vidlab.train import config_from, load_config, load_manifest, run, run_eval
from pages import execute, papermill

pytest.importorskip('transformers')


def text_task(name, **kw): return RetrievalTask(create_model(name, preset='tiny', **kw))
def mamba(classes=6, **kw): return create_model('videomamba', preset='tiny', **{'depth': 2, 'max_frames': 4, 'classes': classes, **kw})
def classed(model, n): return RecognitionTask(model, [f'c{i}' for i in range(n)])

TASKS = dict(clip4clip=lambda: text_task('clip4clip', clip='random'), mugstan=lambda: text_task('mugstan', clip='random'), tvts=lambda: SortingTask(create_model('tvts', preset='tiny', max_frames=4)),
             tvts_retrieval=lambda: text_task('tvts', max_frames=4), tvts_classifier=lambda: classed(create_model('tvts_classifier', preset='tiny', classes=3, max_frames=4, probe=True), 3),
             same_class=lambda: SameClassTask(create_model('tvts', preset='tiny', max_frames=4)), mamba=lambda: classed(mamba(), 6), number=lambda: RegressionTask(mamba(1)),
             **{o: lambda o=o: classed(mamba(order=o), 6) for o in ('st_v1', 'st_v2')}, tubelet=lambda: classed(mamba(tubelet=2), 6), one_way=lambda: classed(mamba(bidirectional=False), 6),
             student=lambda: Task(create_model('videomamba_pretrain', preset='tiny', depth=2, drop_path=0., max_frames=4, out_dim=64)))

@pytest.mark.parametrize('name', TASKS)
def test_maps_of_every_kind_of_encoder(name):
    torch.manual_seed(0)
    task = TASKS[name]()
    b = noise_batch(task.model.card, 2, 4, pieces=4 if name == 'tvts' else 0)
    if name == 'student': del b['text']
    mode = task.training
    scans = name in ('student', 'mamba', 'number', 'st_v1', 'st_v2', 'tubelet', 'one_way')
    able = {'raw', 'rollout'} if name == 'student' else set(METHODS) - ({'legrad'} if scans else set())
    assert set(methods_of(task, b)) == able and methods_of(task, b)[-1] == default_method(task, b)
    for m in METHODS:
        if m not in able:
            with pytest.raises(ValueError, match='no class, no number, no text|attention over patches'): patch_maps(task, b, m)
            continue
        p = patch_maps(task, b, m)
        assert p.shape == (2, 4, 4, 4) and (p >= 0).all() and p.isfinite().all(), (name, m)
        top = p.flatten(1).max(1).values
        assert (top < 1e-6).all() if name == 'one_way' else (top > 0).all() or m in ('integrated', 'occlusion'), (name, m)      # a class token in front of a scan forwards sees nothing
    assert task.training == mode and not any(q.grad is not None for q in task.parameters())
    if name in ('clip4clip', 'mugstan'):
        with pytest.raises(ValueError, match='no attention over frames or video or scan'): frame_maps(task, b)
        return
    t = 2 if 'tvts' in name or name in ('tubelet', 'same_class') else 4
    for x in frame_maps(task, b): assert x.shape[-2:] == (t, t) and (x >= 0).all() and (x.sum(-1) <= 1 + 1e-5).all() and (x.sum(-1) > .8).all()      # the class token has the rest


def test_relevance_of_a_scan_is_that_of_its_patches():
    "Gradient times pixels, summed over a patch, is gradient times what the patch brings into its token"
    torch.manual_seed(0)
    task = classed(mamba(), 6).eval()
    b, kept = noise_batch(task.model.card, 2, 4), []
    def hook(mod, args, out): out.retain_grad(); kept.append(out)
    h = task.model.patch_embed.register_forward_hook(hook)
    x = task.prep(b)
    task.model({**x, 'video': x['video'].requires_grad_()})['logits'].gather(1, b['label'][:, None]).sum().backward()
    h.remove()
    e = kept[0]
    want = ((e - task.model.patch_embed.proj.bias)*e.grad).sum(-1).clamp(min=0).view(2, 4, 4, 4)
    assert torch.allclose(patch_maps(task, b, 'relevance'), want, rtol=1e-3, atol=1e-6)


def test_transcripts_look_at_the_tokens_that_are_there():
    torch.manual_seed(0)
    task = TASKS['tvts']()
    c = task.model.card
    b = noise_batch(c, 2, 4, pieces=4)
    maps, order = sort_maps(task, b), torch.tensor([2, 0, 3, 1])
    assert maps.shape == (2, 4, 2, 4, 4)
    with capture_attention(task.model, 'pred_model.*') as got, torch.no_grad(): task.eval().model(task.prep(b))
    last = list(got.values())[-1][0].mean(1)                                # (B,n,n)
    assert torch.allclose(maps.flatten(2), last[:, -4:, 1:-4], atol=1e-6) and torch.allclose(over_time(maps), last[:, -4:, 1:-4].unflatten(-1, (2, 16)).sum(-1), atol=1e-5)
    assert torch.allclose(sort_maps(task, {**b, 'text': b['text'][:, order], 'text_mask': b['text_mask'][:, order]}), maps[:, order], atol=1e-5)      # they are a set
    for m in SORT_METHODS:
        every = keep_indices(2, c.places, 0., [rng(i) for i in range(2)])     # all of them, in another order
        assert torch.allclose(sort_maps(task, b, m, keep=every), sort_maps(task, b, m), atol=1e-5), m
    keep = keep_indices(2, c.places, .75, [rng(i) for i in range(2)])
    there = torch.zeros(2, 2, 16).scatter(2, keep, 1.).bool()
    some = sort_maps(task, b, keep=keep)
    assert (some.flatten(3).isnan() == ~there[:, None]).all() and (places_of(task, b, keep) < 4).all()
    with pytest.raises(ValueError, match='needs K transcripts'): sort_maps(task, noise_batch(c, 2, 4))


# ---------------------------------------------------------------------------------------------------------------- runs
def paired(rows):
    "Rows of the embedded data set with the columns that results ask for: the pair of each clip, and what is telling"
    if 'motion' in rows.cols and 'pair' not in rows.cols: rows = with_pairs(rows)
    if not getattr(rows, 'by', None): rows.by = next((c for c in ('motion', 'procedure') if c in rows.cols), None)
    return rows

def with_pairs(rows):
    every = [rows.row(i) for i in range(len(rows))]
    keys = ['|'.join((r['color'], r['shape'], r['size'], *sorted((r['motion'], partner(r['motion']))))) for r in every]
    return Manifest({**rows.cols, 'pair': pa.array(keys, pa.large_string())}, rows.root, rows.report)

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('home')

@pytest.fixture(scope='module', autouse=True)
def outputs(home):
    patch = pytest.MonkeyPatch(); patch.setenv('VIDLAB_OUTPUTS', str(home/'outputs'))
    yield
    patch.undo()

@pytest.fixture(scope='module')
def shapes(home):
    return make_shapes(home/'shapes', kinds=('clips', 'narrated', 'long'), sizes=dict(clips=dict(train=4, val=2, test=12), narrated=dict(train=4, val=2, test=4), long=dict(train=2, val=1, test=3)))

def cfg_of(shapes, recipe, **kw):
    return config_from(recipe, **{**dict(data_path=str(shapes), epochs=1, batch_size=2, eval_batch_size=6, workers=0, log_every=1, precision='fp32', device='cpu'), **kw})

@pytest.fixture(scope='module')
def runs(shapes):
    two = dict(depth=2, max_frames=4)
    return {r: run(cfg_of(shapes, r, **kw)) for r, kw in dict(shapes_videomamba=two, shapes_long_regression=two, shapes_tvts=dict(max_frames=8)).items()}

@pytest.mark.slow
def test_figures_of_runs(runs):
    want = dict(shapes_videomamba={'patches', 'frames'}, shapes_long_regression={'patches', 'frames'}, shapes_tvts={'patches', 'frames', 'order', 'transcripts'})
    for r, f in runs.items(): assert set(explain_run(f, sid=1)) == want[r]
    task, cfg = load_run(runs['shapes_tvts'])
    b = clip_of_run(cfg, task.model.card, sid=2)
    assert b['text'].shape == (1, 4, cfg.max_words) and task.title(b).count(' | ') == 3 and b['text_time'].shape == (1, 4, 2)
    assert set(methods_of(task, b)) == set(METHODS) and task.title(clip_of_run(cfg, task.model.card, caption='a red circle')) == 'a red circle'
    said = ['a large red circle grows', 'a small blue square moves up', 'a small red circle grows', 'a red circle']
    assert set(explain_run(runs['shapes_tvts'], caption=said)) == want['shapes_tvts'] and set(explain_run(runs['shapes_tvts'], caption=said[0])) == {'patches', 'frames'}
    with pytest.raises(ValueError, match='sort head of 4'): explain_run(runs['shapes_tvts'], caption=said[:2])
    task, cfg = load_run(runs['shapes_long_regression'])
    assert task.title(clip_of_run(cfg, task.model.card)).startswith('target ')

def test_tables_of_runs(runs, shapes):
    cfgs = {r: load_config(f.path) for r, f in runs.items()}
    columns = dict(shapes_videomamba='top1', shapes_long_regression='mse ↓', shapes_tvts='sorted')
    for r, f in runs.items():
        rows = paired(load_manifest(cfgs[r], 'test'))
        t, e = comparison({r: f}, rows), load_eval(f)
        assert columns[r] in t and ('within pair' in t) == (r == 'shapes_videomamba') and columns[r] in eval_table([f])
        b = breakdown({r: f}, rows)
        by = dict(shapes_videomamba='motion', shapes_long_regression='procedure').get(r)
        assert set(b.index) == ({rows.row(i)[by] for i in range(len(rows))} if by else {'all'})
        assert len(worst(f, cfgs[r], n=3)) == 3 and show_eval(f, cfgs[r])._repr_png_() and len(part_by_part(f, cfgs[r]))
    f = runs['shapes_long_regression']
    w = worst(f, cfgs['shapes_long_regression'], n=3)
    assert w['mae ↓'].is_monotonic_decreasing and w['mae ↓'].mean() == pytest.approx(load_eval(f)['metrics']['mae'], rel=1e-2)
    assert show_curves(list(runs.values())).axes[2].get_title().startswith('sorted')

def test_evaluations_without_training(shapes):
    a, b = cfg_of(shapes, 'shapes_videomamba_pretrain', depth=2, max_frames=4, teacher_weights='random'), cfg_of(shapes, 'shapes_tvts', task='same_class', kind='clips', pieces=0, max_frames=4)
    masked, same = run_eval(a, 'val'), run_eval(b)
    assert 'align ↓' in eval_table([masked], 'val') and len(worst(masked, a, 'val', 3)) == 2 and show_eval(masked, a, 'val') and 'v2v R1' in eval_table([same])
    assert show_eval(same, b) and len(worst(same, b)) == 8 and breakdown({'same': same}, paired(load_manifest(b, 'test'))).shape == (6, 1)


def old_time_pairs(rows):
    "Numbers of the pairs, from what only the embedded data set says of its clips"
    clips = [rows.row(int(r)) for r in rows.groups().first]
    return np.unique(['|'.join((r['color'], r['shape'], r['size'], *sorted((r['motion'], partner(r['motion']))))) for r in clips], return_inverse=True)[1]

def old_pair_accuracy(prob, label):
    "How often a clip's class beats the class of the reversed motion"
    other = torch.tensor([MOTIONS.index(partner(m)) for m in MOTIONS])[label]
    own, rival = (prob.gather(1, y[:, None])[:, 0] for y in (label, other))
    return 100*float(((own > rival) + .5*(own == rival)).mean())

def old_within(sim, groups):
    "How often a caption finds its clip within the group"
    hits = [(sim[i, i] > top) + .5*(sim[i, i] == top) for i in range(len(sim)) for top in [max(sim[i, j] for j in range(len(sim)) if j != i and groups[j] == groups[i])]]
    return 100*float(np.mean([float(h) for h in hits]))

@pytest.mark.parametrize('seed', range(3))
def test_choice_within_pairs_is_that_of_reversed_motions(shapes, seed):
    "The column `pair` gives what the motions, colours, shapes and sizes gave"
    rows, g = paired(Manifest.read(Path(shapes)/'clips'/'test.csv')), torch.Generator().manual_seed(seed)
    n, label = len(rows), torch.tensor(np.asarray(rows.cols['label']))
    prob, sim = torch.rand(n, 6, generator=g).round(decimals=1), torch.rand(n, n, generator=g).round(decimals=1)          # rounded: there are ties
    ids = torch.arange(n)
    classes = Evaluation(dict(prob=prob, label=label, sid=ids), rows)
    captions = Evaluation(dict(sim=sim, text_sid=ids, text_view=ids*0, video_sid=ids), rows)
    assert len(set(old_time_pairs(rows))) == n//2 and np.array_equal(classes.pairs()[:, None] == classes.pairs(), old_time_pairs(rows)[:, None] == old_time_pairs(rows))
    assert RecognitionTask.within_pairs(classes).value == pytest.approx(old_pair_accuracy(prob, label))
    assert RetrievalTask.within_pairs(captions).value == pytest.approx(old_within(sim, old_time_pairs(rows)))
    for motion in range(6):
        mine = label == motion
        assert RecognitionTask.within_pairs(classes, mine).value == pytest.approx(old_pair_accuracy(prob[mine], label[mine]))
    assert SameClassTask.within_pairs(classes) is None


# ---------------------------------------------------------------------------------------------------------------- cost
def test_a_step_of_every_task():
    both = {r: noise_task(r, 2, 2) for r in ('shapes_videomamba', 'shapes_long_regression', 'shapes_tvts', 'shapes_videomamba_pretrain')}
    t = step_cost({r: x for r, (x, _) in both.items()}, {r: x for r, (_, x) in both.items()}, rounds=1, device='cpu')
    assert (t['step ms'] > 0).all() and (t['kept MiB'] > 0).all()
    with pytest.raises(ValueError, match='measures and trains nothing'): noise_task('ssv2_v2v_tvts')


# ---------------------------------------------------------------------------------------------------------------- pages

def looked_at(folder, recipe):
    kept, = (folder/'figs').glob('test1_*.npz')
    maps, frames = np.load(kept)['maps'], read_json(folder/'config.json')['max_frames']
    assert maps.shape == (frames, 4, 4) and (maps >= 0).all() and maps.max() > 0 and kept.with_suffix('.gif').exists() and kept.stem[6:] in METHODS
    assert {p.stem for p in (folder/'figs').glob('*.png')} >= {kept.stem, 'test1_frames'} | ({'test1_order', 'test1_transcripts'} if recipe == 'shapes_tvts' else set())

@pytest.mark.slow
@pytest.mark.parametrize('recipe,attention', [('shapes_videomamba', execute), ('shapes_tvts', execute), ('shapes_long_regression', execute),
                                              pytest.param('shapes_tvts', papermill, marks=pytest.mark.long)])
def test_pages(recipe, attention, runs, tmp_path):
    folder, done = runs[recipe], lambda: set((Path(os.environ['VIDLAB_OUTPUTS'])/recipe).glob('*'))
    if attention is papermill: assert (r := papermill('attention.ipynb', tmp_path/'attention.ipynb', '-p', 'run', str(folder.path), '-p', 'sid', '1')).returncode == 0, r.stderr[-3000:]
    else: execute('attention.ipynb', run=str(folder.path), sid=1)
    looked_at(folder, recipe)
    before = done()
    execute('evaluate.ipynb', run=str(folder.path))
    again, = done() - before
    assert read_json(again/'eval'/'test.json')['metrics'] == load_eval(folder)['metrics']

@pytest.mark.parametrize('recipe,column', [('shapes_tvts', 'places'), ('shapes_long_regression_probe', 'mse ↓')])
def test_compare_page(recipe, column, shapes):
    names = execute('compare.ipynb', recipes=[recipe], data_path=str(shapes), epochs=1, workers=0, batch_size=2, precision='fp32', device='cpu', max_frames=4)
    assert list(names['table'].index) == [f'{recipe}, untrained', recipe] and column in names['table'] and (names['out']/'figs'/'patches.png').exists()
