"The golden runner on other values of the same kinds: stored cases with their configuration changed, and cases by plain loops."
import copy, json
from pathlib import Path

import numpy as np
import pytest
import torch

import goldens
from test_golden import DIFFERS, read_differs

CASES = Path(__file__).parent/'golden'


def stored(name):
    "A stored case and its tensors"
    from safetensors.torch import load_file
    p = CASES/f'{name}.json'
    t = p.with_suffix('.safetensors')
    return json.loads(p.read_text()), load_file(t) if t.exists() else None


def run(case, tensors=None):
    "The listed sub-cases that differ"
    goldens.load_kinds()
    return [sub for sub, _ in goldens.run_case(case, tensors, read_differs(DIFFERS))]


def without(case, *keys):
    "The same case, saying less"
    case = copy.deepcopy(case)
    for k in keys:
        *above, last = k.split('.')
        at = case['config']
        for a in above: at = at[a]
        at.pop(last)
    return case


@pytest.mark.parametrize('name,keys', [('clip4clip/sim_meanP_2d', ['sim_header', 'linear_patch', 'vision_width', 'valid_frames']), ('clip4clip/bertadam', ['eps', 'max_grad_norm']),
                                       ('stan/train_steps', ['betas', 'eps', 'max_grad_norm', 'stan_lr_mult']), ('stan/stan_recognition_frozen', ['num_classes', 'trainable_with_grad']),
                                       ('tdsclip/train_loop', ['clip_ratio', 'sync_bn', 'weight_decay']), ('tdsclip/mixup', ['mixup_alpha', 'cutmix_alpha', 'switch_prob']),
                                       ('tvts/train_steps', ['projection', 'betas', 'eps', 'weight_decay']), ('videomamba/scan_plain', ['delta_softplus']),
                                       ('videomamba/ft_load_head710_plain', ['top_key', 'key_prefix', 'delete_head']),
                                       ('videomamba/train_steps', ['task', 'update_freq', 'soft_targets', 'smoothing', 'betas', 'weight_decay_end'])], ids=lambda v: v if isinstance(v, str) else '')
def test_a_case_that_says_less(name, keys):
    "What a configuration leaves out is what the official code takes then"
    case, tensors = stored(name)
    assert run(without(case, *keys), tensors) == []


def test_an_unknown_part_fails():
    for name in ('clip4clip/metrics', 'clip4clip/frame_index', 'stan/geometry'):
        case, tensors = stored(name)
        with pytest.raises(AssertionError, match='unknown parts: another'): run(dict(case, another=[]), tensors)


# ---------------------------------------------------------------------------------------------------------------- VideoMamba
@pytest.mark.parametrize('keys', [['student.clip_return_layer'], ['student.clip_student_return_interval', 'student.clip_norm_type', 'clip_loss_type', 'clip_loss_ratio'],
                                  ['teacher.clip_return_layer', 'teacher.clip_return_interval', 'teacher.clip_norm_type', 'teacher.kernel_size', 'teacher.return_attn'],
                                  ['derived']], ids=lambda k: k[0])
def test_a_student_that_says_less(keys):
    "What a configuration leaves out is the default of the official classes"
    case, tensors = stored('videomamba/pretrain_l2_fused')
    assert run(without(case, *keys), tensors) == []


def test_a_value_is_looked_at():
    "Another norm, another number of layers with a target: the check notices"
    case, tensors = stored('videomamba/pretrain_l2_fused')
    for k, v in dict(clip_norm_type='none', clip_return_layer=2, norm_epsilon=.1).items():
        with pytest.raises(AssertionError):
            other = copy.deepcopy(case); other['config']['student'][k] = v
            run(other, tensors)


def walk(n, t, step, seed):
    "The published walk: positions count from 1, and the last one is never stepped onto"
    more = n - t*step + 1
    at, out = 1 + (np.random.RandomState(seed).randint(more) if more > 0 else 0), []
    for _ in range(t):
        out.append(int(at) - 1)
        if at + step < n: at += step
    return out


def test_every_dense_walk():
    cases, onto = [], []
    for n in (1, 5, 9, 29, 30, 64, 65, 70, 250):
        for t, step in ((8, 1), (8, 4), (16, 4), (1, 1), (4, 2)):
            for seed in range(3): cases.append(dict(num_video_frames=n, num_segments=1, num_frames=t, sampling_rate=step, seed=seed, frame_ids=walk(n, t, step, seed)))
    differs = {d for c in cases for d in run(dict(system='videomamba', kind='sampling_pretrain', tolerance=0, cases=[c]))}
    assert differs == {'a walk onto the last frame'}
    assert run(dict(system='videomamba', kind='sampling_pretrain', tolerance=0, cases=[c for c in cases if c['num_video_frames'] == 250 and c['sampling_rate'] > 1])) == []
    wrong = dict(cases[-1], frame_ids=[f + 1 for f in cases[-1]['frame_ids']])
    with pytest.raises(AssertionError): run(dict(system='videomamba', kind='sampling_pretrain', tolerance=0, cases=[wrong]))


def grouped(names, depth, decay, wd, current):
    "Groups by the published rule: one dimension, a bias, tokens and places do not decay"
    out = {}
    for n, dims in names.items():
        last = current or not n.startswith('layers.')
        id_ = 0 if n in ('cls_token', 'pos_embed') or n.startswith('patch_embed.') else depth + 1 if last else int(n.split('.')[1]) + 1
        bare = dims == 1 or n.endswith('.bias') or n in ('cls_token', 'pos_embed', 'temporal_pos_embedding')
        out.setdefault((decay**(depth + 1 - id_), 0. if bare else wd), []).append(n)
    return [dict(lr_scale=s, weight_decay=w, params=p) for (s, w), p in out.items()]


@pytest.mark.parametrize('what', ['layer norm', 'one direction', 'student', 'two decoders', 'no head', 'image', 'one number', 'biases'])
def test_groups_of_every_model(what):
    from vidlab.models import videomamba as vm
    trunk = dict(dim=8, depth=3, image_size=16, patch=8, max_frames=0 if what == 'image' else 2, norm='layer' if what == 'layer norm' else 'rms', bidirectional=what != 'one direction',
                 mixer=dict(bias=True, conv_bias=False) if what == 'biases' else {})
    m = vm.VideoMambaStudent(8, 2 if what == 'two decoders' else 1, **trunk) if what in ('student', 'two decoders') else vm.VideoMamba(1 if what == 'one number' else 5, **trunk)
    names = {n: p.ndim for n, p in m.named_parameters() if not (what == 'no head' and n.startswith('head.'))}
    cases = [dict(variant=v, layer_decay=.8, weight_decay=.05, depth=3, groups=grouped(names, 3, .8, .05, v == 'current')) for v in ('current', 'fixed')]
    assert run(dict(system='videomamba', kind='param_groups', tolerance=0, cases=cases)) == []


@pytest.mark.parametrize('clips,crops,modes', [(2, 3, ['test', 'validation']), (4, 3, ['test']), (1, 3, ['test'])])
def test_views_of_kinetics(clips, crops, modes):
    "Windows dealt out from end to end, crops along the longer side; pixels by OpenCV's own numbers where it is installed"
    from vidlab.data.transforms import normalise, resize
    n, h, w, t, rate, short = 37, 20, 30, 4, 2, 12
    frames, out = np.random.default_rng(0).integers(0, 256, (n, h, w, 3)).astype(np.uint8), {}
    small, window = resize(frames, short, int(short*w/h), 'opencv'), t*rate
    def put(name, idx, left): out[name] = normalise(torch.from_numpy(small[idx][:, :, left:left + short].copy()).permute(0, 3, 1, 2), (.485, .456, .406), (.229, .224, .225)).transpose(0, 1)
    step = (small.shape[2] - short)/(crops - 1)
    for i in range(clips*crops if 'test' in modes else 0):
        clip, crop = divmod(i, crops)
        start = int(clip*(n - window)/max(clips - 1, 1))
        put(f'output/test.{i}', [start + rate*k for k in range(t)], int(crop*step))
    if 'validation' in modes: put('output/validation.0', [0]*t, 0)                       # published: wraps; ours is listed
    cfg = dict(dataset='kinetics', frames=n, h=h, w=w, num_frames=t, frame_sample_rate=rate, crop_size=short, short_side_size=short, test_num_segment=clips, test_num_crop=crops, modes=modes)
    differs = run(dict(system='videomamba', kind='views', tolerance=.01, config=cfg), {'input/frames': torch.from_numpy(frames), **out})
    assert set(differs) <= {'validation window', 'one test clip'} and ('validation window' in differs) == ('validation' in modes)
    if clips > 1:
        with pytest.raises(AssertionError): run(dict(system='videomamba', kind='views', tolerance=.01, config=dict(cfg, frame_sample_rate=3)), {'input/frames': torch.from_numpy(frames), **out})


# ---------------------------------------------------------------------------------------------------------------- STAN
@pytest.mark.parametrize('said', ['every parameter whose name contains STAN', None])
def test_what_gets_a_gradient_in_words(said):
    case, tensors = stored('stan/stan_recognition_frozen')
    case['config'].pop('trainable_with_grad')
    if said: case['config']['trainable_with_grad'] = said
    assert run(case, tensors) == []


def test_start_of_other_branches():
    cases = [dict(clip_layers=n, depth=k, spatial_layer_copied_from=[[j, n - k + j] for j in range(k)], taps_output_of_clip_layer=list(range(n - k, n)), temporal_fc_all_zero=True,
                  time_embed_shape=[frames, 8], drop_path=(rate*np.arange(k)/max(k - 1, 1)).tolist(), drop_path_T=(rate*np.arange(k)/max(k - 1, 1)).tolist())
             for n, k, rate, frames in ((4, 2, .3, 64), (5, 5, 0., 12), (3, 1, .1, 64))]
    assert run(dict(system='stan', kind='init_rules', tolerance=1e-6, cases=cases)) == []


def test_captions_of_pictures():
    item = lambda path, text: dict(img_path=f'DATA/{path}', text=text, sample_idx=0)
    coco = dict(images=[dict(id=i, coco_url=f'http://x.org/val2014/{i}.jpg') for i in (3, 5)], annotations=[dict(id=k, image_id=i, caption=f'c{k}') for k, i in enumerate((5, 3, 5))])
    genome = [dict(image=f'/a/b/{i}.jpg', caption=f'c{i}', dir_id=i) for i in (1, 2)]
    cases = [dict(dataset='CC_Dataset', annotation='a dog\t0/1\na cat\t2.jpg\n', options={}, items=[item('0/1', 'a dog'), item('2.jpg', 'a cat')]),
             dict(dataset='CoCo_Dataset', annotation=coco, options={}, items=[item(f'val2014/{i}.jpg', f'c{k}') for k, i in enumerate((5, 3, 5))]),
             dict(dataset='VG_Dataset', annotation=genome, options={}, items=[item('VG_100K/1.jpg', 'c1'), item('VG_100K_2/2.jpg', 'c2')])]
    assert run(dict(system='stan', kind='annotations', tolerance=0, cases=cases)) == []
    commas = dict(cases[0], annotation='a dog, asleep\t0/1\n', items=[item('0/1', 'a dog asleep')])
    assert run(dict(system='stan', kind='annotations', tolerance=0, cases=[commas])) == ['a comma in a caption']
    with pytest.raises(AssertionError, match='known: '): run(dict(system='stan', kind='annotations', tolerance=0, cases=[dict(cases[0], dataset='Nothing')]))


# ---------------------------------------------------------------------------------------------------------------- TDS-CLIP, TVTS
@pytest.mark.parametrize('text,three', [('a 12 0\nb 5\nc 9 4\n', True), ('b 5\na 12 0\n', False)])
def test_lists_of_mixed_lines(text, three):
    "The published reader: first and last field, the second as a number of frames; short ones go where the first line has three fields"
    rows = [line.split(' ') for line in text.split('\n') if line]
    keep = [dict(path=r[0], num_frames=int(r[1]), label=int(r[-1])) for r in rows if not three or int(r[1]) >= 8]
    case = dict(system='tdsclip', kind='annotation_lists', tolerance=0, config=dict(min_frames=8), cases=[dict(text=text, test_mode=False, records=keep)])
    assert run(case) == ['lines with different numbers of fields']


@pytest.mark.parametrize('kind', ['cosine', 'multistep'])
def test_rates_of_the_loop(kind):
    "Every tenth iteration and the first of an epoch; a milestone takes a tenth"
    epochs, warmup, n, marks = 12, 2, 13, [5, 9]
    def rate(e): return .1**sum(e >= m for m in marks) if e >= warmup else e/warmup
    if kind == 'cosine': rate = lambda e: e/warmup if e < warmup else .5*(1 + np.cos(np.pi*(e - warmup)/(epochs - warmup)))
    def used(e):
        out, now = [], None
        for i in range(n):
            if i == 0 or (i + 1) % 10 == 0: now = .01*rate(e + i/n)
            out.append(now)
        return out
    case = dict(kind='as_used_in_training', lr=.01, epochs=epochs, warmup=warmup, iters=n, sequence=[dict(epoch=e, lr=used(e)) for e in range(epochs)])
    if kind == 'multistep': case.update(type=kind, milestones=marks)
    assert run(dict(system='tdsclip', kind='lr_schedule', tolerance=1e-9, cases=[case])) == []


def test_rows_of_pictures_and_videos():
    cases = [dict(dataset='CC3M', split='val', row=['a cat', '77'], image_path='data/CC3M/validation/77', captions=['a cat']),
             dict(dataset='CC3M', split='test', row=['a cat', 'a/b.c.png', 'more'], image_path='data/CC3M/validation/a/b.c.png', captions=['a cat']),
             dict(dataset='WebVid', split='test', row=['sea', '1/2'], video_path='data/WebVid/test/1/2.mp4', captions=['sea'])]
    assert run(dict(system='tvts', kind='split_rows', tolerance=0, cases=cases)) == []
