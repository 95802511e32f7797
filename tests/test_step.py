"The training step, the checkpoint and the numbers they lead to, on a model of five weights: each test is for one line that may go wrong."
import math
from types import SimpleNamespace

import pytest, torch
from torch import nn

from vidlab.contract import VideoModel
from vidlab.callbacks import Log
from vidlab.ckpt import find_checkpoint, load_checkpoint, save_checkpoint
from vidlab.core import RunFolder
from vidlab.data.annots import Manifest
from vidlab.explain import relevance, rollout
from vidlab.learner import Learner, make_engine
from vidlab.optim import make_optimizer, param_groups, schedule_factor
from vidlab.tasks import RecognitionTask, RegressionTask, RetrievalTask, Task
from vidlab.train import evaluate_with


class Line(nn.Module):
    "y = w x + b"
    card = SimpleNamespace(mean=(0., 0., 0.), std=(1., 1., 1.), classes=0)
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 1)
    def forward(self, x): return self.fc(x)[:, 0]


class LineTask(Task):
    "Squared error; its measure is the mean output"
    monitor = 'm'
    def forward(self, b): return dict(loss=(self.model(b['x']) - b['y']).pow(2).mean())
    def eval_step(self, b): return dict(sid=b['sid'], view=torch.zeros_like(b['sid']), out=self.model(b['x']))
    def score(self, parts, expected=None): return dict(metrics=dict(m=float(parts['video']['out'].mean())), arrays={})


class Falling(LineTask):
    lower = True


X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Y = X.sum(1)


class Rows:
    "The 24 rows in batches of `bs`, in order"
    def __init__(self, bs=8): self.bs = bs
    def __len__(self): return math.ceil(len(X)/self.bs)
    def epoch(self, epoch, start=0):
        for i in range(start, len(self)):
            s = slice(i*self.bs, (i+1)*self.bs)
            yield dict(x=X[s], y=Y[s], sid=torch.arange(len(X))[s])


class Watch:
    "Keeps what a callback can see after each step"
    def __init__(self): self.weights, self.rates, self.logged = [], [], []
    def after_step(self, learn):
        self.weights.append(flat(learn.raw_task.model))
        self.rates.append([g['lr'] for g in learn.opt.param_groups])
        self.logged.append({k: float(v) for k, v in learn.out.items()})


def flat(m): return torch.cat([p.detach().flatten().clone() for p in (m.parameters() if isinstance(m, nn.Module) else m.values())])

def learner(folder, bs=8, epochs=2, lr=.05, task=LineTask, momentum=.9, **kw):
    task, watch = task(Line()), Watch()
    opt = torch.optim.SGD(task.parameters(), lr=lr, momentum=momentum)
    return Learner(task, opt, Rows(bs), folder, epochs, make_engine(device='cpu'), cbs=[watch], **kw), watch


def by_hand(steps, lr=.05, momentum=.9):
    "Weights after each step of SGD on batches of 8 rows, from the gradient of the squared error"
    m = Line()
    w, b = m.fc.weight.detach()[0].double(), m.fc.bias.detach().double()
    vw, vb, out = torch.zeros_like(w), torch.zeros_like(b), []
    for i in range(steps):
        x, y = X[i % 3*8:i % 3*8 + 8].double(), Y[i % 3*8:i % 3*8 + 8].double()
        e = x @ w + b - y
        vw, vb = momentum*vw + 2*(e[:, None]*x).mean(0), momentum*vb + 2*e.mean()
        w, b = w - lr*vw, b - lr*vb
        out.append(torch.cat([w, b]).float())
    return out


# -- the step

@pytest.mark.parametrize('bs,accum', [(8, 1), (4, 2), (2, 4)])
def test_accumulation_is_one_large_batch(bs, accum, tmp_path):
    learn, watch = learner(tmp_path, bs, accum=accum)
    learn.fit()
    assert learn.step == learn.total_steps == 6
    for got, want in zip(watch.weights, by_hand(6), strict=True): torch.testing.assert_close(got, want, atol=1e-6, rtol=0)

def test_an_incomplete_group_is_averaged_over_what_it_has(tmp_path):
    "6 batches of 4 in groups of 4: the second group has 2, and is a step on 8 rows"
    learn, watch = learner(tmp_path, 4, epochs=1, accum=4, momentum=0.)
    learn.fit()
    m = Line()
    for rows in (slice(0, 16), slice(16, 24)):
        m.zero_grad()
        (m(X[rows]) - Y[rows]).pow(2).mean().backward()
        for p in m.parameters(): p.data -= .05*p.grad
    assert learn.step == 2
    torch.testing.assert_close(watch.weights[-1], flat(m), atol=1e-6, rtol=0)

def test_the_logged_loss_is_the_mean_of_the_group(tmp_path):
    one, many = (learner(tmp_path/str(bs), bs, epochs=1, accum=8//bs) for bs in (8, 2))
    one[0].fit(); many[0].fit()
    for a, b in zip(one[1].logged, many[1].logged, strict=True): assert a == pytest.approx(b, abs=1e-5)

def test_an_epoch_begins_in_training_mode(tmp_path):
    seen = []
    watch = SimpleNamespace(after_step=lambda learn: seen.append(learn.raw_task.training))
    learn, _ = learner(tmp_path, epochs=2, evaluate=lambda learn: dict(m=float(learn.raw_task.eval().training)))
    learn.cbs.append(watch)
    learn.raw_task.eval()
    learn.fit()
    assert seen == [True]*6

def test_logged_rows_are_means_of_their_steps(tmp_path):
    "6 steps, a row at every fourth and at the end"
    learn, watch = learner(tmp_path, 4, epochs=1)
    learn.cbs.append(Log(every=4))
    learn.fit()
    loss, rows = [o['loss'] for o in watch.logged], [r for r in RunFolder(tmp_path).metrics() if r['kind'] == 'step']
    assert [r['step'] for r in rows] == [4, 6]
    assert [r['loss'] for r in rows] == pytest.approx([sum(loss[:4])/4, sum(loss[4:])/2], abs=1e-5)

def test_gradients_do_not_pile_up(tmp_path):
    "Three steps on one batch at rate 0 have the same gradient norm"
    learn, watch = learner(tmp_path, 24, epochs=3, lr=0.)
    learn.fit()
    assert len({round(o['grad_norm'], 5) for o in watch.logged}) == 1

def test_the_gradient_norm_is_limited(tmp_path):
    learn, watch = learner(tmp_path, lr=1., epochs=1, momentum=0., clip_grad=.1)
    before = flat(learn.raw_task.model)
    learn.fit()
    moved = (watch.weights[0] - before).norm()
    assert watch.logged[0]['grad_norm'] > .1 and moved == pytest.approx(.1, abs=1e-4)


# -- rates

@pytest.mark.parametrize('name', ['cosine', 'linear', 'constant', 'beit', 'warmup_linear', 'warmup_cosine'])
def test_rate_of_each_step(name, tmp_path):
    "Of group g and step k: base rate of g times the schedule at k"
    task, watch = LineTask(Line()), Watch()
    opt = torch.optim.SGD([dict(params=[task.model.fc.weight], lr=.02), dict(params=[task.model.fc.bias], lr=.4)])
    Learner(task, opt, Rows(8), tmp_path, 4, make_engine(device='cpu'), lambda step: schedule_factor(name, step, 12, .25), cbs=[watch]).fit()
    half = lambda x: .5*(1 + math.cos(math.pi*x))
    want = dict(cosine=lambda k: k/3 if k < 3 else half((k - 3)/9), linear=lambda k: k/3 if k < 3 else 1 - (k - 3)/9, constant=lambda k: min(1, k/3),
                beit=lambda k: k/2 if k < 3 else half((k - 3)/9), warmup_linear=lambda k: k/3 if k < 3 else (1 - k/12)/.75, warmup_cosine=lambda k: k/3 if k < 3 else half(k/12))[name]
    assert len(watch.rates) == 12
    for k, (a, b) in enumerate(watch.rates): assert (a, b) == pytest.approx((.02*want(k), .4*want(k)), abs=1e-9), k

def test_weight_decay_follows_its_schedule_where_there_is_one(tmp_path):
    task = LineTask(Line())
    opt = make_optimizer('adamw', param_groups(task.model, lr=.1, weight_decay=.5))
    seen = []
    watch = SimpleNamespace(after_step=lambda learn: seen.append(sorted(g['weight_decay'] for g in learn.opt.param_groups)))
    Learner(task, opt, Rows(8), tmp_path, 1, make_engine(device='cpu'), decay=lambda step: .1*(step + 1), cbs=[watch]).fit()
    assert seen == [pytest.approx([0., .1*k]) for k in (1, 2, 3)]              # the bias has none


# -- averaged weights

def averaged(start, weights, d):
    "The average begins as the start weights and moves by 1 - d of the way at every step, the first included"
    out = [start]
    for w in weights: out.append(d*out[-1] + (1 - d)*w)
    return out[1:]

def test_averaged_weights_follow_their_formula(tmp_path):
    learn, watch = learner(tmp_path, epochs=3, ema=.7)
    start = flat(learn.raw_task.model).clone()
    seen = []
    learn.cbs.append(SimpleNamespace(after_step=lambda learn: seen.append(flat(learn.ema.module))))
    learn.fit()
    for got, want in zip(seen, averaged(start, watch.weights, .7), strict=True): torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert (seen[-1] - watch.weights[-1]).abs().max() > 1e-3

def test_validation_measures_the_averaged_weights(tmp_path):
    batch = next(Rows(24).epoch(0))
    learn, watch = learner(tmp_path, epochs=2, ema=.9, evaluate=lambda learn: evaluate_with(learn, dict(video=[batch])))
    start = flat(learn.raw_task.model).clone()
    learn.fit()
    value = lambda w: float((X @ w[:4] + w[4]).mean())
    assert learn.metrics['m'] == pytest.approx(value(averaged(start, watch.weights, .9)[-1]), abs=1e-5)
    assert abs(learn.metrics['m'] - value(watch.weights[-1])) > 1e-3
    assert learn.raw_task.model is learn._model() and torch.equal(flat(learn.raw_task.model), watch.weights[-1])

def test_best_holds_the_averaged_weights_and_last_both(tmp_path):
    learn, watch = learner(tmp_path, epochs=1, ema=.9, evaluate=lambda learn: dict(m=1.))
    start = flat(learn.raw_task.model).clone()
    learn.fit()
    ema = averaged(start, watch.weights, .9)[-1]
    best, last = load_checkpoint(tmp_path/'ckpt'/'best'), load_checkpoint(tmp_path/'ckpt'/'last')
    for got, want in ((best['weights'], ema), (last['ema'], ema), (last['weights'], watch.weights[-1])):
        torch.testing.assert_close(torch.cat([got['fc.weight'].flatten(), got['fc.bias']]), want, atol=1e-6, rtol=0)

def test_the_average_is_resumed(tmp_path):
    learn, _ = learner(tmp_path/'a', epochs=2, ema=.7)
    learn.fit()
    half, _ = learner(tmp_path/'b', epochs=1, ema=.7)
    half.fit()
    again, _ = learner(tmp_path/'b', epochs=2, ema=.7)
    assert again.resume() and again.step == 3
    again.fit()
    assert torch.equal(flat(again.ema.module), flat(learn.ema.module)) and torch.equal(flat(again._model()), flat(learn._model()))

def test_the_average_on_the_cpu_is_the_same(tmp_path):
    "`ema_cpu` moves it, here from the CPU to the CPU: what is measured and kept stays the same"
    one = lambda d, **kw: learner(tmp_path/d, epochs=2, ema=.9, evaluate=lambda learn: evaluate_with(learn, dict(video=[next(Rows(24).epoch(0))])), **kw)[0].fit()
    a, b = one('a'), one('b', ema_cpu=True)
    assert torch.equal(flat(a.ema.module), flat(b.ema.module)) and a.metrics == b.metrics
    assert (a.ema.device, b.ema.device) == (None, torch.device('cpu'))

def test_every_second_epoch_is_kept(tmp_path):
    "Their weights alone, averaged where there are such, also when the run was resumed in between"
    learn, watch = learner(tmp_path, epochs=3, ema=.9, keep_every=2, save_every=1)
    seen = []
    learn.cbs.append(SimpleNamespace(after_epoch=lambda learn: seen.append(flat(learn.ema.module).clone())))
    learn.fit()
    assert sorted(p.name for p in (tmp_path/'ckpt').iterdir() if p.name.startswith('epoch')) == ['epoch2']
    again, _ = learner(tmp_path, epochs=4, ema=.9, keep_every=2)
    assert again.resume()
    again.fit()
    assert sorted(p.name for p in (tmp_path/'ckpt').iterdir() if p.name.startswith('epoch')) == ['epoch2', 'epoch4']
    kept = load_checkpoint(tmp_path/'ckpt'/'epoch2')
    assert kept['state'] is None and kept['card']['epoch'] == 2
    assert torch.equal(torch.cat([kept['weights']['fc.weight'].flatten(), kept['weights']['fc.bias']]), seen[1])


@pytest.mark.parametrize('first', [True, False])
def test_an_evaluation_before_the_first_step(first, tmp_path):
    "Of the start weights, written as epoch 0; it chooses no checkpoint, and a run that goes on does not repeat it"
    start, seen = flat(Line()), []
    def evaluate(learn):
        seen.append(flat(learn.raw_task.model).clone())
        return dict(m=1. if learn.step else 9.)
    for epochs in (1, 2):
        learn, _ = learner(tmp_path, epochs=epochs, eval_first=first, evaluate=evaluate)
        learn.cbs.append(Log())
        learn.resume()
        learn.fit()
    rows = [(r['epoch'], r['m']) for r in RunFolder(tmp_path).metrics() if r['kind'] == 'epoch']
    assert rows == [(0, 9.)]*first + [(1, 1.), (2, 1.)] and torch.equal(seen[0], start) == first
    assert load_checkpoint(tmp_path/'ckpt'/'best')['card']['epoch'] == 1 and learn.best == 1.


# -- the best

@pytest.mark.parametrize('task,values,best', [(LineTask, [1., 3., 2.], 2), (Falling, [3., 1., 2.], 2), (LineTask, [3., 3., 1.], 1), (LineTask, [math.nan, 1., 2.], 3), (Falling, [2., math.nan, 3.], 1)])
def test_best_is_kept(task, values, best, tmp_path):
    it = iter(values)
    learn, watch = learner(tmp_path, epochs=3, task=task, evaluate=lambda learn: dict(m=next(it)))
    learn.fit()
    ck = load_checkpoint(tmp_path/'ckpt'/'best')
    assert ck['card']['epoch'] == best and ck['card']['metrics']['m'] == values[best - 1] == learn.best
    assert torch.equal(torch.cat([ck['weights']['fc.weight'].flatten(), ck['weights']['fc.bias']]), watch.weights[3*best - 1])
    assert load_checkpoint(tmp_path/'ckpt'/'last')['card']['epoch'] == 3

def test_best_so_far_survives_a_resume(tmp_path):
    learn, _ = learner(tmp_path, epochs=1, evaluate=lambda learn: dict(m=3.))
    learn.fit()
    again, _ = learner(tmp_path, epochs=2, evaluate=lambda learn: dict(m=2.))
    again.resume(); again.fit()
    assert load_checkpoint(tmp_path/'ckpt'/'best')['card']['epoch'] == 1


# -- the temperature

class Pair(VideoModel):
    "Two sides and a temperature that every step raises"
    card = Line.card
    def __init__(self, scale, learns=True):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(scale), requires_grad=learns)
        self.w = nn.Parameter(torch.eye(4))
    def encode_text(self, text, text_mask=None): return text.float() @ self.w
    def encode_video(self, video, video_mask=None): return video
    def forward(self, b): return dict(text=self.encode_text(b['text']), video=self.encode_video(b['x']))
    def similarity(self, text, video, text_mask=None, video_mask=None): return self.logit_scale.exp() * text @ video.T

def test_temperature_stays_within_its_limit(tmp_path):
    task, seen = RetrievalTask(Pair(1.9), max_logit_scale=2.), []
    x = nn.functional.normalize(X[:8], dim=1)
    batches = Rows(8)
    batches.epoch = lambda epoch, start=0: iter([dict(x=x, text=x, sid=torch.arange(8))]*3)
    watch = SimpleNamespace(after_step=lambda learn: seen.append(task.model.logit_scale.item()))
    Learner(task, torch.optim.SGD([task.model.logit_scale], lr=100.), batches, tmp_path, 1, make_engine(device='cpu'), cbs=[watch]).fit()
    assert seen == [2.]*3

def test_temperature_limit_is_that_of_clip():
    task = RetrievalTask(Pair(5.))
    task.after_step()
    assert task.model.logit_scale.item() == pytest.approx(math.log(100), abs=1e-6)

def test_a_fixed_temperature_is_left_alone():
    task = RetrievalTask(Pair(5., learns=False), max_logit_scale=2.)
    task.after_step()
    assert task.model.logit_scale.item() == 5.


# -- tasks

@pytest.mark.parametrize('dsl,right', [(False, 50.), (True, 100.)])
def test_task_applies_the_dual_softmax_it_is_asked_for(dsl, right):
    "Both texts prefer video 0; among the texts, video 1 prefers text 1"
    task, at = RetrievalTask(Pair(0.), dsl=dsl), dict(sid=torch.arange(2), view=torch.zeros(2, dtype=torch.long))
    text, ones = torch.tensor([[6., 5.], [6.5, 6.]]), torch.ones(2, 1)
    found = task.score(dict(video=dict(at, video=torch.eye(2), video_mask=ones), text=dict(at, text=text, text_mask=ones)))
    assert found['metrics']['t2v/R1'] == right

class Bright(nn.Module):
    "Logits from the brightness of a clip"
    def __init__(self, classes):
        super().__init__()
        self.card = SimpleNamespace(mean=(0., 0., 0.), std=(1., 1., 1.), classes=classes)
        self.w = nn.Parameter(torch.linspace(-1, 2, classes))
    def forward(self, b): return dict(logits=b['video'].mean((1, 2, 3, 4))[:, None]*self.w)

CLIPS = dict(video=torch.stack([torch.full((2, 3, 4, 4), v) for v in (.2, .4, .9)]), sid=torch.arange(3), view=torch.zeros(3, dtype=torch.long))

def test_task_regression_speaks_in_the_unit_of_the_target():
    task, b = RegressionTask(Bright(1), target_mean=5., target_std=2.), dict(CLIPS, target=torch.tensor([4., 5., 6.]))
    raw = task.model(b)['logits']
    torch.testing.assert_close(task.eval_step(b)['logits'], raw*2 + 5)
    torch.testing.assert_close(task(b)['loss'], (raw[:, 0] - torch.tensor([-.5, 0., .5])).square().mean())

def test_task_recognition_mixes_in_training_only():
    task, b = RecognitionTask(Bright(2), ['dark', 'light'], mixup=1.), dict(CLIPS, label=torch.tensor([0, 0, 1]))
    clean = nn.functional.cross_entropy(task.model(b)['logits'], b['label'])
    torch.testing.assert_close(task.eval()(b)['loss'], clean)
    assert (task.train()(b)['loss'] - clean).abs() > 1e-4

def test_task_recognition_mixes_as_often_as_it_is_told():
    "mix_prob 0 never; mix_switch 1 always a box, 0 never one"
    from unittest import mock
    b, seen = dict(CLIPS, label=torch.tensor([0, 0, 1])), []
    clean = nn.functional.cross_entropy(Bright(2)(b)['logits'], b['label'])
    loss = lambda **kw: RecognitionTask(Bright(2), ['dark', 'light'], mixup=1., cutmix=1., **kw).train()(b)['loss']
    torch.testing.assert_close(loss(mix_prob=0.), clean)
    with mock.patch('vidlab.data.transforms._box', lambda h, w, lam, gen: (seen.append(1), (lam, None))[1]):
        loss(mix_switch=0.)
        assert not seen
        loss(mix_switch=1.)
        assert seen

def test_task_recognition_pastes_boxes_between_two_sides():
    "cutmix_minmax alone mixes, too; what it cannot be is said before a batch is seen"
    b = dict(CLIPS, label=torch.tensor([0, 0, 1]))
    task = RecognitionTask(Bright(2), ['dark', 'light'], cutmix_minmax=[.2, .8])
    clean = nn.functional.cross_entropy(Bright(2)(b)['logits'], b['label'])
    torch.testing.assert_close(task.eval()(b)['loss'], clean)
    assert (task.train()(b)['loss'] - clean).abs() > 1e-4
    with pytest.raises(ValueError, match='cutmix_minmax .* two shares of a side'): RecognitionTask(Bright(2), ['dark', 'light'], cutmix_minmax=[.8, .2])

def test_task_recognition_mean_average_precision():
    "By hand, over the classes that occur; the third has no clip and does not count"
    task, one = RecognitionTask(Bright(3), ['a', 'b', 'c'], mean_ap=True), torch.tensor
    logits = one([[2., 1., 0.], [1., 2., 0.], [2., 1.5, 0.], [0., 3., 0.]])
    part = dict(sid=torch.arange(4), view=torch.zeros(4).long(), logits=logits, label=one([0, 1, 1, 0]))
    p, y = logits.softmax(1), one([0, 1, 1, 0])
    def ap(c):
        hit = (y == c)[p[:, c].argsort(descending=True)].float()
        return float((hit.cumsum(0)/torch.arange(1, 5)*hit).sum()/hit.sum())
    got = task.score(dict(video=part))['metrics']
    assert got['mAP'] == pytest.approx(50*(ap(0) + ap(1)), abs=1e-3) and 40 < got['mAP'] < 90
    task.mean_ap = False
    assert 'mAP' not in task.score(dict(video=part))['metrics']


# -- attention through layers

A = torch.tensor([[1., 0.], [.5, .5]])[None, None]
B = torch.tensor([[.2, .8], [.6, .4]])[None, None]

def test_rollout_of_two_layers():
    "Half the identity each: (B + 1)/2 (A + 1)/2, the later layer on the left"
    want = torch.tensor([[.6, .4], [.3, .7]]) @ torch.tensor([[1., 0.], [.25, .75]])
    torch.testing.assert_close(want, torch.tensor([[.7, .3], [.475, .525]]))
    torch.testing.assert_close(rollout([A, B])[0], want)
    torch.testing.assert_close(rollout([torch.cat([A, B], 1)])[0], (A + B)[0, 0]/4 + torch.eye(2)/2)          # heads are averaged

def test_relevance_of_two_layers():
    "1 + a, then b on its left: a + b + b a, of the positive parts of map times gradient"
    ga, gb = torch.tensor([[1., 5.], [2., -2.]])[None, None], torch.tensor([[5., 1.], [-1., 0.]])[None, None]
    a, b = torch.tensor([[1., 0.], [1., 0.]]), torch.tensor([[1., .8], [0., 0.]])
    torch.testing.assert_close(relevance([A, B], [ga, gb])[0], a + b + b @ a)


# -- checkpoints

def saved(path, value): return save_checkpoint(path, dict(w=torch.full((2,), float(value))), dict(step=value), dict(step=value))

@pytest.mark.parametrize('fails', ['rename', 'tensors', 'state', 'card'])
def test_the_old_checkpoint_outlives_a_failure(fails, tmp_path, monkeypatch):
    "Whatever breaks while a checkpoint is written, a whole one is there"
    import safetensors.torch
    from pathlib import Path
    path, rename = saved(tmp_path/'last', 1), Path.rename
    def broken(*a, **kw): raise OSError('the disk is gone')
    with monkeypatch.context() as m:
        if fails == 'rename': m.setattr(Path, 'rename', lambda self, to: broken() if Path(to) == path else rename(self, to))
        if fails == 'tensors': m.setattr(safetensors.torch, 'save_file', broken)
        if fails == 'state': m.setattr(torch, 'save', broken)
        if fails == 'card': m.setattr('vidlab.ckpt.write_json', broken)
        with pytest.raises(OSError, match='the disk is gone'): saved(path, 2)
    assert find_checkpoint(path) is not None
    ck = load_checkpoint(path)
    assert (ck['card']['step'], ck['state']['step'], ck['weights']['w'].tolist()) == (1, 1, [1., 1.])
    saved(path, 3)
    assert load_checkpoint(path)['card']['step'] == 3 and [p.name for p in tmp_path.iterdir()] == ['last']


# -- the split's fingerprint

def table(**change):
    rows = dict(id=['a', 'b', 'b'], path=['a.mp4', 'b.mp4', 'b.mp4'], text=['a cat sits', 'a dog runs', 'the dog runs'], split=['test']*3)
    return Manifest.build({**rows, **change}, root='.', missing='keep')

@pytest.mark.parametrize('change', [dict(text=['a cat sits', 'a dog ran', 'the dog runs']), dict(text=['a cat sits', 'the dog runs', 'a dog runs']), dict(id=['a', 'b', 'c']),
                                    dict(split=['test', 'test', 'val']), dict(start=[0., 1., 1.])], ids=lambda c: next(iter(c)))
def test_the_fingerprint_of_a_split_sees(change): assert table(**change).hash() != table().hash()

def test_the_fingerprint_of_a_split_is_blind_to_folders():
    here, there = (Manifest.build(dict(id=['a'], path=[f'{d}/a.mp4'], text=['t']), root=d, missing='keep') for d in ('here', 'there'))
    assert here.hash() == there.hash()


# -- evaluations during training

def test_evaluations_every_few_epochs_and_at_the_end(tmp_path):
    batch, seen = next(Rows(24).epoch(0)), []
    learn, _ = learner(tmp_path, epochs=5, evaluate=lambda learn: evaluate_with(learn, dict(video=[batch]), every=2))
    learn.cbs.append(SimpleNamespace(after_epoch=lambda learn: seen.append((learn.epoch, 'm' in learn.metrics))))
    learn.fit()
    assert [e for e, measured in seen if measured] == [2, 4, 5]


def test_logged_numbers_are_those_of_all_processes(tmp_path):
    from vidlab.callbacks import Log
    from vidlab.core import RunFolder
    others = lambda x, how: (x + torch.full_like(x, 3.))/2 if how == 'mean' else None          # the other process has 3 everywhere
    learn = SimpleNamespace(out=dict(loss=torch.tensor(1.), acc=torch.tensor(.5)), seen=4, data_time=.1, step_time=.2, step=1, total_steps=1, epoch=0, main=True, skipped=0,
                            opt=SimpleNamespace(param_groups=[dict(lr=.1)]), folder=RunFolder(tmp_path), engine=SimpleNamespace(num_processes=2, reduce=others))
    log = Log(1)
    log.before_fit(learn)
    log.after_step(learn)
    row, = RunFolder(tmp_path).metrics()
    assert (row['loss'], row['acc'], row['clips_per_s']) == (2., 1.75, 40.)


def test_a_failing_evaluation_costs_nothing_that_was_trained(tmp_path):
    "The weights of the epoch are there, and a resumed run evaluates them before it goes on; the result is that of an unbroken run"
    def fails(learn):
        if learn.epoch == 2: raise RuntimeError('no room')
        return dict(m=float(learn.epoch))
    learn, _ = learner(tmp_path/'a', epochs=2, evaluate=fails)
    with pytest.raises(RuntimeError, match='no room'): learn.fit()
    assert load_checkpoint(tmp_path/'a'/'ckpt'/'last')['card']['epoch'] == 2 and load_checkpoint(tmp_path/'a'/'ckpt'/'best')['card']['epoch'] == 1
    again, watch = learner(tmp_path/'a', epochs=2, evaluate=lambda learn: dict(m=float(learn.epoch)))
    assert again.resume()
    again.fit()
    whole, _ = learner(tmp_path/'b', epochs=2, evaluate=lambda learn: dict(m=float(learn.epoch)))
    whole.fit()
    assert torch.equal(flat(again._model()), flat(whole._model())) and again.best == whole.best == 2.
    assert load_checkpoint(tmp_path/'a'/'ckpt'/'best')['card']['epoch'] == 2 and not watch.weights


def test_clips_without_numbers_count_as_wrong():
    from vidlab.tasks.recognition import hits
    prob = torch.tensor([[.9, .1, 0.], [float('nan')]*3, [0., .2, .8]])
    assert hits(prob, torch.tensor([0, 0, 2]), 1).tolist() == [True, False, True] and hits(prob, torch.tensor([[1, 1, 1]]*3), 2).tolist() == [True, False, True]
