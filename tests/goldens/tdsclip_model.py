"TDS-CLIP: adapters, side block, whole model, training loop, text classes, plug-ins, names and losses against the official code"
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from goldens import close, close_grad, kind, part, sub
from vidlab.attend import capture_attention
from vidlab.ckpt import load_into, rename
from vidlab.clip import CLIPBackbone, taps
from vidlab.core import saved_bytes
from vidlab.data.text import tokenize
from vidlab.losses import group_kl
from vidlab.models import tdsclip as td
from vidlab.optim import cosine_schedule, make_optimizer

BLOCK, PLUG = 'visual.transformer.side_transformer.0.', 'visual.transformer.resblocks.0.control_point1.'


def heads_of(cfg, key, width): return cfg.get(key) or max(1, width//64)


def ours(weights, prefix, drop):
    "Weights of a part, as the rules for whole files name them, without `drop`"
    return {k.removeprefix(drop): v for k, v in rename({prefix + k: v for k, v in weights.items()}, td.OFFICIAL_RULES)[0].items()}


def official_names(model): return dict(zip(model.state_dict(), model.to_official_state(copy=False)))


def grid(v, h): return v.permute(0, 3, 1, 2).unflatten(-1, (h, -1))           # (B,T,N,D) -> (B,D,T,h,w)


def frames(v, h): return v.flatten(0, 1).transpose(1, 2).unflatten(-1, (h, -1))  # (B,T,N,D) -> (B*T,D,h,w)


def rows(v): return v.flatten(0, 1).transpose(0, 1)                            # (B,T,N,D) -> (N,B*T,D)


def tokens(x, T): return x.transpose(0, 1).unflatten(0, (-1, T))               # (N,B*T,D) -> (B,T,N,D)


def watch(**modules):
    "Outputs of modules in the next forward passes (latest wins), back in token layout"
    got = {}
    for name, m in modules.items(): m.register_forward_hook(lambda mod, i, o, name=name: got.__setitem__(name, o))
    return got


def grads_of(module, prefix, drop):
    "Gradients of a part by their official names below `prefix`"
    named = {drop + n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {k.removeprefix(prefix): v for k, v in rename(named, [(b, a, out) for a, b, _, out in td.OFFICIAL])[0].items()}


def check_grads(case, tensors, got):
    for name, e in part(tensors, 'grad/').items(): close_grad(f'grad/{name}', got[name], e, case['tolerance'])


def check(case, tensors, got, skip=()):
    "Every output of the case"
    for name, e in part(tensors, 'output/').items():
        if name not in skip:
            assert name in got, f'output/{name}: not computed; known: {", ".join(got)}'
            close(name, got[name], e, case['tolerance'])


# ---------------------------------------------------------------------------------------------------------------- parts
@kind('tdsclip', 'td_adapter')
def td_adapter(case, tensors):
    cfg, w, x = case['config'], part(tensors, 'weight/'), part(tensors, 'input/')
    D, h = cfg['side_dim'], cfg['height']
    m = td.TDAdapter(D, cfg.get('reduction', 16)).eval()
    load_into(m, ours(w, BLOCK, 'side.blocks.0.td.'))
    seen = watch(bn=m.path.bn, conv0=m.path.pw_1, dw=m.path.dw, conv_out=m.path, bottleneck=m.gate.bn_1, peak=m.gate.peak, bn_2=m.gate.bn_2, gate=m.gate)
    v = x['x'].flatten(3).permute(0, 2, 3, 1).contiguous().requires_grad_()
    out = m(v)
    loss = (grid(out, h)*x['probe']).sum(); loss.backward()
    split = lambda y: y.unflatten(-1, (h, -1))                                  # (B,D,T,N) as the 2-D modules see it
    per_frame = lambda y: split(y).transpose(1, 2).flatten(0, 1)
    got = {'out': grid(out, h), 'loss': loss, 'tap.after_bn_1': split(seen['bn']), 'tap.conv0': grid(seen['conv0'], h), 'tap.conv1': split(seen['dw']),
           'tap.conv_out': grid(seen['conv_out'], h), 'tap.sa_bottleneck': per_frame(seen['bottleneck']), 'tap.sa_maxpool': split(seen['peak']),
           'tap.sa_bn2': per_frame(seen['bn_2']), 'tap.sa_out': grid(seen['conv_out']*(0.5 + seen['gate']), h)}
    check_grads(case, tensors, {**grads_of(m, BLOCK, 'side.blocks.0.td.'), 'input.x': grid(v.grad, h)})
    m.train()
    with torch.no_grad(): got['train_out'] = grid(m(v), h)
    names = dict(zip(ours(w, BLOCK, 'side.blocks.0.td.'), w))
    got.update({f'train_buffer.{names[n]}': b for n, b in m.named_buffers()})
    check(case, tensors, got)


@kind('tdsclip', 'sme_adapter')
def sme_adapter(case, tensors):
    cfg, x = case['config'], part(tensors, 'input/')
    B, T, D, M = cfg['batch'], cfg['frames'], cfg['side_dim'], x['frames'].shape[1]//3
    m = td.SideStem(D, cfg['patch'], M).eval()
    load_into(m, ours(part(tensors, 'weight/'), 'visual.', 'side.stem.'))
    seen = watch(centre=m.centre, centre_bn=m.centre_bn, motion=m.motion, motion_bn=m.motion_bn)
    stack = {}
    m.motion.register_forward_pre_hook(lambda mod, a: stack.update(x=a[0]))
    video, h = x['frames'].unflatten(0, (B, T)).unflatten(2, (M, 3)), int(x['probe'].shape[1]**0.5)
    out = m(video).flatten(0, 1)
    loss = (out*x['probe']).sum(); loss.backward()
    split = lambda y: y.unflatten(-1, (h, -1))
    got = {'side_tokens': out, 'loss': loss, 'tap.center_bn': split(seen['centre_bn']), 'tap.diff_bn': split(seen['motion_bn']), 'tap.diff_conv': grid(seen['motion'], h),
           'tap.diff_stack': stack['x'].transpose(1, 2), 'tap.side_conv1': grid(seen['centre'], h)}
    check_grads(case, tensors, grads_of(m, 'visual.', 'side.stem.'))
    m.train()
    with torch.no_grad(): got['train_side_tokens'] = m(video).flatten(0, 1)
    check(case, tensors, got)


@kind('tdsclip', 'side_block')
def side_block(case, tensors):
    cfg, x, T = case['config'], part(tensors, 'input/'), case['config']['frames']
    m = td.SideBlock(cfg['side_dim'], heads_of(cfg, 'heads', cfg['side_dim'])).eval()
    load_into(m, ours(part(tensors, 'weight/'), BLOCK, 'side.blocks.0.'))
    seen = watch(path=m.td.path, td=m.td, ln=m.ln, attn=m.attn.out_proj, mlp=m.mlp)
    v, c, pos = tokens(x['x'], T).contiguous().requires_grad_(), x['x_token'][0].unflatten(0, (-1, T)).requires_grad_(), x['pos'].requires_grad_()
    out = m(v, c, pos)
    loss = (rows(out)*x['probe']).sum(); loss.backward()
    h, D = int(len(pos)**0.5), cfg['side_dim']
    got = {'out': rows(out), 'loss': loss, 'tap.td_conv': grid(seen['path'], h), 'tap.td_out': grid(seen['td'] - v, h), 'tap.shifted_token': td.shift_time(c, D//2, D - D//2).flatten(0, 1)[None],
           'tap.attn_input_after_ln': rows(seen['ln']), 'tap.attn_out': seen['attn'].transpose(0, 1), 'tap.mlp_out': rows(seen['mlp'])}
    check_grads(case, tensors, {**grads_of(m, BLOCK, 'side.blocks.0.'), 'input.x': rows(v.grad), 'input.x_token': c.grad.flatten(0, 1)[None], 'input.pos': pos.grad})
    m.train()
    with torch.no_grad(): got['train_out'] = rows(m(v, c, pos))
    check(case, tensors, got)
    with capture_attention(m, 'attn') as maps: m(v, c, pos)
    assert maps['attn'][0].shape[-2:] == (len(pos), 1 + len(pos))


@kind('tdsclip', 'tm_plugins')
def tm_plugins(case, tensors):
    cfg, w, x = case['config'], part(tensors, 'weight/'), part(tensors, 'input/')['tokens']
    d, v, got = cfg['width'], tokens(x, cfg['frames']), {}
    first = lambda name: {k.removeprefix(name + '.'): t for k, t in w.items() if k.startswith(name + '.')}
    t1d = td.TokenT1D(d, cfg.get('n_div_token', 4))
    plugs = dict(tokenshift=td.TokenShift(d, cfg.get('n_div_token', 4)), tsm=td.TSM(d, cfg.get('n_div_tsm', 8)), tokent1d_at_init=t1d, tokent1d=td.TokenT1D(d), localuni=td.LocalUni(d),
                 dividedst=td.DividedST(d, heads_of(cfg, 'heads', d)))
    if 't1d.tconv.0.weight' in w: plugs['t1d'] = td.T1D(d, len(w['t1d.tconv.0.weight']))
    for name, m in plugs.items():
        if first(name): load_into(m, ours(first(name), PLUG, 'plugins.0.'))
        with torch.no_grad(): got[name] = rows(m.eval()(v))
    check(case, tensors, {**got, 'tokent1d_init_kernel': t1d.conv.weight})


@kind('tdsclip', 'video_header_transf')
def video_header_transf(case, tensors):
    cfg, x = case['config'], part(tensors, 'input/')
    m = td.FrameHeader(cfg['embed'], cfg['layers'], heads_of(cfg, 'heads', cfg['embed']), cfg['context'])
    load_into(m, ours(part(tensors, 'weight/'), 'fusion_model.', 'header.'))
    seen = watch(block=m.transformer.resblocks[0])
    out = m(x['frames'])
    loss = (out*x['probe']).sum(); loss.backward()
    check(case, tensors, {'video': out, 'loss': loss, 'tap.block.0': seen['block'].transpose(0, 1)})
    check_grads(case, tensors, grads_of(m, 'fusion_model.', 'header.'))


# ---------------------------------------------------------------------------------------------------------------- whole model
@kind('tdsclip', 'video_clip_eval')
def video_clip_eval(case, tensors):
    cfg, x, weights = case['config'], part(tensors, 'input/'), part(tensors, 'weight/')
    B, T = cfg['batch'], cfg['frames']
    m = td.from_state(weights, side_heads=heads_of(cfg, 'side_heads', cfg['side_dim']), vision_heads=heads_of(cfg, 'heads', cfg['width'])).eval()
    assert m.load_weights(weights, exact=True).count('loaded') == len(weights)
    back = m.to_official_state()
    assert back.keys() == weights.keys() and all(torch.equal(back[k].float(), weights[k].float()) for k in weights), 'the export does not give the file back'
    h = cfg['image']//cfg['patch']
    seen = watch(centre=m.side.stem.centre_bn, diff=m.side.stem.motion_bn, post=m.side.bn, **{f'linear{i}': t for i, t in enumerate(m.side.taps)}, **{f'side{i}': b for i, b in enumerate(m.side.blocks)})
    with taps(m.clip) as clip: out = m(dict(video=x['images'].unflatten(0, (B, -1))))
    loss = F.cross_entropy(out['logits'], x['labels'], label_smoothing=cfg.get('smoothing', 0.)); loss.backward()
    split = lambda y: y.unflatten(-1, (h, -1))
    got = {'logits': out['logits'], 'loss': loss, 'tap.side_bn_center': split(seen['centre']), 'tap.side_bn_diff': split(seen['diff']), 'tap.side_post_bn': split(seen['post']),
           'tap.video_feature': out['video']}
    for i, y in enumerate(clip):
        assert not y.requires_grad, f'CLIP block {i} built a graph'
        got.update({f'tap.backbone_block.{i}': y.transpose(0, 1), f'tap.side_linear.{i}': seen[f'linear{i}'].transpose(0, 1), f'tap.side_block.{i}': rows(seen[f'side{i}'])})
    check(case, tensors, got)
    check_grads(case, tensors, grads_of(m, '', ''))
    assert all(p.grad is None for p in m.clip.parameters())


@kind('tdsclip', 'train_loop')
def train_loop(case, tensors):
    cfg, x, tol = case['config'], part(tensors, 'input/'), case['tolerance']
    m = td.from_state(part(tensors, 'weight/'), side_heads=heads_of(cfg, 'side_heads', cfg['side_dim']), vision_heads=heads_of(cfg, 'heads', cfg['width'])).train()
    acc, n = cfg.get('grad_accumulation_steps', 1), cfg['iterations']
    groups = m.official_groups(cfg['lr'], cfg.get('weight_decay', .15), cfg.get('clip_ratio', 1), acc, cfg.get('sync_bn', False))
    opt, peak = make_optimizer('adamw', groups), [g['lr'] for g in groups]
    losses, logits = [], []
    for i in range(n):
        if i == 0 or (i+1) % 10 == 0:                                           # the official loop moves the schedule only here
            for g, lr in zip(opt.param_groups, peak): g['lr'] = lr*cosine_schedule(cfg.get('epoch', 0) + i/n, cfg['epochs'], cfg.get('warmup_epochs', 0))
        y = m(dict(video=x['images'][i].unflatten(1, (-1, 3))))['logits']
        loss = F.cross_entropy(y, x['labels'][i], label_smoothing=cfg.get('smoothing') or 0.)
        (loss/acc).backward()
        if (i+1) % acc == 0: opt.step(); opt.zero_grad()
        losses.append(loss.detach()); logits.append(y.detach())
    state = m.to_official_state()
    check(case, tensors, {**{f'after/{k}': v for k, v in state.items()}, 'losses': torch.stack(losses), 'logits': torch.stack(logits)}, skip=('lr_groups',))
    close('lr_groups', [g['lr'] for g in opt.param_groups], tensors['output/lr_groups'], 1e-9, unit=1e-12)


def plain(cfg, **kw):
    "A model of the case's sizes, freshly initialised"
    torch.manual_seed(cfg.get('seed', 0))
    clip = dict(embed_dim=64, image_size=cfg['image'], patch=cfg['patch'], vision_width=cfg['width'], vision_layers=cfg['layers'], vision_heads=heads_of(cfg, 'heads', cfg['width']),
                text_width=64, text_layers=1, text_heads=1, vocab=1, quick_gelu=True)
    device = kw.pop('device', 'cpu')
    with torch.device(device): clip = CLIPBackbone(**clip)
    return td.TDSCLIP(clip, cfg['classes'], cfg['side_dim'], side_heads=cfg.get('side_heads'), neighbours=cfg.get('num_diff', 5), **kw)


@kind('tdsclip', 'param_groups')
def param_groups(case, tensors):
    cfg = case['config']
    for c in case['cases']:
        m = plain(cfg)
        names, frozen = official_names(m), {n for n, p in m.named_parameters() if not p.requires_grad}
        assert {names[n] for n in frozen} == set(c['frozen'])
        got = make_optimizer('adamw', m.official_groups(cfg['lr'], cfg.get('weight_decay', .15), cfg.get('clip_ratio', 1), cfg.get('grad_accumulation_steps', 1), cfg.get('sync_bn', False))).param_groups
        assert len(got) == len(c['groups'])
        for g, e in zip(got, c['groups']):
            assert {names[n] for n in g['names']} == set(e['names']), f'{g["name"]}: {({names[n] for n in g["names"]}) ^ set(e["names"])}'
            assert len(g['params']) + e['frozen_names_also_listed'] == e['count'] and sum(p.requires_grad for p in g['params']) == len(e['names'])
            close(g['name'], [g['lr'], g['weight_decay'], *g['betas'], g['eps']], [e['lr'], e['weight_decay'], *e['betas'], e['eps']], 1e-9, unit=1e-12)


@kind('tdsclip', 'backbone_no_grad')
def backbone_no_grad(case, tensors):
    cfg = case['config']
    for c in case['cases']:
        m = plain(cfg).train()
        names, M = official_names(m), m.card.neighbours
        video = torch.randn(cfg['batch'], cfg['frames']*M, 3, cfg['image'], cfg['image'])
        f = lambda: F.cross_entropy(m(dict(video=video))['logits'], torch.arange(cfg['batch']) % cfg['classes'])
        seen = watch(**{f'backbone_block.{i}': b for i, b in enumerate(m.clip.visual.transformer.resblocks)}, **{f'side_block.{i}': b for i, b in enumerate(m.side.blocks)})
        f().backward()
        grads = {names[n]: p.grad for n, p in m.named_parameters()}
        assert {n for n, g in grads.items() if g is None} == set(c['grad_is_none'])
        assert {n for n, g in grads.items() if g is not None and not g.any()} == set(c['grad_all_zero'])
        assert sum(g is not None for g in grads.values()) == c['has_grad_count']
        assert {n: y.requires_grad for n, y in seen.items()} == c['output_requires_grad']
        frozen = saved_bytes(f, m)
        m.freeze('none')
        full = saved_bytes(f, m)
        for got, want in ((frozen, c['saved_bytes_frozen']), (full, c['saved_bytes_full'])): assert want/4 < got < want*2, f'{got} bytes kept, officially {want}'
        assert frozen/full < 1.1*c['saved_bytes_frozen']/c['saved_bytes_full'], f'{frozen} of {full} bytes kept'


@kind('tdsclip', 'parameter_table')
def parameter_table(case, tensors):
    cfg = case['config']
    for c in case['cases']:
        m = plain(cfg, device='meta')                                            # the side network is real: its start is looked at
        names = official_names(m)
        shape = {n: tuple(v.shape) for n, v in m.to_official_state(copy=False).items()}
        want = {k.replace('{i}', str(i)): tuple(v) for k, v in c['shapes'].items() for i in range(cfg['layers'])}
        assert shape == want, {k: (shape.get(k), want.get(k)) for k in shape.keys() | want.keys() if shape.get(k) != want.get(k)}
        assert len(shape) == c['entries']
        for key, trains in (('trainable', True), ('frozen', False)): assert sum(p.numel() for p in m.parameters() if p.requires_grad == trains) == c[key]
        value = {names[n]: p for n, p in m.named_parameters()}
        for e in c['init_std']:
            p = value[e['name']].detach()
            if not e['std']: assert p.std() == 0, e['name']
            else:
                room = case['tolerance'] + 3/p.numel()**0.5                        # two samples of so many numbers differ by chance too
                assert abs(p.std()/e['std'] - 1) < room, f'{e["name"]}: {p.std():.4g}, expected {e["std"]}'


# ---------------------------------------------------------------------------------------------------------------- texts
@kind('tdsclip', 'text_logits')
def text_logits(case, tensors):
    cfg, x = case['config'], part(tensors, 'input/')
    clip = CLIPBackbone(embed_dim=cfg['embed'], image_size=8, patch=4, vision_width=64, vision_layers=1, vision_heads=1, text_width=cfg['text_width'], text_layers=cfg['text_layers'],
                        text_heads=heads_of(cfg, 'text_heads', cfg['text_width']), context=cfg['context'], vocab=cfg['vocab'], quick_gelu=True)
    m = td.TDSCLIP(clip, head='text'); m.freeze('none')
    load_into(m.clip, {k.replace('transformer2.', 'transformer.'): v for k, v in part(tensors, 'weight/').items()}, new=('visual.*',))
    m.set_classes(x['tokens'])
    text = m.class_text()
    logits = m.similarity(text, x['video_feature']).T
    loss = F.cross_entropy(logits, x['labels']); loss.backward()
    with torch.no_grad(), taps(m.clip, 'text') as blocks: last = m.clip.encode_text(x['tokens'], tokens=True)[1]
    check(case, tensors, {'text_features': text, 'logits': logits, 'loss': loss, 'tap.ln_final': last, 'mean_pooled_video': x['frame_features'].unflatten(0, (-1, cfg['frames'])).mean(1),
                          **{f'tap.text_block.{i}': b.transpose(0, 1) for i, b in enumerate(blocks)}})
    grads = {n.replace('transformer.', 'transformer2.'): p.grad for n, p in m.clip.named_parameters()}
    for name, g in grads.items():           # the text is cut behind its last end token: what lies beyond has no gradient
        if f'grad/{name}' in tensors: close_grad(f'grad/{name}', g, tensors[f'grad/{name}'], case['tolerance'])
    m.freeze('all')
    kept = m.class_text()
    assert not kept.requires_grad and m.class_text() is kept
    close('kept text features', kept, tensors['output/text_features'], case['tolerance'])


@kind('tdsclip', 'text_prompts')
def text_prompts(case, tensors):
    cfg = case['config']
    ids, mask = tokenize(td.class_prompts([c['name'] for c in case['cases']], [cfg['template']]), cfg.get('context_length', 77))
    for row, n, c in zip(ids.tolist(), mask.sum(1).tolist(), case['cases']): assert row[:n] == c['ids'] and not any(row[n:]), c['name']


@kind('tdsclip', 'prompt_learner')
def prompt_learner(case, tensors):
    cfg, w, n = case['config'], part(tensors, 'weight/'), case['config']['n_ctx']
    prompts = td.context_prompts(cfg['classes'], n)
    ends = tokenize(prompts, 77)[0].argmax(-1)
    for c in case['cases']:
        assert (ends - n - 2).tolist() == c['name_lens'] and c['prompt_example'] in prompts
        for at in td.POSITIONS:
            if f'output/prompts.{at}' in tensors:
                got = td.place_context(w['token_prefix'], w['ctx'], w['token_suffix'], torch.tensor(c['name_lens']), at)
                close(at, got, tensors[f'output/prompts.{at}'], case['tolerance'])
    assert {k for k in tensors if k.startswith('output/')} <= {f'output/prompts.{at}' for at in td.POSITIONS}


# ---------------------------------------------------------------------------------------------------------------- losses
@kind('tdsclip', 'losses')
def losses(case, tensors):
    for c in case['cases']:
        x, name = torch.tensor(c['logits']), c.get('loss', c.get('metric'))
        if name == 'accuracy':
            with sub(name):
                from vidlab.tasks import RecognitionTask
                n = len(x)
                m = RecognitionTask.score(SimpleNamespace(average="softmax", mean_ap=False), dict(video=dict(sid=torch.arange(n), view=torch.zeros(n, dtype=torch.int64), logits=x, label=torch.tensor(c['labels']))))['metrics']
                for k in ('top1', 'top5'):
                    if k in c: close(k, m.get(k, 100.), c[k], case['tolerance'])         # of five classes, five are all
            continue
        if name in ('label_smoothing_ce', 'cross_entropy'): got = F.cross_entropy(x, torch.tensor(c['labels']), label_smoothing=c.get('smoothing', 0.))
        elif name == 'soft_target_ce': got = F.cross_entropy(x, torch.tensor(c['targets']))
        elif name in ('nce_kl', 'dual_kl'):
            ids = torch.tensor(c['group_ids'])
            if 'label_matrix' in c: close('label_matrix', (ids[:, None] == ids).float(), c['label_matrix'])
            got = group_kl(x, ids, dual=name == 'dual_kl', temperature=c.get('temp', 1000.))
        else: raise AssertionError(f'unknown loss {name!r}')
        close(name, got, c['value'], case['tolerance'])
