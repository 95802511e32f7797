"STAN: model, losses, recognition, training steps, groups and schedule against the official code"
import re

import torch

from goldens import close, close_grad, kind, sub
from goldens.clip4clip_model import part
from vidlab.ckpt import load_into, rename
from vidlab.clip import CLIPBackbone
from vidlab.losses import contrastive
from vidlab.models.stan import OFFICIAL, STAN, SpatialLayer, TemporalConv, TemporalLayer
from vidlab.optim import make_optimizer, param_groups, schedule_factor
from vidlab.tasks import RecognitionTask, RetrievalTask

MODES = dict(mug_frame_token_simple='simple', mug_frame_token='full', mug_frame_text='frame_text', drl_wti='drl_wti')


def clip_of(cfg):
    return CLIPBackbone(embed_dim=cfg['embed_dim'], image_size=cfg['image_size'], patch=cfg['patch_size'], vision_width=cfg['vision_width'], vision_layers=cfg['vision_layers'],
                        vision_heads=cfg['vision_heads'], text_width=cfg['text_width'], text_layers=cfg['text_layers'], text_heads=cfg['text_heads'],
                        context=cfg['context_length'], vocab=cfg['vocab_size'], quick_gelu=True, vision_extra=dict(mlp_ratio=cfg.get('mlp_ratio', 4)), text_extra=dict(mlp_ratio=cfg.get('mlp_ratio', 4)))


def options(cfg):
    "Branch and head of a case, in our words"
    adapter, bare = cfg.get('adapter'), 'VITCLIP' in cfg.get('visual_type', '')
    out = dict(depth=0 if bare else cfg['depth'])
    if adapter and adapter.get('type') == 'Mug_head': out.update(head=MODES[adapter.get('mode', 'mug_frame_token_simple')], mug_tau=float(adapter.get('tau', 100)), leak=True)
    return out


def build(cfg, weights, **more):
    "A model of the case's sizes with the case's weights, through the rules that load official files, strictly"
    ours = rename(weights, OFFICIAL)[0]
    clip = clip_of(cfg)
    more = {**options(cfg), **more}
    model = STAN(clip, **{**dict(tau=cfg['tau'], drop_path=0., positions=len(ours.get('branch.time_embed.weight', [0]*64)), max_words=2,
                                 max_frames=cfg.get('frames', 1)), **more})
    if 'clip.token_embedding.weight' in ours: model.load_weights(weights, exact=True)
    else: load_into(model, weights, new=[n for n in model.state_dict() if n.startswith('clip.') and not n.startswith('clip.visual.')], rules=OFFICIAL)     # the image side alone
    return model.eval()


def official(name, ours):
    "The tensor an official name stands for, out of a dict by our names"
    for rule in OFFICIAL:
        rx = re.compile(re.escape(rule[0]).replace(r'\{\}', r'(\d+)').replace(r'\*', '(.*)') + r'\Z')
        if not (m := rx.match(name)): continue
        target, i, n = rule[1] if isinstance(rule[1], tuple) else (rule[1], 0, 1)
        groups = list(m.groups())
        t = ours[re.sub(r'\{\}|\*', lambda _: groups.pop(0), target)].chunk(n)[i]
        return t.T if len(rule) > 2 and t.ndim == 2 and 'projection' in name else t
    raise AssertionError(f'no rule for {name}')


def check_grads(model, tensors, tol):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    want = part(tensors, 'grad/')
    for k, e in want.items(): close_grad(k, official(k, grads), e, tol)
    return grads


def rows(z): return torch.cat([z[0][:, None], z[1].transpose(1, 2).flatten(1, 2)], 1)      # (B,D), (B,T,P,D) -> (B,1+P*T,D), patch-major


def taps(model, imgs):
    "Every intermediate of the video side a case may hold"
    got, (B, T) = {}, imgs.shape[:2]
    hooks = [model.clip.visual.ln_pre.register_forward_pre_hook(lambda m, a: got.update(embeddings=a[0])),
             model.clip.visual.ln_post.register_forward_hook(lambda m, a, o: got.update(frame_cls_postln=o.flatten(0, 1)))]
    hooks += [b.register_forward_hook(lambda m, a, o, i=i: got.update({f'clip_layer_{i}': o})) for i, b in enumerate(model.clip.visual.transformer.resblocks)]
    if model.card.depth:
        for j, (t, s) in enumerate(zip(model.branch.temporal, model.branch.spatial)):
            hooks.append(t.register_forward_hook(lambda m, a, o, j=j: got.update({f't{j}': (a[0], o)})))
            hooks.append(s.register_forward_hook(lambda m, a, o, j=j: got.update({f's{j}': (a[0], o)})))
    frames = model.encode_video(imgs)
    for h in hooks: h.remove()
    for j in range(model.card.depth):
        (before, after), (cls, out) = got.pop(f't{j}'), got.pop(f's{j}')
        got.update({f'stan_T_{j}_in': rows((cls, before)), f'stan_T_{j}': rows((cls, after)), f'stan_S_{j}': rows(out)})
    return dict(got, frame_features=frames.flatten(0, 1), video_features=frames.mean(1), per_frame=frames)


@kind('stan', 'stan_video')
def stan_video(case, tensors):
    cfg, tol, imgs, out, w = case['config'], case['tolerance'], tensors['input/imgs'], part(tensors, 'output/'), part(tensors, 'weight/')
    model = build(cfg, w)
    with torch.no_grad():
        got = taps(model, imgs)
        if cfg.get('return_mean') is False: got['video_features'] = got['per_frame']
        odd = build(cfg, w, cls_residue=True)
        again = build(cfg, w); again.set_grad_checkpointing()
        got.update(mean=got['per_frame'].mean(1), cls_residue_eval=odd.encode_video(imgs), cls_residue_train=odd.train().encode_video(imgs),
                   channel_first_layout=model.encode_video(imgs.transpose(1, 2).contiguous().transpose(1, 2)).mean(1),      # the layout is explicit here: (B,T,3,H,W)
                   patch_3d=got['per_frame'])                                  # a patch kernel of one frame is the image kernel; files with it load (below)
        if 'single_image' in out: got['single_image'] = model.encode_video(imgs[:, 0][:, None])[:, 0]
    got['grad_checkpointing_train'] = again.train().encode_video(imgs)
    for k, e in out.items():
        assert k in got, f'output/{k}: not computed; known: {", ".join(got)}'
        close(k, got[k], e, tol)
    flat = {k: v[:, :, None] if k == 'backbone.patch_embedding.weight' else v for k, v in w.items()}
    with torch.no_grad(): close('patch_3d file', build(cfg, flat).encode_video(imgs), got['per_frame'], 0)


@kind('stan', 'stan_layers_droppath')
def stan_layers_droppath(case, tensors):
    cfg, tol, x, out, w = case['config'], case['tolerance'], tensors['input/x'], part(tensors, 'output/'), part(tensors, 'weight/')
    B, T, P, rate = cfg['batch'], cfg['frames'], cfg['patches'], cfg['drop_path']
    prefix = lambda which: {k: v for k, v in rename({f'backbone.STAN_{which}_layers.0.{k.split(".", 1)[1]}': v for k, v in w.items() if k.startswith(which)}, OFFICIAL)[0].items()}
    S, TL = SpatialLayer(cfg['width'], cfg['heads'], rate), TemporalLayer(cfg['width'], cfg['heads'], rate)
    S.load_state_dict({k.removeprefix('branch.spatial.0.'): v for k, v in prefix('S').items()})
    TL.load_state_dict({k.removeprefix('branch.temporal.0.'): v for k, v in prefix('T').items()})

    class Keep(torch.nn.Module):         # the draw that was made
        def __init__(self, keep): super().__init__(); self.keep = keep
        def forward(self, y): return y*self.keep[:, None, None]/(1 - rate)
    cls, v = x[:, 0], x[:, 1:].unflatten(1, (P, T)).transpose(1, 2)
    with torch.no_grad():
        S.eval(); TL.eval()
        close('S_eval', rows(S(cls, v)), out['S_eval'], tol); close('T_eval', rows((cls, TL(v))), out['T_eval'], tol)
        for layer, name in ((S, 'S'), (TL, 'T')):
            drawn = layer.drop_path.train()(torch.ones(4000, 1, 1)).flatten()          # what the layer itself draws: rows, kept ones divided by (1 - rate)
            assert set(drawn.unique().tolist()) <= {0., torch.tensor(1/(1 - rate)).item()} and abs((drawn == 0).float().mean() - rate) < .05
            layer.drop_path = Keep(tensors[f'input/{name}_keep'])
        close('S_train', rows(S.train()(cls, v)), out['S_train'], tol); close('T_train', rows((cls, TL.train()(v))), out['T_train'], tol)


@kind('stan', 'stan_conv_layer')
def stan_conv_layer(case, tensors):
    cfg, tol, x, w = case['config'], case['tolerance'], tensors['input/x'], part(tensors, 'weight/')
    P, T = cfg['patch_grid']**2, cfg['frames']
    for name, want in part(tensors, 'output/').items():
        with sub(name):
            layer = TemporalConv(cfg['width'], name)
            layer.load_state_dict({k.split('.', 1)[1].replace('temporal_fc', 'fc'): v for k, v in w.items() if k.startswith(name + '.')})
            v = x[:, 1:].unflatten(1, (P, T)).transpose(1, 2)
            with torch.no_grad(): close(name, rows((x[:, 0], layer(v))), want, tol)


@kind('stan', 'stan_retrieval', 'mugstan_retrieval', 'clip_meanpool_retrieval')
def retrieval(case, tensors):
    cfg, tol, out = case['config'], case['tolerance'], part(tensors, 'output/')
    model, text, imgs = build(cfg, part(tensors, 'weight/')), tensors['input/text'].long(), tensors['input/imgs']
    if cfg.get('frozen_layers'): model.freeze('all')
    mask = text != 0
    t, tokens = model.clip.encode_text(text, tokens=True)
    if cfg.get('all_proj'): tokens = model.encode_text(text, mask)
    video, full = model.encode_video(imgs), torch.ones(imgs.shape[:2], dtype=torch.bool)
    task = RetrievalTask(model, directions='sum')
    sim = model.similarity(model.encode_text(text, mask), video, full, mask)*cfg['tau']
    got = dict(frame_features=video.flatten(0, 1), video_features=video.mean(1) if cfg.get('return_mean', True) else video, text_features=t, text_tokens=tokens,
               similarity_video_by_text=sim.T, mug_similarity=sim, loss=task(dict(video=imgs, video_mask=full, text=text, text_mask=mask))['loss'])
    for k, e in out.items():
        assert k in got, f'output/{k}: not computed; known: {", ".join(got)}'
        close(k, got[k], e, tol)
    got['loss'].backward()
    check_grads(model, tensors, tol)


@kind('stan', 'recognition')
def recognition(case, tensors):
    cfg, tol, out = case['config'], case['tolerance'], part(tensors, 'output/')
    model = build(cfg, part(tensors, 'weight/'), **({'head': 'mean'} if cfg.get('return_mean') else {}))
    if cfg.get('frozen_layers'): model.freeze('all')
    task = RecognitionTask(model, [f'class {i}' for i in range(len(tensors['input/class_text']))])
    task.set_texts(tensors['input/class_text'].long(), tensors['input/class_text'].long() != 0)
    task.eval()
    imgs, labels = tensors['input/imgs'], tensors['input/labels']
    full = torch.ones(imgs.shape[:2], dtype=torch.bool)
    batch = dict(video=imgs, video_mask=full, label=labels, sid=torch.arange(len(imgs)), view=torch.zeros(len(imgs), dtype=torch.long))
    got = dict(class_text_features=task.class_text()[0], logits=task.logits(dict(video=imgs, video_mask=full)), video_features=model.encode_video(imgs).mean(1), loss=task(batch)['loss'])
    for k, e in out.items():
        assert k in got, f'output/{k}: not computed; known: {", ".join(got)}'
        close(k, got[k], e, tol)
    got['loss'].backward()
    grads = check_grads(model, tensors, tol)
    said = cfg.get('trainable_with_grad')
    # a case may say it in words; what they mean is that the texts are features without gradient, and frozen means all but the branch
    want = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(('clip.visual.', 'branch.'))} - model.unused_parameters()
    assert grads.keys() == (want if isinstance(said, str) or said is None else rename({n: torch.zeros(1, 1) for n in said}, OFFICIAL)[0].keys())


@kind('stan', 'train_steps')
def train_steps(case, tensors):
    cfg, tol = case['config'], case['tolerance']
    model = build(cfg, part(tensors, 'weight/'))
    if cfg.get('frozen_layers'): model.freeze('all')
    task = RetrievalTask(model, directions='sum')
    cfg = {**dict(stan_lr_mult=10., betas=(.9, .98), eps=1e-8, max_grad_norm=5), **cfg}                 # as in the published configurations
    opt = make_optimizer('adamw', param_groups(model, cfg['lr']*cfg['stan_lr_mult'], cfg['weight_decay'], 1/cfg['stan_lr_mult'], 'stan'), betas=tuple(cfg['betas']), eps=cfg['eps'])
    losses, norms = [], []
    for i in range(cfg['steps']):
        imgs, text = tensors[f'input/imgs_{i}'], tensors[f'input/text_{i}'].long()
        opt.zero_grad()
        loss = task(dict(video=imgs, video_mask=torch.ones(imgs.shape[:2], dtype=torch.bool), text=text, text_mask=text != 0))['loss']
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], cfg['max_grad_norm']))
        opt.step(); losses.append(loss.detach())
    close('losses', torch.stack(losses), tensors['output/losses'], tol); close('grad_norms_before_clip', torch.stack(norms), tensors['output/grad_norms_before_clip'], tol)
    state = model.state_dict()
    for k, e in part(tensors, 'output/after/').items(): close(k, official(k, state), e, tol)


@kind('stan', 'param_groups')
def groups(case, tensors):
    "Rate and decay of every official parameter"
    cfg, tol = case['config'], case['tolerance']
    model = STAN(clip_of(cfg), **{**dict(tau=cfg['tau'], max_words=2, max_frames=2), **options(cfg)})
    if cfg.get('frozen_layers'): model.freeze('all')
    got = {n: g for g in param_groups(model, cfg['base_lr']*cfg['stan_lr_mult'], cfg['weight_decay'], 1/cfg['stan_lr_mult'], 'stan') for n in g['names']}
    names = dict(zip(case['trainable'], (next(iter(rename({n: torch.zeros(1)}, [(r[0], r[1][0] if isinstance(r[1], tuple) else r[1]) for r in OFFICIAL])[0])) for n in case['trainable'])))
    assert set(got) == set(names.values()), f'differ in {sorted(set(got) ^ set(names.values()))[:6]}'
    for g in case['groups']:
        mine = got[names[g['name']]]
        assert abs(mine['lr'] - g['lr']) <= max(tol, 1e-9*g['lr']) and mine['weight_decay'] == g['weight_decay'], f"{g['name']}: {mine['lr']}, {mine['weight_decay']}; expected {g}"


@kind('stan', 'lr_schedule')
def lr_schedule(case, tensors):
    for c in case['cases']:
        with sub(c['config']):
            n, e = c['iters_per_epoch'], c['epochs']
            wave = c['warmup_end_epoch']/e, c['cosine']['begin']/e, c['cosine']['T_max']/e
            got = torch.tensor([c['base_lr']*schedule_factor('wave', s, n*e, start=0.05, wave=wave) for s in range(len(c['lr_clip']))], dtype=torch.float64)
            want = torch.tensor(c['lr_clip'], dtype=torch.float64)
            assert (got - want).abs().max() <= case['tolerance']*c['base_lr'], f'{c["config"]}: differs by {(got - want).abs().max()} at step {(got - want).abs().argmax()}'


@kind('stan', 'init_rules')
def init_rules(case, tensors):
    for c in case['cases']:
        N, K, D = c['clip_layers'], c['depth'], c['time_embed_shape'][1]
        clip = CLIPBackbone(embed_dim=8, image_size=16, patch=8, vision_width=D, vision_layers=N, vision_heads=2, text_width=8, text_layers=1, text_heads=1, context=8, vocab=32)
        model = STAN(clip, K, max_words=2, max_frames=2, positions=c['time_embed_shape'][0], drop_path=max(c['drop_path']))
        assert list(model.blocks) == c['taps_output_of_clip_layer'] and tuple(model.branch.time_embed.weight.shape) == tuple(c['time_embed_shape'])
        for j, i in c['spatial_layer_copied_from']:
            for k, v in clip.visual.transformer.resblocks[i].state_dict().items(): assert torch.equal(model.branch.spatial[j].state_dict()[k], v), f'layer {j}: {k}'
        rate = lambda l: getattr(l.drop_path, 'drop_prob', 0.)
        close('drop_path', [rate(l) for l in model.branch.spatial], c['drop_path'], case['tolerance'])
        close('drop_path_T', [rate(l) for l in model.branch.temporal], c['drop_path_T'], case['tolerance'])
        assert all(not l.fc.weight.any() and not l.fc.bias.any() for l in model.branch.temporal) == c['temporal_fc_all_zero']
        assert torch.equal(model.branch.temporal[0].ln.weight, torch.ones(D)) and 0 < model.branch.temporal[0].attn.in_proj_bias.abs().max() <= D**-.5
