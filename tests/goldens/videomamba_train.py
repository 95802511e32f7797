"VideoMamba: groups, rates, steps of the loop and merged views against the official code"
import tempfile

import torch

from goldens import close, kind, part, sub
from goldens.videomamba_model import classifier, student
from vidlab.evaluate import unique_samples
from vidlab.learner import Learner, make_engine
from vidlab.optim import make_optimizer, param_groups, schedule_factor
from vidlab.tasks import RecognitionTask, RegressionTask


def groups_of(model, lr, wd, decay, rule): return param_groups(model, lr=lr, weight_decay=wd, rule=rule, layer_decay=decay if decay < 1 else None)


def table(groups, lr): return {n: (g['lr']/lr, g['weight_decay']) for g in groups for n in g['names']}


def like(names, depth):
    "A small model with these parameters: head, norms, directions and biases as the names say"
    ssm = dict(bias='layers.0.mixer.in_proj.bias' in names, conv_bias='layers.0.mixer.conv1d.bias' in names)
    cfg = dict(embed_dim=8, depth=depth, img_size=16, patch_size=8, num_frames=2, num_classes=3, rms_norm='layers.0.norm.bias' not in names, bimamba='layers.0.mixer.D_b' in names, ssm_cfg=ssm)
    decoders = len({n.split('.')[1] for n in names if n.startswith('clip_decoder.')})
    if decoders: return student(dict(cfg, clip_return_layer=decoders, clip_output_dim=8))
    model = classifier(cfg, image='temporal_pos_embedding' not in names)
    if 'head.weight' not in names: model.head = torch.nn.Identity()          # a trunk without classes
    return model


@kind('videomamba', 'param_groups')
def param_groups_(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(f'{i} {c["variant"]}'):
            want = {n: (g['lr_scale'], g['weight_decay']) for g in c['groups'] for n in g['params']}
            model = like(set(want), c['depth'])
            got = table(groups_of(model, 1., c['weight_decay'], c['layer_decay'], 'ends' if c['variant'] == 'current' else 'standard'), 1.)
            assert set(got) == set(want), f'other parameters: {sorted(set(got) ^ set(want))[:4]}'
            for n in want: close(n, got[n], want[n], 1e-12)


def schedule(base, end, total, warmup, start): return [base*schedule_factor('beit', s, total, float(warmup) if warmup > 1 else warmup/total, start/base, end/base) for s in range(total)]


@kind('videomamba', 'lr_schedule')
def lr_schedule(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(str(i)):
            n = c['niter_per_ep']
            warmup = c.get('warmup_epochs', 0)*n
            if warmup and c.get('warmup_steps', -1) > 0: warmup = c['warmup_steps']
            got = schedule(c['base_value'], c['final_value'], c['epochs']*n, warmup, c.get('start_warmup_value', 0))
            close(str(i), got, c['values'], case['tolerance'], own=True)


class Batches(list):
    def epoch(self, epoch, start=0): return iter(self[start:])


@kind('videomamba', 'train_steps')
def train_steps(case, tensors):
    given = dict(task='class', update_freq=1, soft_targets=False, smoothing=.1, layer_decay=1., min_lr=1e-6, betas=(.9, .999), weight_decay=.05)
    c, tol, x, want = {**given, **case['config']}, case['tolerance'], part(tensors, 'input/'), part(tensors, 'output/')
    number = c['task'] == 'regression'
    model = classifier(c['model'])
    model.load_state_dict(part(tensors, 'weight/'))
    names = [str(i) for i in range(c['model']['num_classes'])]
    task = RegressionTask(model) if number else RecognitionTask(model, names, smoothing=0. if c['soft_targets'] else c['smoothing'])
    n, k = c['micro_steps'], c['update_freq']
    total, warmup = c['epochs']*(n//k), c.get('warmup_epochs', 0)*(n//k)
    if warmup and c.get('warmup_steps', -1) > 0: warmup = c['warmup_steps']
    rates = schedule(c['lr'], c['min_lr'], total, warmup, c.get('warmup_lr', 0))
    decays = schedule(c['weight_decay'], c.get('weight_decay_end', c['weight_decay']), total, 0, 0)
    close('lr_schedule', rates, want['lr_schedule'], 1e-7, own=True)
    close('wd_schedule', decays, want['wd_schedule'], 1e-7, own=True)
    opt = make_optimizer('adamw', groups_of(model, c['lr'], c['weight_decay'], c['layer_decay'], 'ends'), betas=tuple(c['betas']), eps=c.get('eps', 1e-8))
    batches = Batches(dict(video=x[f'video.{i}'].transpose(1, 2), **{'target' if number else 'label': x[f'target.{i}']}, sid=torch.arange(len(x[f'video.{i}']))) for i in range(n))
    losses = []
    task.register_forward_hook(lambda m, a, out: losses.append(float(out['loss'].detach())))
    with tempfile.TemporaryDirectory() as d:
        learn = Learner(task, opt, batches, d, c['epochs'], make_engine('fp32', 'cpu'), lambda s: rates[s]/c['lr'], lambda s: decays[s], k, c.get('clip_grad') or 0., c.get('ema') or 0.)
        learn.step = c.get('start_epoch', 0)*(n//k)
        task.train()
        for i in range(0, n - n % k, k):
            learn.one_step(batches[i:i+k])
            learn.step += 1
        for b in batches[n - n % k:]: task(b)                       # seen, but too few for a step
    close('losses', losses, want['losses'], tol, own=True)
    state, ema = model.state_dict(), learn.ema.module.state_dict() if learn.ema else {}
    for name, e in want.items():
        if name.startswith('final.'): close(name, state[name[6:]], e, tol, own=True)
        if name.startswith('ema.'): close(name, ema[name[4:]], e, tol, own=True)


def views(files, read):
    "Rows of all files as one part, every (clip, crop) of a video once"
    rows = [read(r) for f in files for r in f]
    ids = sorted({r[0] for r in rows})
    return unique_samples(dict(sid=torch.tensor([ids.index(r[0]) for r in rows]), view=torch.tensor([100*r[3] + r[4] for r in rows]), logits=torch.tensor([r[1] for r in rows], dtype=torch.float64),
                               label=torch.tensor([r[2] for r in rows])))


def _row(r):
    name, rest = r.split(' ', 1)
    scores, rest = rest[1:].split('] ') if rest[0] == '[' else rest.split(' ', 1)
    label, clip, crop = rest.split()
    return name, [float(s) for s in scores.split(',')], float(label), int(clip), int(crop)


class Head(torch.nn.Module):
    "Stands for a model with so many outputs"
    def __init__(self, classes):
        from types import SimpleNamespace
        super().__init__(); self.fc, self.card = torch.nn.Linear(1, 1), SimpleNamespace(classes=classes)


@kind('videomamba', 'merge_views')
def merge_views(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(f'{i} {c["task"]}'):
            p = views([f[1:] for f in c['files']], _row)
            if c['task'] == 'regression':
                p['target'] = p.pop('label')
                close('mse', RegressionTask(Head(1)).score(dict(video=p))['metrics']['mse'], c['mse'], case['tolerance'])
            else:
                p['label'] = p['label'].long(); n = p['logits'].shape[1]
                m = RecognitionTask(Head(n), [str(j) for j in range(n)]).score(dict(video=p))['metrics']
                for k in ('top1', 'top5'): close(k, m.get(k, 100.), c[k], case['tolerance'])
