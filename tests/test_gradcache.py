"Gradients of a batch in parts are those of the whole batch: every contrastive system, dropout on, one process and two; what cannot be cut is refused; and patches that training leaves out."
import json, math, os, subprocess, sys
from pathlib import Path

import pytest, torch
import warm
from torch import nn

from vidlab.build import build_model
from vidlab.config import config_from, make_config
from vidlab.contract import Card, VideoModel
from vidlab.core import RunFolder
from vidlab.cost import noise_batch
from vidlab.gradcache import Pull, cached_backward, check_clips, check_task
from vidlab.learner import Learner, make_engine, to_device
from vidlab.preflight import _loss
from vidlab.registry import create_model
from vidlab.tasks import RecognitionTask, RetrievalTask, SortingTask

TINY = dict(preset='tiny', weights='random')
CLIP4CLIP = {f'clip4clip {h}': (RetrievalTask, 'clip4clip', dict(TINY, head=h)) for h in ('meanP', 'seqLSTM', 'seqTransf', 'tightTransf', 'mug')}
SYSTEMS = CLIP4CLIP | {
    'clip4clip 3d': (RetrievalTask, 'clip4clip', dict(TINY, head='seqTransf', patch='3d')),
    'clip4clip drl_wti': (RetrievalTask, 'clip4clip', dict(TINY, head='mug', mug_mode='drl_wti')),
    'clip4clip text frozen': (RetrievalTask, 'clip4clip', dict(TINY, head='seqTransf', freeze='text')),
    'clip4clip head alone': (RetrievalTask, 'clip4clip', dict(TINY, head='tightTransf', freeze='all')),
    'stan': (RetrievalTask, 'stan', dict(TINY, drop_path=.5, tau=0)),
    'stan conv': (RetrievalTask, 'stan', dict(TINY, drop_path=.5, time='conv')),
    'mugstan': (RetrievalTask, 'mugstan', dict(TINY, drop_path=.5)),
    'mugstan full': (RetrievalTask, 'mugstan', dict(TINY, head='full', mug_tau=20, drop_path=.5)),
    'tvts captions': (RetrievalTask, 'tvts', dict(preset='tiny')),
    'tvts': (SortingTask, 'tvts', dict(preset='tiny'))}


def made(name): # task whose every part matters, from noise
    torch.manual_seed(0)
    kind, model, options = SYSTEMS[name]
    task = kind(create_model(model, **options)).train()
    for p in task.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)                        # what begins at zero would hide what stands before it
    for m in list(task.modules()):
        for k, c in list(m.named_children()):
            if isinstance(c, nn.Dropout) or type(c).__name__ == 'DropPath': setattr(m, k, Noted(whole=k == 'drop_path'))
            if type(m).__name__ == 'Block' and k == 'drop_path': setattr(m, k, Noted(whole=True))
    return task


class Noted(nn.Module):
    "Dropout, of numbers or of whole rows, that notes its masks, and can be told to use those"
    p = 0.                                                                 # of a layer that asks, and drops by a function
    def __init__(self, whole): super().__init__(); self.whole, self.masks, self.use = whole, [], None
    def forward(self, x):
        if not self.training: return x
        if self.use is not None: return x*self.use.pop(0)
        mask = (torch.rand(x.shape[:1] + (1,)*(x.ndim - 1) if self.whole else x.shape) > .3)/.7
        self.masks.append(mask)
        return x*mask


def dry(task): # without dropout
    for m in task.modules():
        if isinstance(m, Noted): m.forward = lambda x: x
    return task


def replay(task, parts): # the masks of all parts as those of one batch
    n = 0
    for name, m in task.named_modules():
        if not isinstance(m, Noted) or not m.masks: continue
        n += 1
        if '.cross.' in name:                                              # of the head: the pairs are scored at once
            m.use = list(m.masks)
            continue
        first, again = m.masks[:len(m.masks)//2], m.masks[len(m.masks)//2:]
        if again and len(m.masks) != parts*(len(m.masks)//parts): raise AssertionError(name)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), f'{name}: other random numbers the second time'
        each = len(first)//parts
        m.use = [torch.cat(first[j::each]) for j in range(each)]
    return n


def noise(task, n, seed=0, frames=4):
    c = task.model.card
    b = noise_batch(c, n, min(frames, c.frames), seed=seed, pieces=task.pieces)
    b['video_mask'][::3, -1] = False                                       # some clips are shorter
    if b['text'].ndim == 2: b['text_mask'][1::2, -3:-1] = 0
    elif task.pieces: b['order'] = torch.stack([torch.randperm(task.pieces, generator=torch.Generator().manual_seed(i)) for i in range(n)])
    b['sid'] = torch.arange(n) + 100*seed
    return b


def grads(task): return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


def same(got, want, limit=1e-5):
    assert set(got) == set(want)
    top = max(float(g.abs().max()) for g in want.values())
    off = {n: float((got[n] - want[n]).abs().max())/top for n in want}
    worst = max(off, key=off.get)
    assert off[worst] < limit, (worst, off[worst])
    return off[worst]


@pytest.mark.parametrize('name', list(SYSTEMS))
def test_gradients_are_those_of_the_whole_batch(name):
    task, engine = made(name), make_engine(device='cpu')
    b, wrapped = noise(task, 7), Pull(task)
    torch.manual_seed(5)
    out = cached_backward(wrapped, task, b, 3, engine, lambda x: to_device(x, engine.device))
    got = grads(task)
    assert (replay(task, 3) > 0) == (name.split()[0] in ('stan', 'mugstan', 'tvts') or 'tight' in name or 'alone' in name)
    task.zero_grad()
    loss = task(b)['loss']
    loss.backward()
    assert math.isclose(out['loss'].item(), loss.item(), rel_tol=1e-5)
    same(got, grads(task))


def put(engine): return lambda b: to_device(b, engine.device)


def test_random_numbers_go_on_after_a_step_and_repeat_in_it():
    "Two steps of the same batch draw other masks; both passes of a step the same; patches left out are drawn with them"
    task, engine = made('mugstan'), make_engine(device='cpu')
    task.model.set_patch_dropout(.5)
    seen, b = [], noise(task, 6)
    draw = task.model.places
    task.model.places = lambda *a: seen.append(draw(*a)) or seen[-1]
    torch.manual_seed(1)
    for _ in range(2): cached_backward(Pull(task), task, b, 3, engine, put(engine))
    first, second = seen[:4], seen[4:]
    assert torch.equal(torch.cat(first[:2]), torch.cat(first[2:])) and torch.equal(torch.cat(second[:2]), torch.cat(second[2:]))
    assert not torch.equal(torch.cat(first[:2]), torch.cat(second[:2])) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize('name,limit', [('clip4clip tightTransf', 1e-4), ('mugstan', 1e-5)])
def test_parts_of_any_size(name, limit):
    "Also of one clip, whose products round in another way: the untrained tight head makes ten times as much of it, since all its pairs look alike"
    task, engine = made(name).eval(), make_engine(device='cpu')
    b = noise(task, 5)
    task(b)['loss'].backward()
    want = grads(task)
    for most in (1, 2, 5, 9):
        task.zero_grad()
        cached_backward(Pull(task), task, b, most, engine, put(engine))
        same(grads(task), want, limit)


# -- the learner: accumulation, precision, kept features

class Batches:
    def __init__(self, *batches): self.batches = batches
    def __len__(self): return len(self.batches)
    def epoch(self, epoch, start=0): yield from self.batches[start:]


def step(task, batches, folder, chunk, precision='fp32', **kw): # gradients of one step, what it says
    opt = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.)
    engine = make_engine(precision, 'cpu', unused=task.unused)
    learn = Learner(task, opt, Batches(*batches), RunFolder(folder), 1, engine, accum=len(batches), chunk=chunk, **kw)
    learn.raw_task.train()
    learn.one_step(batches)
    return grads(task), {k: float(v) for k, v in learn.out.items()}


def test_a_step_of_three_batches_in_parts(tmp_path):
    task = made('stan')
    dry(task)
    batches = [noise(task, n, i) for i, n in enumerate((5, 4, 6))]
    (want, said), (got, told) = step(task, batches, tmp_path/'a', 0), step(task, batches, tmp_path/'b', 2)
    same(got, want)
    assert said == pytest.approx(told, rel=1e-5)
    with pytest.raises(AssertionError): same(got, step(task, batches[:1], tmp_path/'c', 2)[0])


@pytest.mark.parametrize('name', ['clip4clip meanP', 'tvts'])
def test_bf16_rounds_and_no_more(name, tmp_path):
    "The difference to the undivided step is of the size of that step's own rounding"
    task = made(name)
    dry(task)
    b = noise(task, 6)
    exact, whole, parts = (step(task, [b], tmp_path/str(i), chunk, p)[0] for i, (chunk, p) in enumerate(((0, 'fp32'), (0, 'bf16'), (2, 'bf16'))))
    far = lambda a, b: math.sqrt(sum(float((a[n] - b[n]).pow(2).sum()) for n in b))
    assert far(parts, exact) < 1.5*far(whole, exact) and far(whole, exact) > 0


def test_kept_features_in_parts(tmp_path):
    "With a frozen tower batches may hold features of frames: the head and the texts train on them as before"
    torch.manual_seed(0)
    task = RetrievalTask(create_model('clip4clip', head='seqTransf', freeze='visual', **TINY)).train()
    b = noise(task, 6)
    with torch.no_grad(): b['video'] = task.model.frame_features(task.prep(b)['video'])
    same(step(task, [b], tmp_path/'b', 2)[0], step(task, [b], tmp_path/'a', 0)[0])


def test_fp16_gradients_are_made_large_and_small_again():
    "Under a scaler the features' gradients come out as without one, and the backward pass is scaled"
    from types import SimpleNamespace
    from contextlib import nullcontext
    task, engine = made('clip4clip tightTransf').eval(), make_engine(device='cpu')
    b, seen = noise(task, 4), []
    task(b)['loss'].backward()
    want = grads(task)
    scaled = SimpleNamespace(device=engine.device, autocast=nullcontext, no_sync=lambda m: nullcontext(), scaler=SimpleNamespace(get_scale=lambda: 1024.),
                             backward=lambda x: (x*1024.).backward())
    task.zero_grad()
    compare = task.compare
    def seeing(f):
        f['video'].register_hook(lambda g: seen.append(float(g.abs().max()))) if f['video'].requires_grad else None
        return compare(f)
    task.compare = seeing
    cached_backward(Pull(task), task, b, 2, scaled, lambda x: x)
    same({n: g/1024 for n, g in grads(task).items()}, want)
    task.compare = compare
    assert seen[0] > 512*max(float(want[n].abs().max()) for n in want)*1e-3


@pytest.mark.slow
@pytest.mark.usefixtures('outputs')
def test_a_whole_run_in_parts(tmp_path):
    "The run page's words, the trial before the first step, evaluation: the same losses and the same weights as at once"
    from safetensors.torch import load_file
    from vidlab.data.shapes import make_shapes
    from vidlab.train import run
    data = make_shapes(tmp_path/'data', kinds=('clips',), sizes=dict(clips=dict(train=16, val=4, test=4)))
    words = dict(data='shapes', data_path=str(data), clip='random', head='seqTransf', temporal_layers=1, sampler='segment', max_frames=4, epochs=1, batch_size=8, eval_batch_size=4,
                 lr=1e-3, workers=0, log_every=1, device='cpu')
    a, b = (run(make_config(**words, chunk=c)) for c in (0, 3))
    losses = [[r['loss'] for r in f.metrics() if r['kind'] == 'step'] for f in (a, b)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (load_file(f/'ckpt'/'last'/'weights.safetensors') for f in (a, b))
    assert one.keys() == two.keys()
    for n in one: torch.testing.assert_close(two[n], one[n], atol=2e-4, rtol=0, msg=n)             # Adam makes a whole step of a gradient that is but rounding


# -- what cannot be cut

def test_tasks_without_a_contrast_are_refused():
    with pytest.raises(ValueError, match="chunk 2: task 'recognition' compares no clip.*accum"): config_from('shapes_probe', chunk=2)
    with pytest.raises(ValueError, match="task 'masked' compares no clip"): config_from('shapes_videomamba_pretrain', chunk=2)
    with pytest.raises(ValueError, match='chunk 36: a batch has 36 clips'): config_from('shapes_stan', chunk=36)
    with pytest.raises(ValueError, match='chunk -1: at least 0'): config_from('shapes_stan', chunk=-1)
    assert config_from('shapes_tvts', chunk=4).chunk == 4 and config_from('shapes_tvts_captions', chunk=4).chunk == 4
    task = RecognitionTask(create_model('probe', preset='tiny', weights='random', classes=3), classes=list('abc'))
    with pytest.raises(ValueError, match='RecognitionTask is a mean over clips'): check_task(task)


class Outsider(VideoModel):
    "Two towers of an outsider, with layers that may look at the rest of the batch"
    def __init__(self, layer):
        super().__init__()
        self.eye, self.layer, self.word, self.temperature = nn.Linear(3*16*16, 8), layer, nn.Embedding(50000, 8), nn.Parameter(torch.tensor(.1))
        self.card = Card('outsider', 16, 2, words=8, mean=(.5,)*3, std=(.5,)*3)
    def encode_video(self, video, video_mask=None): return self.layer(self.eye(video.mean(1).flatten(1)))
    def encode_text(self, text, text_mask=None): return self.word(text).mean(1)
    def similarity(self, text, video, video_mask=None, text_mask=None): return text @ video.T/self.temperature
    def forward(self, b): return dict(text=self.encode_text(b['text']), video=self.encode_video(b['video']), temperature=self.temperature)


class Centre(nn.Module):
    def forward(self, x): return x - x.mean(0)

class Counts(nn.Module):
    def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(()))
    def forward(self, x): self.n += 1; return x

class Still(nn.BatchNorm1d):
    "A batch norm that stays as it was trained"
    def train(self, mode=True): return super().train(False)


def test_layers_that_look_at_the_batch_are_refused(tmp_path):
    for layer in (nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.BatchNorm1d(8, track_running_stats=False)):
        with pytest.raises(ValueError, match='model.layer is a batch norm'): Pull(RetrievalTask(Outsider(layer)))
    check = lambda layer: check_clips(t := RetrievalTask(Outsider(layer)).train(), noise(t, 3, frames=2))
    with pytest.raises(ValueError, match='Outsider the features of a clip depend on the other clips'): check(Centre())
    with pytest.raises(ValueError, match='a forward pass changes model.layer.n'): check(Counts())
    check(nn.LayerNorm(8))
    task = RetrievalTask(Outsider(Still(8)))
    check(Still(8))
    same(step(task, [b := noise(task, 6, frames=2)], tmp_path/'b', 2)[0], step(task, [b], tmp_path/'a', 0)[0])


def test_the_trial_before_a_run_goes_in_parts(tmp_path):
    task = RetrievalTask(Outsider(Centre()))
    learn = lambda chunk, folder: Learner(task, torch.optim.SGD(task.parameters(), lr=0.), Batches(), RunFolder(tmp_path/folder), 1, make_engine(device='cpu'), chunk=chunk)
    with pytest.raises(ValueError, match='depend on the other clips'): _loss(learn(2, 'a'), noise(task, 4, frames=2))
    task.model.layer = nn.Identity()
    most, features = [], task.features
    task.features = lambda b: most.append(len(b['sid'])) or features(b)
    got, want = (_loss(learn(c, f), noise(task, 5, frames=2)).item() for c, f in ((2, 'b'), (0, 'c')))
    assert got == pytest.approx(want, rel=1e-5) and max(most[:-1]) == 2 and most[-1] == 5


def test_a_feature_without_a_row_for_each_clip_is_named():
    class Odd(RetrievalTask):
        def features(self, batch): return {k: v[1:] if k == 'text' else v for k, v in super().features(batch).items()}
    task, engine = Odd(Outsider(nn.Identity())), make_engine(device='cpu')
    with pytest.raises(ValueError, match="feature 'text' has 1 rows for 2 clips"): cached_backward(Pull(task), task, noise(task, 4, frames=2), 2, engine, put(engine))


# -- two processes

RANKS = """
import os, sys, json, torch
from pathlib import Path
sys.path.insert(0, os.environ['TESTS'])
from test_gradcache import *
from vidlab.gradcache import cut, join
rank, folder = int(os.environ['RANK']), Path(sys.argv[1])
torch.set_num_threads(1)

class OneGraph(nn.Module):
    "The same parts in one graph: what the wrapper and the cache must not change"
    unused, model = True, property(lambda self: self.task.model)
    def __init__(self, task, most): super().__init__(); self.task, self.most = task, most
    def after_step(self): pass
    def forward(self, b):
        parts = cut(self.task.whole(b), self.most)
        return self.task.compare(join([self.task.features(p) for p in parts], [len(p['sid']) for p in parts]))

out = {}
for name in json.loads(sys.argv[2]):
    task, kept = made(name), []
    b = noise(task, 7)
    mine = {k: v[:4] if rank == 0 else v[4:] for k, v in b.items()}              # four and three clips
    two = [mine, {k: v[:3] for k, v in mine.items()}]                            # two batches of a step
    for way, chunk in ((task, 2), (OneGraph(task, 2), 0)):
        opt = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.)
        learn = Learner(way, opt, Batches(*two), folder/f'{name}{chunk}{rank}', 1, make_engine(device='cpu', unused=task.unused or chunk == 0), accum=2, chunk=chunk)
        assert learn.engine.num_processes == 2
        task.train().zero_grad()
        torch.manual_seed(10 + rank)
        learn.one_step(two)
        kept.append(grads(task))
    worst = same(*kept)
    dry(task)
    task.zero_grad()
    learn = Learner(task, opt, Batches(mine), folder/f'{name}w{rank}', 1, make_engine(device='cpu', unused=task.unused), chunk=2)
    learn.one_step([mine])
    out[name] = dict(worst=torch.tensor(worst), **grads(task))
torch.save(out, folder/f'out{rank}.pt')
torch.distributed.barrier()
os._exit(0)
"""
TWICE = ['clip4clip tightTransf', 'mugstan', 'tvts']                         # a head behind the features, tokens as features, a second loss


@pytest.mark.slow
@pytest.mark.parametrize('names', [TWICE, pytest.param([n for n in SYSTEMS if n not in TWICE], marks=pytest.mark.long)], ids=['three', 'others'])
def test_two_processes_have_the_gradients_of_one(names, tmp_path):
    "Uneven batches of two ranks in parts, accumulated, dropout on: as in one graph; without dropout: as one process with all clips"
    (tmp_path/'rank.py').write_text(RANKS)
    warm.ranks([tmp_path/'rank.py', tmp_path, json.dumps(names)], timeout=600, TESTS=str(Path(__file__).resolve().parent))
    ranks = [torch.load(tmp_path/f'out{r}.pt', weights_only=True) for r in (0, 1)]
    for name in names:
        task = made(name)
        dry(task)
        b = noise(task, 7)
        if name == 'tvts': task.drop_tokens = 0.
        task(b)['loss'].backward()
        got = [{n: g for n, g in r[name].items() if n != 'worst'} for r in ranks]
        same(got[0], got[1], 1e-9)
        if name != 'tvts': same(got[0], grads(task))            # its patches are drawn for each process, and its order is a mean of each process's own clips


# -- memory

PEAKS = """
import sys, os, torch
sys.path.insert(0, os.environ['TESTS'])
from test_gradcache import *
from vidlab.cost import peak_above
task, engine = made(sys.argv[1]).eval(), make_engine(device='cpu')
def peak(n, most):
    b = noise(task, n)
    def step():
        task.zero_grad()
        if most: cached_backward(Pull(task), task, b, most, engine, lambda x: x)
        else: task(b)['loss'].backward()
    return peak_above(step, engine.device)
peak(4, 2)
print(*(peak(*a) for a in ((32, 0), (256, 32), (64, 0))))
"""


@pytest.mark.parametrize('name', ['clip4clip tightTransf', 'mugstan', 'tvts'])
def test_what_autograd_keeps_does_not_grow_with_the_batch(name):
    "Eight times the batch in parts of four keeps what one part keeps, or what the loss alone does"
    from vidlab.core import most_saved
    task, engine = dry(made(name)), make_engine(device='cpu')
    large, small = noise(task, 32, frames=2), noise(task, 4, frames=2)
    part = most_saved(lambda: task(small)['loss'].backward(), task)
    whole = most_saved(lambda: task(large)['loss'].backward(), task)
    rows = {k: v.detach() for k, v in task.features(task.whole(large)).items()}
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in rows.items()}
    loss = most_saved(lambda: task.compare(leaves)['loss'].backward(), task)
    got = most_saved(lambda: cached_backward(Pull(task), task, large, 4, engine, lambda x: x), task)
    assert got < 1.3*max(part, loss) and whole > 5*part


@pytest.mark.long
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='the high-water mark of memory cannot be reset here')
def test_memory_does_not_grow_with_the_batch(tmp_path):
    "A batch of 256 in parts of 32 takes at most 1.3 times what one of 32 takes, in glibc's heap as it is: the median of three fresh processes, whose holes fall out differently"
    (tmp_path/'peaks.py').write_text(PEAKS)
    here, ratio = Path(__file__).resolve().parent, []
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(here.parent), os.environ.get('PYTHONPATH', '')]), TESTS=str(here))
    for _ in range(3):
        said = subprocess.run([sys.executable, str(tmp_path/'peaks.py'), 'clip4clip meanP'], env=env, capture_output=True, text=True, timeout=600)
        assert said.returncode == 0, said.stderr[-3000:]
        small, large, twice = map(float, said.stdout.split())
        ratio.append(large/small)
        assert twice > 1.5*small, said.stdout
    assert sorted(ratio)[1] < 1.3, ratio


def test_gradients_keep_their_place_from_step_to_step():
    "They are moved there after the first part; parameters that get none have none, and what was added up before stays"
    task, engine = made('clip4clip text frozen'), make_engine(device='cpu')
    pull, b = Pull(task), noise(task, 6)
    for _ in range(2):
        torch.manual_seed(0)
        cached_backward(pull, task, b, 2, engine, put(engine))
        got = grads(task)
        moved = {n for n, p in task.named_parameters() if p.grad is not None and p.grad is pull.room[p]}
        assert got.keys() - moved == {'model.clip.logit_scale'} and all(p in pull.room or not p.requires_grad for p in task.parameters())       # the loss pulls that one, with the last part
        torch.manual_seed(0)
        cached_backward(pull, task, b, 2, engine, put(engine))              # the second batch of a step
        for n, p in task.named_parameters():
            if p.grad is not None: torch.testing.assert_close(p.grad, 2*got[n], rtol=1e-5, atol=1e-8)
        task.zero_grad()


# -- patches that training leaves out

def test_patch_dropout_is_that_of_open_clip():
    "In CLIP's tower open_clip's own module; STAN keeps the same places in all frames, and of clips of one frame what open_clip would keep"
    from open_clip.transformer import PatchDropout
    m = build_model(make_config(model='clip4clip', task='retrieval', preset='tiny', weights='random', head='meanP', max_frames=4, patch_dropout=.6))
    drop = m.clip.visual.patch_dropout
    assert type(drop) is PatchDropout and drop.prob == .6
    stan = create_model('stan', **TINY).train()
    stan.set_patch_dropout(.6)
    x = torch.arange(5*17.).view(5, 17, 1)
    torch.manual_seed(3); theirs = drop.train()(x)
    torch.manual_seed(3); keep = stan.places(5, 16, 'cpu')
    assert torch.equal(theirs[:, 1:, 0], x[:, 1:, 0].gather(1, keep)) and keep.shape == (5, 6)
    seen, video = [], torch.randn(2, 3, 3, 64, 64)
    stan.clip.visual.transformer.resblocks[0].register_forward_hook(lambda mod, args, y: seen.append(args[0]))
    torch.manual_seed(4); keep = stan.eval().places(2, 16, 'cpu')
    assert keep is None
    stan.encode_video(video)
    torch.manual_seed(4); stan.train().encode_video(video)
    torch.manual_seed(4); keep = stan.places(2, 16, 'cpu')
    whole, thin = (t.unflatten(0, (2, 3)) for t in seen)
    for i in range(2): assert torch.equal(thin[i, :, 1:], whole[i, :, 1:][:, keep[i]]) and torch.equal(thin[i, :, 0], whole[i, :, 0])


def test_the_branch_gets_the_positions_of_the_patches_it_sees():
    "Kept in any order the branch says the same: its tokens carry their places"
    torch.manual_seed(0)
    m = made('stan').eval().model
    video, P = torch.randn(2, 3, 3, 64, 64), 16
    order = torch.stack([torch.randperm(P) for _ in range(2)])
    want = m.encode_video(video)
    m.places = lambda *a: order
    torch.testing.assert_close(m.encode_video(video), want, atol=1e-4, rtol=1e-4)
    m.places = lambda *a: order[:, :8]
    assert (m.encode_video(video) - want).abs().max() > 1e-3


@pytest.mark.parametrize('model,options', [('clip4clip', dict(head='seqTransf', patch='3d')), ('clip4clip', dict(head='meanP')), ('probe', {}), ('stan', {}), ('mugstan', {}), ('tvts', dict(weights=None))])
def test_towers_that_can_go_without(model, options):
    torch.manual_seed(0)
    m = create_model(model, **{k: v for k, v in {**TINY, **options}.items() if v is not None})
    b = m.example()
    with torch.no_grad():
        want = m.eval().encode_video(b['video'])
        m.set_patch_dropout(.5)
        assert torch.equal(m.encode_video(b['video']), want)              # off in evaluation
        assert not torch.equal(m.train().encode_video(b['video']), want)


def test_towers_that_cannot():
    for model in ('tdsclip', 'videomamba'):
        with pytest.raises(ValueError, match='patch_dropout: .* needs every patch'): create_model(model, preset='tiny').set_patch_dropout(.5)
    with pytest.raises(ValueError, match="time='conv'"): create_model('stan', time='conv', **TINY).set_patch_dropout(.5)
    with pytest.raises(ValueError, match='patch_dropout 1.0: below 1'): config_from('shapes_stan', patch_dropout=1.)
    with pytest.raises(ValueError, match='keep_features'): config_from('shapes_probe', patch_dropout=.5, keep_features=True, random_frames=False)


# -- cost

def test_cost_of_ways():
    from vidlab.cost import Way, ways_cost, ways_of
    task = RecognitionTask(create_model('videomamba', preset='tiny', classes=3), classes=list('abc'))
    t = ways_cost(task, noise_batch(task.model.card, 8, classes=3), ways_of(['accum', 'chunk', 'patch_dropout', 'grad_checkpointing']), 64, 1e-3, device='cpu')
    assert 'needs every patch' in t.loc['patch_dropout 0.5', 'note'] and 'mean over clips' in t.loc['chunk 2', 'note']
    assert t.loc['accum 2', 'TFLOP'] == t.loc['grad_checkpointing', 'TFLOP'] == t.loc['as it is', 'TFLOP']
    assert set(t['fits 0 GiB']) == {'no', ''} and t.loc['as it is', 'MFU %'] > 0
    with pytest.raises(ValueError, match="did you mean 'chunk'"): ways_of(['chunc'])
