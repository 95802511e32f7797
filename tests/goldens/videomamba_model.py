"VideoMamba: mixer, classifiers, student, loading and start values against the official code, on every path of the scan"
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from goldens import close, close_grad, kind, part, sub
from vidlab.models import videomamba as vm
from vidlab.masks import take_visible
from vidlab.ssm import scan_paths, use_path
from vidlab.teacher import align_loss, aligned_blocks

MIXER = dict(d_state='state', d_conv='conv', expand='expand', dt_rank='dt_rank', bias='bias', conv_bias='conv_bias')
IGNORED = {'d_model', 'bimamba', 'use_fast_path', 'layer_idx', 'batch', 'seqlen', 'seed', 'derived',     # what a case says besides, and what changes start values alone
           'dt_min', 'dt_max', 'dt_init', 'dt_scale', 'dt_init_floor'}


def every_path():
    "(path, device): compiled, loop and oracle here, kernels where there is a GPU"
    return [(p, 'cpu' if p in ('numba', 'loop', 'reference') else 'cuda') for p in scan_paths()]


def close_own(name, got, expected, tol): close(name, got, expected, tol, own=True)       # the cases' note: relative to each tensor's maximum


def mixer_options(cfg):
    cfg = dict(cfg)
    if cfg.get('dt_rank') == 'auto': cfg.pop('dt_rank')
    assert set(cfg) <= {*MIXER, *IGNORED}, f'unknown options of the mixer: {sorted(set(cfg) - {*MIXER, *IGNORED})}'
    return {MIXER[k]: v for k, v in cfg.items() if k in MIXER}


DEFAULTS = dict(embed_dim=192, depth=24, img_size=224, patch_size=16, num_frames=8, num_classes=1000,      # of the official classes
                clip_output_dim=512, clip_return_layer=1, clip_student_return_interval=1, clip_norm_type='l2')


def trunk_options(cfg, image=False):
    "Options of our trunk from an official configuration"
    cfg = {**DEFAULTS, **cfg}
    if cfg.get('stride', cfg['patch_size']) != cfg['patch_size']: raise AssertionError('overlapping patches are not supported')
    return dict(dim=cfg['embed_dim'], depth=cfg['depth'], image_size=cfg['img_size'], patch=cfg['patch_size'], tubelet=cfg.get('kernel_size', 1), max_frames=0 if image else cfg['num_frames'],
                norm='rms' if cfg.get('rms_norm', True) else 'layer', bidirectional=cfg.get('bimamba', True), drop_path=cfg.get('drop_path_rate', 0.), mixer=mixer_options(cfg.get('ssm_cfg') or {}))


def with_eps(model, cfg):
    for n, m in model.named_modules():
        if n in ('norm', 'norm_f') or n.startswith('layers.') and n.endswith('.norm'): m.eps = cfg.get('norm_epsilon', m.eps)
    return model


def classifier(cfg, image=False):
    cfg = {**DEFAULTS, **cfg}
    return with_eps(vm.VideoMamba(cfg['num_classes'], cfg.get('fc_drop_rate', 0.), **trunk_options(cfg, image)), cfg)


def student(cfg, tap='fixed'):
    cfg = {**DEFAULTS, **cfg}
    assert cfg.get('clip_decoder_embed_dim', cfg['embed_dim']) == cfg['embed_dim'], 'a decoder as wide as the trunk'
    return with_eps(vm.VideoMambaStudent(cfg['clip_output_dim'], cfg['clip_return_layer'], cfg['clip_student_return_interval'], tap, cfg['clip_norm_type'], **trunk_options(cfg)), cfg)


def named_grads(module): return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------------- mixer
@kind('videomamba', 'mixer')
def mixer(case, tensors):
    cfg, tol, w, x = case['config'], case['tolerance'], part(tensors, 'weight/'), part(tensors, 'input/')
    # without its fast path the official module runs the forward direction alone, whatever parameters it has
    both = cfg.get('bimamba', True) and cfg.get('use_fast_path', True)
    for path, dev in every_path():
        with sub(path), use_path(path):
            m = vm.Mixer(cfg['d_model'], bidirectional=both, **mixer_options(cfg)).to(dev)
            m.load_state_dict({k: v for k, v in w.items() if both or not ('_b.' in k or k.endswith(('_b', '_b_log')))})
            seen = {}
            m.scan.register_forward_hook(lambda mod, a, y: seen.update(conv=a[0], delta=a[1], B=a[3], C=a[4], scan=y))
            m.in_proj.register_forward_hook(lambda mod, a, y: seen.update(z=y.transpose(1, 2).chunk(2, 1)[1]))
            h = x['hidden_states'].to(dev).clone().requires_grad_()
            out = m(h)
            z = F.silu(seen['z'])
            got = {'out': out}
            for k, side in enumerate(('fwd', 'bwd')[:1 + both]):
                got.update({f'{n}_{side}': seen[n][k] for n in ('conv', 'delta', 'B', 'C')}, **{f'scan_{side}': seen['scan'][k]*(z.flip(-1) if k else z)})
            for name, e in part(tensors, 'output/').items(): close_own(f'{path} {name}', got[name], e, tol)
            (out*x['dout'].to(dev)).sum().backward()
            grads = {**named_grads(m), 'input.hidden_states': h.grad}
            for name, e in part(tensors, 'grad/').items(): close_grad(f'{path} grad/{name}', grads[name], e, tol)
            if 'params_without_grad' in cfg.get('derived', {}): assert sorted(set(w) - set(grads)) == sorted(cfg['derived']['params_without_grad'])


# ---------------------------------------------------------------------------------------------------------------- classifier
def watch(model):
    "What the blocks give in the next forward pass"
    got = {}
    def hook(i):
        def f(mod, args, out):
            if i == 0: got['embedded'] = args[0]
            got[f'mixer_out.{i}'], got[f'residual.{i}'] = out
        return f
    for i, layer in enumerate(model.layers): layer.register_forward_hook(hook(i))
    return got


def decide(model, keep, want):
    "Stochastic depth with recorded decisions"
    mods = {n: m for n, m in model.named_modules() if n.endswith('drop_path') and m.drop_prob > 0}
    close('drop rates', [mods[n].drop_prob for n in want], list(want.values()), 1e-6)
    assert set(mods) == set(want) == set(keep), f'{sorted(mods)}, expected {sorted(want)}'
    for n, m in mods.items(): m.register_forward_hook(lambda mod, a, y, n=n: a[0]*keep[n].view(-1, 1, 1).to(a[0])/(1-mod.drop_prob))


@kind('videomamba', 'video', 'image')
def model(case, tensors):
    cfg, tol, x, image = case['config'], case['tolerance'], part(tensors, 'input/'), case['kind'] == 'image'
    for path, dev in every_path():
        with sub(path), use_path(path):
            m = classifier(cfg, image)
            m.load_weights(part(tensors, 'weight/'), exact=True)
            m.to(dev).train(bool(cfg.get('train_droppath')))
            if m.training: decide(m, part(x, 'keep.'), cfg['derived']['drop_prob_by_module'])
            got = watch(m)
            out = m(dict(video=(x['image'][:, None] if image else x['video'].transpose(1, 2)).to(dev)))
            got.update(features=out['video'], logits=out['logits'])
            if 'target' in x: got['loss'] = F.cross_entropy(out['logits'], x['target'].to(dev)).view(1)
            for name, e in part(tensors, 'output/').items(): close_own(f'{path} {name}', got[name], e, tol)
            if grads := part(tensors, 'grad/'):
                got['loss'].sum().backward()
                own = named_grads(m)
                for name, e in grads.items(): close_grad(f'{path} grad/{name}', own[name], e, tol)


# ---------------------------------------------------------------------------------------------------------------- loading
def write(folder, state, top='', prefix=''):
    state = {prefix + k: v for k, v in state.items()}
    torch.save({top: state, 'epoch': 1} if top else state, Path(folder)/'weights.pth')
    return Path(folder)/'weights.pth'


@kind('videomamba', 'inflate')
def inflate(case, tensors):
    cfg, tol, w = case['config'], case['tolerance'], part(tensors, 'weight/')
    m = classifier(cfg['video']).eval()
    init = part(w, 'video_init.')
    m.load_state_dict({**m.state_dict(), **init})
    with tempfile.TemporaryDirectory() as d: report = m.load_weights(write(d, part(w, 'image.'), 'model'), how='centre' if cfg.get('center', True) else 'mean')
    assert set(report.names('new')) == set(init), report.names('new')
    own = m.state_dict()
    for name, e in part(tensors, 'output/state.').items(): close_own(name, own[name], e, tol)
    for path, dev in every_path():
        with sub(path), use_path(path), torch.no_grad():
            out = m.to(dev)(dict(video=tensors['input/video'].transpose(1, 2).to(dev)))
            close_own('features', out['video'], tensors['output/features'], tol); close_own('logits', out['logits'], tensors['output/logits'], tol)


@kind('videomamba', 'finetune_load')
def finetune_load(case, tensors):
    cfg, tol, w = case['config'], case['tolerance'], part(tensors, 'weight/')
    file, init = part(w, 'ckpt.'), part(w, 'target_init.')
    m = classifier(cfg['target'])
    m.load_weights(init, exact=True)
    with tempfile.TemporaryDirectory() as d:
        report = m.load_weights(write(d, file, cfg.get('top_key', ''), cfg.get('key_prefix', '')), new_head=cfg.get('delete_head', False), labels=cfg.get('label_map'), compat=True)
    own, derived = m.state_dict(), cfg.get('derived', {})
    for name, e in part(tensors, 'output/state.').items():
        if name in file and file[name].shape != init[name].shape and torch.equal(e, init[name]):
            with sub('size_mismatch_skipped'): close_own(name, own[name], e, tol)
        else: close_own(name, own[name], e, tol)
    assert set(derived.get('missing', [])) <= set(report.names('new')), report.names('new')
    left = {a.removeprefix(cfg.get('key_prefix', '')) for a, _, what in report.rows if what == 'dropped'}
    assert set(derived.get('unexpected', [])) <= left, sorted(left)


# ---------------------------------------------------------------------------------------------------------------- pretraining
@kind('videomamba', 'pretrain')
def pretrain(case, tensors):
    cfg, tol = case['config'], case['tolerance']
    sc, derived, see = {**DEFAULTS, **cfg['student']}, cfg.get('derived', {}), ~tensors['input/mask'].bool()
    with sub('teacher'): targets = ask_teacher(cfg, tensors)
    picked = take_visible(tensors['output/teacher_features'], see)
    close_own('targets_vis', picked, tensors['output/targets_vis'], tol)
    with sub('teacher'): close_own('targets_vis of our teacher', take_visible(targets, see), tensors['output/targets_vis'], tol)
    for path, dev in every_path():
        with sub(path), use_path(path):
            m = student(sc, 'official' if sc.get('fused_add_norm', True) else 'official_unfused').eval()
            m.load_weights(part(tensors, 'weight/student.'), exact=True)
            m.to(dev)
            if 'student_return_index' in derived: assert m.aligned == sorted(derived['student_return_index'])
            close('clip_pos_embed', m.clip_pos_embed, tensors['output/clip_pos_embed'], tol)
            states, place = [], m.clip_pos_embed.expand(len(see), -1, -1)[see].view(len(see), -1, sc['embed_dim'])
            for dec in m.clip_decoder: dec.register_forward_pre_hook(lambda mod, a: states.append(a[0] - place))
            f = m(dict(video=tensors['input/video'].transpose(1, 2).to(dev), visible=see.to(dev)))['features']
            close_own('student_hidden_vis', torch.stack(states), tensors['output/student_hidden_vis'], tol)
            close_own('student_clip', f, tensors['output/student_clip'], tol)
            loss = align_loss(f, picked.to(dev), cfg.get('clip_loss_type', 'l2')); total = loss*cfg.get('clip_loss_ratio', 1.)
            for name, v in dict(loss=loss, loss_total=total).items(): close_own(name, v.view(1), tensors[f'output/{name}'].view(1), tol)
            total.backward()
            own = named_grads(m)
            for name, e in part(tensors, 'grad/').items(): close_grad(f'{path} grad/{name}', own[name], e, tol)
            if 'params_without_grad' in derived: assert sorted(n for n, _ in m.named_parameters() if n not in own) == sorted(derived['params_without_grad'])


def ask_teacher(cfg, tensors):
    "(K,B,1+T'N,D) of our CLIP teacher with the case's weights"
    from goldens.videomamba_pretrain import make_teacher
    with tempfile.TemporaryDirectory() as d: t = make_teacher(cfg['teacher'], part(tensors, 'weight/teacher.'), d)
    f = t(tensors['input/video'].transpose(1, 2))['features']
    close_own('teacher_features', f, tensors['output/teacher_features'], cfg.get('tolerance', 1e-4))
    return f


# ---------------------------------------------------------------------------------------------------------------- start values, schedules
def fresh(name, cfg):
    if name == 'mixer_alone': return vm.Mixer(cfg['d_model'], bidirectional=cfg.get('bimamba', True), **mixer_options(cfg))
    if name in ('pretrain', 'student'): return student(cfg)
    if name in ('video', 'image'): return classifier(cfg, name == 'image')
    raise AssertionError(f'unknown model {name!r}')


@kind('videomamba', 'init_stats')
def init_stats(case, tensors, seeds=6):
    "Constants exactly; spread and mean within the tolerance and what so many numbers scatter; extremes loosely"
    for c in case['cases']:
        pool = {}
        for s in range(seeds):
            torch.manual_seed(s)
            for n, p in fresh(c['model'], c['config']).named_parameters(): pool.setdefault(n, []).append(p.detach().flatten())
        assert set(c['stats']) <= set(pool), sorted(set(c['stats']) - set(pool))
        for n, e in c['stats'].items():
            assert len(pool[n][0]) == e['n_per_model'], n
            v = torch.cat(pool[n]).double()
            if e['std'] == 0: assert v.min() == e['min'] and v.max() == e['max'], f'{n}: constant {e["min"]}, got {v.min()}..{v.max()}'; continue
            scatter = 1/math.sqrt(e['n_per_model'])
            assert abs(v.std().item()/e['std'] - 1) <= case['tolerance'] + 3*scatter, f'{c["model"]} {n}: std {v.std():.5g}, expected {e["std"]}'
            assert abs(v.mean().item() - e['mean']) <= (case['tolerance'] + 5*scatter)*e['std'], f'{c["model"]} {n}: mean {v.mean():.5g}, expected {e["mean"]}'
            wide = e['max'] - e['min']
            assert abs(v.min().item() - e['min']) < 0.35*wide and abs(v.max().item() - e['max']) < 0.35*wide, f'{c["model"]} {n}: {v.min():.4g}..{v.max():.4g}'


@kind('videomamba', 'schedules_depth')
def schedules_depth(case, tensors):
    for c in case['cases']:
        with sub(c['kind']):
            if c['kind'] == 'drop_path':
                *entering, last = vm.drop_rates(c['depth'], c['drop_path_rate'])
                close('rates', entering, c['rate_at_block_input'], case['tolerance']); close('final', last, c['rate_at_final_add'], case['tolerance'])
            elif c['kind'] == 'return_index': assert aligned_blocks(c['depth'], c.get('clip_return_layer', 1), c.get('interval', 1)) == sorted(c['return_index'])
            else: raise AssertionError(f"unknown schedule {c['kind']!r}")
