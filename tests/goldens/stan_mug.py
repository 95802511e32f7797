"Mug-STAN: the similarity head, the metrics and the gathered loss against the official code"
import json, os, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchmetrics.functional.classification import multiclass_accuracy

from goldens import close, close_grad, kind, part, run_ranks, sub
from vidlab.losses import contrastive, gather
from vidlab.metrics import official_metrics, retrieval_metrics
from vidlab.mug import MugHead

OFFICIAL = dict(mug_frame_token_simple='simple', mug_frame_token='full', mug_frame_text='frame_text', drl_wti='drl_wti')


def mode_of(name):
    assert name in OFFICIAL, f'unknown Mug mode {name!r}; known: {", ".join(OFFICIAL)}'
    return OFFICIAL[name]


def head_of(name, tau, dim, weights):
    "An official head, its defects included"
    head = MugHead(mode_of(name), tau, dim, leak=True)
    head.load_state_dict({k: weights[k] for k in head.state_dict()})
    return head


@kind('stan', 'mug_head_modes')
def mug_head_modes(case, tensors):
    cfg, tol, x = case['config'], case['tolerance'], part(tensors, 'input/')
    tau = cfg.get('tau_head', cfg.get('tau', 100))
    weights, grads = part(tensors, 'weight/'), part(tensors, 'grad/')
    for name, want in part(tensors, 'output/').items():
        mode, parse = name.removesuffix('_parse'), name.endswith('_parse')
        with sub(name):
            head = head_of(mode, tau, x['text_tokens'].shape[-1], weights)
            ins = {k: x[k].clone().requires_grad_() for k in ('text_tokens', 'video_frames')}
            score = lambda: head(ins['text_tokens'], x['text_mask'], ins['video_frames'], x.get('video_mask'), x['parse_weights'] if parse else None)
            got = score()
            close(name, got, want, tol)
            with torch.no_grad(): close(f'{name} without gradient', score(), want, tol)
            head.block_mb = 1e-6; close(f'{name} pair by pair', score(), want, tol)
            mine = {k.removeprefix(name + '/'): g for k, g in grads.items() if k.startswith(name + '/')}
            known = dict(ins, **dict(head.named_parameters()))
            assert set(mine) <= set(known), f'grad/{name}: {sorted(set(mine) - set(known))} are no inputs; known: {sorted(known)}'
            if mine:
                (got*x['cotangent']).sum().backward()
                for k, g in mine.items(): close_grad(f'grad/{name}/{k}', known[k].grad, g, tol)
    missed = {k.split('/')[0] for k in grads} - set(part(tensors, 'output/'))
    assert not missed, f'gradients without an output: {sorted(missed)}'


# ---------------------------------------------------------------------------------------------------------------- metrics
def cosine(text, video): return F.normalize(text, dim=-1, eps=1e-8) @ F.normalize(video, dim=-1, eps=1e-8).T


def ranked(name, sim, want, tol):
    got = retrieval_metrics(sim)
    assert not got['t2v/ties'], f'{name}: scores tie'
    for k, v in want.items(): close(f'{name}/{k}', got[f't2v/{k}'], v, tol)


def accurate(name, scores, labels, want, tol):
    for k, v in want.items():
        top = int(k.removeprefix('overall_acc'))
        got = multiclass_accuracy(scores, torch.tensor(labels), num_classes=scores.shape[1], average='micro', top_k=min(top, scores.shape[1]))
        close(f'{name}/{k}', got, v, tol)


@kind('stan', 'metrics')
def metrics(case, tensors):
    tol = max(case.get('tolerance') or 0, 1e-6)
    t = lambda c, k: torch.tensor(c[k], dtype=torch.float32)
    mug = lambda text, mask, video: MugHead()(text, mask, video)     # the official metric always takes the default head
    plain, tokens, shot = (case.get(k) for k in ('retrieval', 'mug_retrieval', 'zero_shot'))
    names = {k for k, v in case.items() if isinstance(v, dict) and 'metrics' in v}
    assert names <= {'retrieval', 'retrieval_ties', 'mug_retrieval', 'zero_shot', 'zero_shot_mug'}, f'unknown sub-cases: {sorted(names)}'
    for name in sorted(names):
        c, want = case[name], case[name]['metrics']
        own = lambda k, base: t(c if k in c else base, k)             # a sub-case without features of its own goes on with another's
        with sub(name):
            if name == 'retrieval': ranked(name, cosine(t(c, 'text'), t(c, 'video')), want, tol)
            elif name == 'retrieval_ties': ties(name, cosine(own('text', plain), own('video', plain)), want, tol)
            elif name == 'mug_retrieval': ranked(name, mug(t(c, 'text'), t(c, 'mask'), t(c, 'video')), want, tol)
            elif name == 'zero_shot': accurate(name, cosine(t(c, 'class_text'), own('video', plain)).T, c['labels'], want, tol)
            else: accurate(name, mug(t(c, 'class_text'), t(c, 'class_mask'), own('video', tokens)).T, c.get('labels') or shot['labels'], want, tol)


def ties(name, sim, want, tol):
    "Video 1 repeats video 0: the official list grows by an entry per tie; ours keeps one per query"
    sim[:, 1] = sim[:, 0]
    off, got = official_metrics(sim)['text_to_video'], retrieval_metrics(sim)
    for k, v in want.items(): close(f'{name}/{k}', off[{'MdR': 'MedianR', 'MnR': 'MeanR'}.get(k, k)], v, tol)
    assert got['t2v/queries'] == len(sim) and got['t2v/ties'] >= 2


# ---------------------------------------------------------------------------------------------------------------- several processes
def loss_of(text, video, tau): return 2*contrastive(cosine(text, video)/tau)     # STAN adds the two directions


def _rank_main(rank, world, folder):
    "One process of `gather_ranks`"
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    cfg, x = json.loads((folder/'config.json').read_text()), part(load_file(folder/'case.safetensors'), 'input/')
    n, out = cfg['per_rank_batch'], {}
    for how in ('official', 'full'):
        mine = {k: v[rank*n:(rank+1)*n].clone().requires_grad_() for k, v in x.items()}
        loss = loss_of(*(gather(mine[k], how) for k in ('text', 'video')), cfg['tau']); loss.backward()
        out.update({f'{how}/{k}': v.grad for k, v in mine.items()}, **{f'{how}/loss': loss.detach().reshape(1)})
    save_file(out, folder/f'rank{rank}.safetensors')
    dist.barrier()
    os._exit(0)      # gloo threads can abort an ordinary exit on a busy machine; what is compared is saved


@kind('stan', 'gather_ranks')
def gather_ranks(case, tensors):
    cfg, tol, W = case['config'], case['tolerance'], case['config']['world_size']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/'config.json').write_text(json.dumps(cfg))
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp/'case.safetensors')
        run_ranks('goldens.stan_mug', W, tmp)
        ranks = [load_file(tmp/f'rank{r}.safetensors') for r in range(W)]
    x = {k: v.clone().requires_grad_() for k, v in part(tensors, 'input/').items()}
    single = loss_of(x['text'], x['video'], cfg['tau']); single.backward()
    found = {'output/loss_single': single.reshape(()), **{f'grad/single_{k}': v.grad for k, v in x.items()}}
    for r, got in enumerate(ranks):
        found[f'output/loss_rank{r}'] = got['official/loss'].reshape(())
        found.update({f'grad/rank{r}_{k}': got[f'official/{k}'] for k in x})
        rows = slice(r*cfg['per_rank_batch'], (r+1)*cfg['per_rank_batch'])
        for k, v in x.items(): close_grad(f'full gather, rank {r}, {k}: before the average over ranks', got[f'full/{k}'], W*v.grad[rows], tol)
    for name, want in tensors.items():
        if name.startswith(('output/', 'grad/')):
            assert name in found, f'{name}: not computed; known: {", ".join(found)}'
            (close_grad if name.startswith('grad/') else close)(name, found[name], want, tol)


if __name__ == '__main__': _rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
