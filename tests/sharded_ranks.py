"One of the two processes of test_sharded.py: every system trained with DDP and in parts, checkpoints in parts and back; prints what it found as lines of JSON. Usage: torchrun --nproc-per-node=2 sharded_ranks.py FOLDER [SYSTEM ...]"
import json, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vidlab.ckpt import load_checkpoint
from vidlab.cost import noise_batch
from vidlab.learner import Learner, make_engine
from vidlab.optim import param_groups
from vidlab.registry import create, create_model, lookup, options
from vidlab.sharded import shard, units, whole_state

SYSTEMS = dict(                                                 # model, task, options of the model
    clip4clip=('clip4clip', 'retrieval', dict(head='seqTransf', clip='random')), tight=('clip4clip', 'retrieval', dict(head='tightTransf', clip='random', dropout=0.)),
    stan=('stan', 'retrieval', {}), mugstan=('mugstan', 'retrieval', {}), tdsclip=('tdsclip', 'recognition', dict(neighbours=1)), videomamba=('videomamba', 'recognition', dict(drop_path=0.)),
    pretrain=('videomamba_pretrain', 'masked', dict(drop_path=0., out_dim=64)), tvts=('tvts', 'sorting', {}))


def make(system):
    model, task, given = SYSTEMS[system]
    known, takes, cls = options('model', model), options('task', task), lookup('task', task)
    classes = list('abcd') if 'classes' in takes else None
    given = dict(dict(preset='tiny', **(dict(weights='random') if 'weights' in known else {})), **given, **{k: v for k, v in cls.model_options(classes).items() if k in known})
    more = dict(dict(classes=classes) if classes else {}, **(dict(teacher='tiny', teacher_weights='random', mask='tube') if task == 'masked' else {}))
    torch.manual_seed(0)
    return create('task', task, create_model(model, **given), **more)


class Noise:
    "Four batches of 4 clips of noise; each process has two of each"
    order = type('Order', (), dict(batch_size=4))
    def __init__(self, task): self.task = task
    def __len__(self): return 4
    def epoch(self, epoch, start=0):
        r, n = dist.get_rank(), dist.get_world_size()
        for i in range(start, 4):
            b = noise_batch(self.task.model.card, 4, classes=4, seed=10*epoch + i, pieces=self.task.pieces)
            yield {k: v[r*4//n:(r + 1)*4//n] for k, v in b.items()}


class Kept:
    def __init__(self): self.loss, self.norm = [], []
    def after_step(self, learn):
        self.loss.append(float(learn.engine.reduce(learn.out['loss'], 'mean')))
        self.norm.append(float(learn.out['grad_norm']))


class Cut(Exception): pass


class StopAt:
    def __init__(self, step): self.step = step
    def after_step(self, learn):
        if learn.step == self.step:
            learn.save()
            learn.written()
            raise Cut


def learner(folder, system, parallel, epochs=1, cbs=(), sgd=False, **kw):
    task = make(system)
    groups = param_groups(task.model, lr=1e-3, weight_decay=.05, coef_lr=.1, rule='standard', layer_decay=None, accum=1)
    opt = torch.optim.SGD(groups, lr=1e-3, momentum=.9) if sgd else torch.optim.AdamW(groups, lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    kept = Kept()
    return Learner(task, opt, Noise(task), folder, epochs, make_engine(device='cpu', unused=task.unused), clip_grad=.5, cbs=[kept, *cbs], parallel=parallel, card=dict(model=task.model.card), **kw), kept


def far(a, b): return max(abs(x - y) for x, y in zip(a, b, strict=True))

def apart(a, b): return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def weights(learn): return whole_state(learn.raw_task.model.state_dict())


def equal(folder, system):
    "DDP and parts, four steps: how far losses, norms and weights are from each other"
    (one, a), (two, b) = (learner(folder/system/p, system, p, sgd=True) for p in ('ddp', 'fsdp'))
    torch.manual_seed(7 + dist.get_rank()); one.fit()
    torch.manual_seed(7 + dist.get_rank()); two.fit()
    return dict(loss=far(a.loss, b.loss), norm=max(abs(x/y - 1) for x, y in zip(a.norm, b.norm)), weights=apart(weights(one), weights(two)), units=len(units(make(system))), moved=apart(weights(one), make(system).model.state_dict()),
                whole=(folder/system/'fsdp'/'ckpt'/'last'/'weights.safetensors').exists())


def checkpoints(folder, save):
    "Stopped in an epoch, gone on with: in parts from parts, in one piece from parts, in parts from one piece; the losses of the rest"
    whole, a = learner(folder/'whole', 'clip4clip', 'fsdp', 2)
    whole.fit()
    out = {}
    for first, then in (('fsdp', 'fsdp'), ('fsdp', 'ddp'), ('ddp', 'fsdp')):
        where = folder/f'{first}_{then}'
        cut, b = learner(where, 'clip4clip', first, 2, [StopAt(5)], async_save=save)
        try: cut.fit()
        except Cut: pass
        again, c = learner(where, 'clip4clip', then, 2, async_save=save)
        parts = load_checkpoint(where/'ckpt'/'last').get('parts') is not None
        assert again.resume() and again.step == 5
        again.fit()
        out[f'{first}_{then}'] = dict(loss=far(a.loss, b.loss + c.loss), weights=apart(weights(whole), weights(again)), parts=parts)
    return out


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.scale = nn.Linear(4, 1), nn.Parameter(torch.tensor(2.))
    def forward(self, x): return (self.scale*self.model(x)).pow(2).mean()
    eval_step = score = forward


class Stack(nn.Module):
    "64 MiB of weights in 16 blocks"
    def __init__(self):
        super().__init__()
        self.model, self.needs = nn.ModuleDict(dict(layers=nn.ModuleList([nn.Linear(1024, 1024) for _ in range(16)]))), ()
    def forward(self, x):
        for layer in self.model['layers']: x = layer(x)
        return dict(loss=x.pow(2).mean())
    eval_step = score = forward


def stalls(folder, turns=9):
    "A save that is waited for, and what a step waits for of one that is not, in turns: median seconds"
    def begin(save):
        task = Stack()
        opt = torch.optim.AdamW(task.parameters())
        return Learner(task, opt, Noise(task), folder/str(save), 1, make_engine(device='cpu'), parallel='fsdp', async_save=save)
    def back(learn): learn.task(torch.randn(8, 1024))['loss'].backward()
    def took(f):
        t = time.perf_counter()
        f()
        return time.perf_counter() - t
    now, aside = begin(False), begin(True)
    for learn in (now, aside):
        back(learn)
        learn.opt.step()
        learn.save()                                                # groups and memory, once
    whole, stall = [], []
    for _ in range(turns):
        dist.barrier()
        whole.append(took(now.save))
        aside.writing.join()
        dist.barrier()
        began = took(aside.save)
        back(aside)
        stall.append(began + took(aside.copied.wait))
    aside.written()
    return dict(whole=sorted(whole)[turns//2], stall=sorted(stall)[turns//2])


def single():
    "A loss that each process has for itself: the number that all of them hold must learn from all clips"
    out = []
    for parts in (False, True):
        task = Scaled()
        opt = torch.optim.AdamW(task.parameters(), lr=.1)
        if parts: shard(task, opt)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
        run = task if parts else nn.parallel.DistributedDataParallel(task)
        for _ in range(3):
            opt.zero_grad()
            run(x).backward()
            opt.step()
        out.append(whole_state(task.state_dict()))
    a, b = out
    return dict(same=all(torch.allclose(a[k], b[k], atol=1e-6) for k in a), learns=bool((a['scale'] - 2).abs() > .1))


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    make_engine(device='cpu')
    for s in sys.argv[2:]:
        found = equal(folder, s) if s in SYSTEMS else single() if s == 'single' else stalls(folder/s) if s == 'stall' else checkpoints(folder/s, s == 'async')
        if dist.get_rank() == 0: print('found', json.dumps({s: found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
