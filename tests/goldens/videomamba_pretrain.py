"""Checks of VideoMamba's masked pretraining (masks, CLIP teacher) and its losses, and of TVTS's kept patches."""
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from goldens import close, kind, part, sub

OFFICIAL = dict(tube='tube', random='random', tube_row='frame_row', random_row='clip_row')


def bits(mask): return ''.join(str(int(x)) for x in mask.flatten().tolist())


@kind('videomamba', 'masks')
def masks(case, tensors):
    from vidlab.masks import hidden_mask
    assert case['cases']
    for c in case['cases']:
        got = hidden_mask(OFFICIAL[c['mask_type']], tuple(c['window_size']), c['mask_ratio'], np.random.RandomState(c['seed']))
        with sub(c['mask_type']):
            assert bits(got) == c['mask_bits'], f"{c['mask_type']} {c['window_size']}, seed {c['seed']}: {bits(got)}"
            assert int(got.sum()) == c['num_masked']


@kind('videomamba', 'mask_attention')
def mask_attention(case, tensors):
    from vidlab.masks import drawn_order, hide_last
    assert case['cases']
    for c in case['cases']:
        a, want = torch.tensor(c['attn']), torch.tensor(c['drawn_order'])
        assert a.shape == (c['batch']*c['frames'], c['patches'])
        for order in (want, drawn_order(a, torch.Generator().manual_seed(c['torch_seed']))):
            hidden = hide_last(order, c['mask_ratio']).view(c['batch'], -1)
            got = ['0' + bits(m) for m in hidden]                                    # the class token in front is seen
            assert got == c['mask_bits_with_cls'], f'{got}'
        assert order.tolist() == c['drawn_order']


@kind('tvts', 'keep_indices')
def keep(case, tensors):
    from vidlab.masks import keep_indices
    assert case['cases']
    for c in case['cases']:
        got = keep_indices(c['temporal_slots'], c['patches_per_frame'], c['mask_ratio'], [np.random.RandomState(c['numpy_seed'])])
        assert got[0].tolist() == c['keep_ind']


TEACHER = dict(input_resolution=224, clip_norm_type='l2', kernel_size=1, return_attn=False, clip_return_layer=1, clip_return_interval=1, clip_return_cls=False)     # of the official class


def make_teacher(cfg, state, folder, **options):
    "The teacher of a case, its weights read from a file"
    cfg = {**TEACHER, **cfg}
    from safetensors.torch import save_file
    from vidlab.teacher import create_teacher
    save_file({k: v.contiguous() for k, v in state.items()}, Path(folder)/'tower.safetensors')
    t = create_teacher(str(Path(folder)/'tower.safetensors'), quick_gelu=True, vision_heads=cfg['heads'], layers=cfg['clip_return_layer'], interval=cfg['clip_return_interval'],
                       cls=cfg['clip_return_cls'], attention=cfg['return_attn'], norm=cfg['clip_norm_type'], image_size=cfg['input_resolution'], tubelet=cfg['kernel_size'],
                       input='imagenet', **options)                                  # the cases' frames are what the tower sees
    card = t.clip.card
    assert (card.patch, card.vision_width, card.vision_layers, t.dim) == (cfg['patch_size'], cfg['width'], cfg['layers'], cfg['output_dim'])
    return t


def ask(t, cfg, tensors, tolerance):
    out = t(tensors['input/video'].transpose(1, 2))                                  # the cases have the channels before the frames
    f = tensors['output/features']
    close('features', out['features'], f, tolerance, own=True)
    if 'output/attn' in tensors: close('attn', out['attention'].flatten(0, 1), tensors['output/attn'], tolerance, own=True)
    assert ('attention' in out) == cfg.get('return_attn', False)


@kind('videomamba', 'teacher')
def teacher(case, tensors):
    cfg = case['config']
    with tempfile.TemporaryDirectory() as d: t = make_teacher(cfg, part(tensors, 'weight/'), d)
    if said := cfg.get('derived', {}).get('teacher_return_index'): assert t.blocks == sorted(said)
    ask(t, cfg, tensors, case['tolerance'])


@kind('videomamba', 'clip_load')
def clip_load(case, tensors):
    cfg = case['config']; tc = cfg['teacher']
    with tempfile.TemporaryDirectory() as d: t = make_teacher(tc, part(tensors, 'weight/'), d, inflate='centre' if cfg.get('center', True) else 'mean')
    own = {k: v for k, v in t.clip.visual.state_dict().items()}
    own['conv1.weight'] = own['conv1.weight'].unflatten(1, (3, t.tubelet))           # (d,3,k,p,p)
    for k, v in part(tensors, 'output/state.').items(): close(k, own[k], v, case['tolerance'], own=True)
    ask(t, tc, tensors, case['tolerance'])


@kind('videomamba', 'losses')
def losses(case, tensors):
    from vidlab.tasks import RecognitionTask
    assert case['cases']
    for c in case['cases']:
        x, y, tol = torch.tensor(c['logits']), torch.tensor(c['target']), case['tolerance']
        close('label_smoothing_ce', F.cross_entropy(x, y, label_smoothing=c['smoothing']), c['label_smoothing_ce'], tol)
        close('soft_target_ce', F.cross_entropy(x, torch.tensor(c['soft_target'])), c['soft_target_ce'], tol)
        close('ce', F.cross_entropy(x, y), c['ce'], tol)
        with sub('acc1_acc5_percent'):
            n, C = x.shape
            m = RecognitionTask.score(SimpleNamespace(average='softmax', mean_ap=False), dict(video=dict(sid=torch.arange(n), view=torch.zeros(n, dtype=torch.int64), logits=x, label=y)))['metrics']
            top5 = m.get('top5', 100. if C == 5 else m['top1'])                      # of five classes, five are all; the official code calls top-1 top-5 where there are fewer
            close('acc1_acc5', [m['top1'], top5], c['acc1_acc5_percent'], tol)
