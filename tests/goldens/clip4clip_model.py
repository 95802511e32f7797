"CLIP4Clip: model, training, optimiser and metrics against the official code"
import json, math, os, sys, tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from goldens import close, close_grad, kind, only, part, run_ranks, sub
from vidlab.clip import CLIPBackbone, clip_dims
from vidlab.losses import contrastive, gather_dict
from vidlab.metrics import official_metrics, retrieval_metrics, retrieval_ranks
from vidlab.models.clip4clip import CLIP4Clip, HEADS
from vidlab.optim import BertAdam, bert_schedule, make_optimizer, param_groups


def heads_of(cfg, side, width):
    "Heads as the case says, else by the official rule"
    return cfg.get(f'{side}_heads') or max(1, width//64)


DEFAULTS = dict(sim_header='meanP', linear_patch='2d', max_words=20, max_frames=100)      # of the official script


def build(cfg, weights):
    "A model with the case's sizes and weights, loaded through the official rules, strictly"
    cfg, inner = {**DEFAULTS, **cfg}, {k[5:]: v for k, v in weights.items() if k.startswith('clip.')}
    dims = clip_dims(inner, heads_of(cfg, 'vision', len(inner['visual.class_embedding'])), heads_of(cfg, 'text', inner['positional_embedding'].shape[1]))
    for ours, theirs in dict(image_size='image_size', patch='patch_size', vision_layers='vision_layers', text_layers='text_layers',
                             context='context_length', vocab='vocab_size', embed_dim='embed_dim',
                             vision_width='vision_width', text_width='text_width').items():
        assert dims[ours] == cfg.get(theirs, dims[ours]), f'{ours}: {dims[ours]} from the tensors, {cfg[theirs]} in the config'
    model = CLIP4Clip(CLIPBackbone(**dims, quick_gelu='quick' in cfg.get('activation', 'quick_gelu')), cfg['sim_header'], cfg['linear_patch'], cfg.get('temporal_layers') or 1,
                      cfg.get('temporal_heads'), cfg['max_words'], cfg['max_frames'], cfg.get('cross_dropout') or 0., cfg.get('temporal_ln_eps') or 1e-12)
    assert cfg.get('clip_ln_eps') in (None, model.clip.ln_final.eps)
    model.load_weights(weights, exact=True)
    return model


def batch_of(x):
    "Inputs as the official loader collates them -> a vidlab batch"
    v = x['video'].float()
    return dict(text=x['input_ids'].long().flatten(1), text_mask=x['input_mask'].flatten(1),
                video=v.reshape(v.shape[0], -1, *v.shape[-3:]), video_mask=x['video_mask'].flatten(1))


def score(model, out): return model.similarity(out['text'], out['video'], out['video_mask'])


def grads_close(got, want, tol, total):
    """Each gradient relative to its own maximum. One that is zero in exact arithmetic (the bias of the tight score: softmax ignores a shift)
    is rounding noise on both sides, below 1e-6 of the norm `total` over all gradients: then both must be that small."""
    for name, e in want.items():
        if e.abs().max() <= 1e-6*total: assert got[name].abs().max() <= 1e-6*total, f'grad/{name}: {got[name].abs().max():.3g}, expected zero'
        else: close_grad(f'grad/{name}', got[name], e, tol)


def grad_norm(grads): return float(sum(g.norm()**2 for g in grads)**0.5)


@kind('clip4clip', 'similarity')
def similarity(case, tensors):
    cfg, tol = case['config'], case['tolerance']
    out, model, b = part(tensors, 'output/'), build(case['config'], part(tensors, 'weight/')), batch_of(part(tensors, 'input/'))
    if 'valid_frames' in cfg: close('valid_frames', b['video_mask'].sum(1), cfg['valid_frames'])
    got = taps(model.eval(), b)
    for name in out:
        if name not in ('loss', 'grad_norm_total', 'half_sim_matrix'):
            assert name in got, f'output/{name}: not computed; known: {", ".join(got)}'
            close(name, got[name], out[name], tol)
    model.train()
    loss = contrastive(score(model, model(b)))
    if 'loss' in out: close('loss', loss, out['loss'], tol)
    loss.backward()
    none = {n for n, p in model.named_parameters() if p.grad is None}
    assert none == set(case['params_without_grad']), f'without gradient: {sorted(none)}, expected {case["params_without_grad"]}'
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads_close(grads, part(tensors, 'grad/'), tol, grad_norm(grads.values()))
    if 'grad_norm_total' in out: close('grad_norm_total', grad_norm(grads.values()), out['grad_norm_total'], tol)
    if 'half_sim_matrix' in out:    # fp16 arithmetic differs by kernel: loose, by the case's own note
        model.eval().clip.to_official_half()
        with torch.no_grad(): close('half_sim_matrix', score(model, model(b)), out['half_sim_matrix'], 2e-2)


@torch.no_grad()
def taps(model, b):
    "Every intermediate a case may hold"
    (B, T), clip = b['video'].shape[:2], model.clip
    seen = []
    h = getattr(clip.visual, 'conv2' if model.patch == '3d' else 'conv1').register_forward_hook(lambda m, i, o: seen.append(o))
    _, tokens = clip.encode_image(b['video'].flatten(0, 1), tokens=True, frames=T)
    h.remove()
    o, text_tokens = model(b), clip.encode_text(b['text'], tokens=True)[1]
    if model.patch == '3d': seen = [seen[0].unflatten(2, (clip.card.grid, -1)).permute(0, 4, 1, 2, 3)]     # as a convolution gives it
    F, unit = model.frame_features(b['video']), lambda x: x/x.norm(dim=-1, keepdim=True)
    got = dict(patch_embed=seen[0][:1] if model.patch == '3d' else seen[0][:T], ln_post_cls=tokens[:, 0], text_ln_final=text_tokens,
               sequence_output=o['text'][:, None], visual_output=F, sim_matrix=score(model, o),
               sim_matrix_rect=model.similarity(o['text'][:2], o['video'], o['video_mask']), logit_scale=o['logit_scale'])
    if model.head == 'tightTransf':
        x = torch.cat([o['text'][:, None, None].expand(-1, B, 1, -1), F[None].expand(B, -1, -1, -1)], 2).flatten(0, 1)
        m = torch.cat([b['video_mask'].new_ones(B, 1), b['video_mask']], 1)[None].expand(B, -1, -1).flatten(0, 1)
        got['cross_hidden'], got['cross_pooled'] = model.cross(x, m)
    else: got.update(header_output_normed=unit(o['video']), video_embedding=model.pooled(o['video'], o['video_mask']), text_embedding=unit(o['text']))
    return got


# ---------------------------------------------------------------------------------------------------------------- several processes
def _rank_main(rank, world, folder):
    "One process of `multirank`: gradients with every way to gather, written to the folder"
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    cfg, tensors = json.loads((folder/'config.json').read_text()), load_file(folder/'case.safetensors')
    x, n = part(tensors, 'input/'), cfg['per_rank_batch']
    b = batch_of({k: v[rank*n:(rank+1)*n] for k, v in x.items()})
    for how in ('official', 'full', 'local'):
        model = build(cfg, part(tensors, 'weight/')).train()
        unused = [n for n, p in model.named_parameters() if not p.requires_grad]
        for ddp in (False, True):
            model.zero_grad(set_to_none=True)
            net = DDP(model) if ddp else model
            o = gather_dict({k: v for k, v in net(b).items() if k != 'logit_scale'}, how)
            sim = score(model, o); loss = contrastive(sim)
            loss.backward()
            out = {f'grad/{n}': p.grad for n, p in model.named_parameters() if p.grad is not None}
            save_file({k: v.contiguous() for k, v in dict(out, loss=loss.detach().reshape(1), sim=sim.detach()).items()}, folder/f'{how}_{"ddp" if ddp else "raw"}_{rank}.safetensors')
            if ddp and unused: assert not any(f'grad/{n}' in out for n in unused)
    dist.barrier()
    os._exit(0)      # gloo threads can abort an ordinary exit on a busy machine; what is compared is saved


@kind('clip4clip', 'multirank')
def multirank(case, tensors):
    cfg, tol, W = case['config'], case['tolerance'], case['config']['world_size']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/'config.json').write_text(json.dumps(cfg))
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp/'case.safetensors')
        run_ranks('goldens.clip4clip_model', W, tmp)
        got = {f.stem: load_file(f) for f in tmp.glob('*_*_*.safetensors')}
    tight = cfg['sim_header'] == 'tightTransf'      # the official tight head scores the local batch only
    off, out = 'local' if tight else 'official', part(tensors, 'output/')
    if 'loss_per_rank' in out: close('loss_per_rank', [got[f'{off}_ddp_{r}']['loss'].item() for r in range(W)], out['loss_per_rank'], tol)
    if 'sim_rank0' in out: close('sim_rank0', got[f'{off}_ddp_0']['sim'], out['sim_rank0'], tol)
    for group in sorted({k.split('/')[0] for k in tensors if k.startswith('grad_')}):
        if group.startswith('grad_local_rank'): run = got[f'{off}_raw_{int(group[15:])}']
        elif group == 'grad_ddp_avg': run = got[f'{off}_ddp_0']
        elif group == 'grad_full_batch': run = got['full_ddp_0']
        else: raise AssertionError(f'unknown tensors {group}/*')
        run = part(run, 'grad/')
        with sub(group): grads_close(run, part(tensors, group + '/'), tol, grad_norm(run.values()))
    model = build(cfg, part(tensors, 'weight/')).train()
    loss = contrastive(score(model, model(batch_of(part(tensors, 'input/')))))
    if 'loss_single_process_full_batch' in out:
        close('one process, whole batch', loss, out['loss_single_process_full_batch'], tol)
        close('full gather', got['full_ddp_0']['loss'], loss.reshape(1), tol)


# ---------------------------------------------------------------------------------------------------------------- training
def train(cfg, weights, batches, stop=None, resume=None):
    "The official epoch loop; `stop`: after so many epochs, `resume`: (weights, optimiser state, first epoch)"
    model = build(cfg, resume[0] if resume else weights).train()
    model.freeze(cfg.get('freeze_layer_num', 0), compat_3d=True)
    groups = param_groups(model, cfg['lr'], cfg['weight_decay'], cfg['coef_lr'], 'clip4clip')
    opt = make_optimizer('bertadam', groups, betas=(cfg['b1'], cfg['b2']), eps=cfg['eps'], t_total=999. if resume else cfg['t_total'],
                         warmup=cfg['warmup_proportion'], schedule=cfg.get('schedule', 'warmup_cosine'), max_grad_norm=cfg['max_grad_norm'])
    if resume: opt.load_state_dict(resume[1])
    ga, log = cfg.get('gradient_accumulation_steps', 1), dict(losses=[], norms=[], lrs=[], epochs=[], sizes=[len(g['params']) for g in groups])
    for epoch in range(resume[2] if resume else 0, stop or cfg['epochs']):
        total = 0.
        for i in range(cfg['batches_per_epoch']):
            loss = contrastive(score(model, model(batches[i])))
            log['losses'].append(loss.item()); (loss/ga).backward(); total += loss.item()/ga
            if (i+1) % ga: continue
            log['norms'].append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg['max_grad_norm']).item())
            opt.step(); log['lrs'].append(sorted(set(opt.get_lr()))); opt.zero_grad()
            model.logit_scale.data.clamp_(max=math.log(100))
        log['epochs'].append(total/cfg['batches_per_epoch'])
    return model, opt, log


@kind('clip4clip', 'train_trajectory')
def train_trajectory(case, tensors):
    cfg, tol = case['config'], case['tolerance']
    assert cfg.get('world_size', 1) == 1 and cfg.get('precision', 'fp32') == 'fp32', 'only one process in fp32 is replayed'
    weights, batches = part(tensors, 'weight/'), [batch_of(part(tensors, f'input/batch{i}/')) for i in range(cfg['batches_per_epoch'])]
    model, opt, log = train(cfg, weights, batches)
    close('losses', log['losses'], case['losses'], tol)
    close('grad_norms_before_clip', log['norms'], case['grad_norms_before_clip'], tol)
    assert len(log['lrs']) == len(case['lrs_after_step'])
    for got, want in zip(log['lrs'], case['lrs_after_step']): close('lrs_after_step', got, want, 1e-9, unit=1e-12)
    close('epoch_mean_loss_logged', log['epochs'], case['epoch_mean_loss_logged'], tol)
    assert log['sizes'] == case['group_sizes'], (log['sizes'], case['group_sizes'])
    final = model.state_dict()
    for name, v in part(tensors, 'output/final/').items(): close(f'final/{name}', final[name], v, tol)
    for name, want in case['param_sums'].items():
        w = final[name].double()
        close(f'param_sums/{name}', [w.sum(), w.abs().sum(), (w - weights[name].double()).abs().sum()], want, tol)
    if 'resume_check' in case and cfg['epochs'] > 1:
        half, o, _ = train(cfg, weights, batches, stop=1)
        if all(p.grad is None for p in half.parameters()):     # left-over micro-batches would be lost on the way
            again, _, _ = train(cfg, None, batches, resume=(half.state_dict(), o.state_dict(), 1))
            for n, p in again.state_dict().items(): assert torch.equal(p, final[n]), f'resumed {n} differs'


@kind('clip4clip', 'bertadam')
def bertadam(case, tensors):
    cfg, tol = {**dict(b1=.9, b2=.999, eps=1e-6, t_total=-1, warmup=-1, schedule='warmup_linear', max_grad_norm=1.), **case['config']}, case['tolerance']    # BertAdam's own defaults
    for run in sorted({k.split('/')[0] for k in tensors}):
        dtype, rtol = (torch.float16, 2e-3) if run == 'fp16' else (torch.float32, tol)    # fp16: one ulp is 1e-3
        p = {n: torch.nn.Parameter(tensors[f'{run}/init/{n}'].to(dtype)) for n in cfg['groups']}
        opt = BertAdam([dict(params=[p[n]], **g) for n, g in cfg['groups'].items()], cfg['lr'], cfg['warmup'], cfg['t_total'], cfg['schedule'], cfg['b1'], cfg['b2'],
                       cfg['eps'], max_grad_norm=cfg['max_grad_norm'])
        for k in range(cfg['steps']):
            for n in p: p[n].grad = tensors[f'{run}/grad{k}/{n}'].to(dtype).clone()
            opt.step()
            for n in p:
                for what, v in (('after', p[n].data), ('m', opt.state[p[n]]['next_m']), ('v', opt.state[p[n]]['next_v'])):
                    if f'{run}/{what}{k}/{n}' in tensors: close(f'{run}/{what}{k}/{n}', v, tensors[f'{run}/{what}{k}/{n}'], rtol)


@kind('clip4clip', 'lr_schedule')
def lr_schedule(case, tensors):
    for row in case['rows']:
        used = [row['group_lr']*bert_schedule(row['schedule'], k, row['t_total'], row['warmup']) for k in range(len(row['lr_used_at_step']))]
        close(f'{row["schedule"]} t_total {row["t_total"]}', used, row['lr_used_at_step'], case['tolerance'], unit=row['group_lr'])
        p = torch.nn.Parameter(torch.zeros(1))
        opt, told = BertAdam([p], row['group_lr'], row['warmup'] or 0., row['t_total'], row['schedule'], weight_decay=0.), []
        for _ in row['lr_reported_before_step']: told.append(opt.get_lr()[0]); p.grad = torch.ones(1); opt.step()
        close('lr_reported_before_step', told, row['lr_reported_before_step'], case['tolerance'], unit=row['group_lr'])


# ---------------------------------------------------------------------------------------------------------------- names
def toy(head, patch, text_layers, vision_layers=None, temporal=4, seed=0, clip=None):
    torch.manual_seed(seed)
    dims = dict(embed_dim=16, image_size=8, patch=4, vision_width=16, vision_layers=vision_layers or text_layers, vision_heads=2, text_width=16, text_layers=text_layers,
                text_heads=2, context=12, vocab=20, quick_gelu=True)
    clip = CLIPBackbone(**dims) if clip is None else clip
    return CLIP4Clip(clip, head, patch, temporal, 2, max_words=8, max_frames=4)


def count_blocks(names, prefix): return len({n[len(prefix):].split('.')[0] for n in names if n.startswith(prefix)})


@kind('clip4clip', 'param_groups')
def groups(case, tensors):
    options = case['group_options']
    lr, wd = options[1]['lr'], options[0]['weight_decay']
    coef_lr = options[0]['lr']/lr
    layers = {}
    for key, want in case['groups'].items():
        patch, head = key.split('/')
        names = [n for v in want.values() for n in v]
        text, vis = [count_blocks(names, f'clip.{p}transformer.resblocks.') for p in ('', 'visual.')]
        temporal = max(count_blocks(names, p + 'resblocks.') for p in ('transformerClip.', 'cross.transformer.'))
        layers[patch] = layers[head] = text, vis, temporal or 1
        got = param_groups(toy(head, patch, *layers[head]), lr, wd, coef_lr, 'clip4clip')
        assert len(got) == len(want)
        for i, g in enumerate(got):
            assert sorted(g['names']) == sorted(want[str(i)]), f'{key} group {i}: {set(g["names"]) ^ set(want[str(i)])}'
            close(f'{key} group {i}', [g['weight_decay'], g['lr']], [case['group_options'][i]['weight_decay'], case['group_options'][i]['lr']], 1e-12, unit=1e-12)
    for key, want in case['frozen'].items():
        patch, head, n = key.split('/')
        sizes = layers.get(head) or layers.get(patch)
        got = toy(head, patch, *sizes).freeze(int(n.split('=')[1]), compat_3d=True)
        assert got == sorted(want), f'{key}: {set(got) ^ set(want)}'


@kind('clip4clip', 'init_map')
def init_map(case, tensors):
    cfg = case['config']
    for key, want in case['map'].items():
        origin, head, patch = key.split('/')
        model = toy(head, patch, cfg['text_layers'], temporal=cfg['cross_num_hidden_layers'])
        pre, given = {n: v.clone() for n, v in model.clip.state_dict().items() if n != 'visual.conv2.weight'}, {}
        if origin != 'from_pretrained':
            words = origin.removeprefix('from_').removesuffix('_checkpoint')
            src = next((h for h in HEADS if words.startswith(h)), None)
            assert src and words != origin, f'unknown origin {origin!r}'
            other = toy(src, words[len(src):] or '2d', cfg['text_layers'], temporal=cfg['cross_num_hidden_layers'], seed=1)
            with torch.no_grad(): [p.add_(0.01*torch.randn_like(p)) for p in other.parameters()]
            given = other.state_dict()
            model.load_weights(given, compat=True)
        for name, p in model.state_dict().items():
            rule = want.get(name) or (('given' if name in given else 'pretrained:' + name[5:]) if name.startswith('clip.') or name in given else None)
            assert rule, f'{key}: {name} has no stated origin'
            with sub(f'{key} {name}'): follows(name, p.detach(), rule, pre, given, cfg.get('cross_initializer_range', 0.02))
        assert set(want) <= set(model.state_dict()), f'{key}: {sorted(set(want) - set(model.state_dict()))} do not exist'


def follows(name, p, rule, pre, given, std):
    "Assert that a parameter comes from where the rule says"
    if rule == 'given' or rule.startswith('checkpoint:'): assert torch.equal(p, given[rule[11:] if rule != 'given' else name]), rule
    elif rule.startswith('pretrained:'): assert torch.equal(p, pre[rule[11:]]), rule
    elif rule.startswith('temporal slice'):
        conv1 = given['clip.visual.conv1.weight'] if 'checkpoint' in rule else pre['visual.conv1.weight']
        assert torch.equal(p[:, :, 1], conv1) and (p[:, :, [0, 2]] == 0).all(), rule
    elif 'xavier' in rule: assert 0 < p.abs().max() <= (6/sum(p.shape))**0.5 and p.std() > 0, rule
    elif 'uniform' in rule: assert 0 < p.abs().max() <= p.shape[-1 if p.ndim > 1 else 0]**-0.5*(1 if p.ndim > 1 else 2) and p.std() > 0, rule
    elif 'zeros' in rule: assert (p == 0).all(), rule
    elif 'ones' in rule: assert (p == 1).all(), rule
    elif 'normal' in rule: assert p.abs().max() < 6*std and (p.numel() < 100 or 0.7*std < p.std() < 1.3*std) and (p != 0).any(), rule
    else: raise AssertionError(f'unknown origin {rule!r} of {name}')


# ---------------------------------------------------------------------------------------------------------------- metrics
def matrix(sim): return np.array([[np.nan if x is None else x for x in row] for row in sim], dtype=np.float64)


def agree(name, got, want, tol):
    for k, v in want.items():
        if k in ('cols',): assert got[k] == v, f'{name}/{k}: {got[k]}, expected {v}'
        else: close(f'{name}/{k}', got[k], v, tol)


def encoded(cuts, size):
    "Videos whose last caption lies in each loader batch"
    calls = [[i for i, c in enumerate(cuts) if lo < c <= lo+size] for lo in range(0, cuts[-1], size)]
    return [c for c in calls if c]


@kind('clip4clip', 'metrics')
def metrics(case, tensors):
    only(case, 'single', 'multi', 'multi_even', 'ties', 'nan_column')
    tol = max(case.get('tolerance') or 0, 1e-6)
    listed = lambda x: x if isinstance(x, list) else [x]
    for i, c in enumerate(listed(case.get('single', []))):
        s = matrix(c['sim'])
        single(f'single{i}', c, official_metrics(s), tol)
        honest(f'single{i}', c, retrieval_metrics(s), tol)
        if 'videos_encoded_per_call' in c: assert [v for call in c['videos_encoded_per_call'] for v in call] == list(range(s.shape[1])), 'each video once'
    for i, c in enumerate(listed(case.get('multi', [])) + listed(case.get('multi_even', []))):
        s, n = matrix(c['sim']), c['sentences_per_video']
        gt, cuts = np.repeat(np.arange(len(n)), n), np.cumsum(n).tolist()
        assert c.get('cut_off_points', cuts) == cuts
        for run in c.get('runs', [c]):
            single(f'multi{i}', run, official_metrics(s, gt), tol)
            r = retrieval_ranks(s, gt, lower_median=True)
            if not (r['t2v'].ties or r['v2t'].ties): honest(f'multi{i}', run, retrieval_metrics(s, gt, lower_median=True), tol)
            if 'videos_encoded_per_call' in run: assert run['videos_encoded_per_call'] == encoded(cuts, run['batch_size']), 'each video once, with its last caption'
    for name in ('ties', 'nan_column'):
        for i, c in enumerate(listed(case.get(name, []))):
            s = matrix(c['sim'])
            gt = None if 'sentences_per_video' not in c else np.repeat(np.arange(len(c['sentences_per_video'])), c['sentences_per_video'])
            single(f'{name}{i}', c, official_metrics(s, gt), tol)
            r = retrieval_ranks(s, gt)
            assert len(r['t2v'].ranks) == s.shape[0] and len(r['v2t'].ranks) == s.shape[1], 'every query counts once'
            assert r['t2v'].nan_queries == np.isnan(s[np.arange(len(s)), np.arange(len(s)) if gt is None else gt]).sum()


def single(name, c, got, tol):
    "The official numbers, quirks included"
    for way in ('text_to_video', 'video_to_text'): agree(f'{name}/{way}', got[way], c[way], tol)
    if 'returned_R1' in c: close(f'{name}/returned_R1', got['text_to_video']['R1'], c['returned_R1'], tol)


def honest(name, c, got, tol):
    "vidlab's own numbers agree wherever nothing ties"
    for way, ours in (('text_to_video', 't2v'), ('video_to_text', 'v2t')):
        if got[f'{ours}/ties'] or got[f'{ours}/nan_queries']: continue
        for a, b in dict(R1='R1', R5='R5', R10='R10', MdR='MedianR', MnR='MeanR').items(): close(f'{name}/{ours}/{a}', got[f'{ours}/{a}'], c[way][b], tol)


if __name__ == '__main__': _rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
