"""Checks of the TVTS data kinds: frame indices, transforms of pretraining and of Something-Something, mixup."""
import numpy as np

from goldens import close, kind
from goldens.tdsclip_data import Python
from goldens.videomamba_data import MEAN, STD, Crops


@kind('tvts', 'sample_frames')
def sample_frames(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, t, gen = c['video_len'], min(c['num_frames'], c['video_len']), None     # the published reader takes what a short video has
        if c['mode'] == 'rand':
            got = segments(n, t, True, Python(c['python_seed']), 'tvts')
            if 'error' in c:                                                       # published: no frame to choose from; here the only one
                edge = np.linspace(0, n, t + 1).astype(int)
                assert ((got >= edge[:-1]) & (got < edge[1:])).all(), f'{c}: {got}'
                continue
            assert got.tolist() == SegmentSampler(t, 'tvts')(n, 25., None, train=True, gen=Python(c['python_seed'])).tolist()
        elif c['mode'] == 'uniform': got = segments(n, t, rule='tvts')
        elif c['mode'] == 'fix':                                                   # clip k of as many as the smallest segment has frames
            got = segments(n, t, rule='tvts', clips=n//t).reshape(-1, t)[c['fix_start']]
        else: raise AssertionError(f'unknown mode {c["mode"]}')
        assert got.tolist() == c['indices'], f'{c}: {got}'


@kind('tvts', 'yt_clip_frames')
def yt_clip_frames(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, start, end = c['video_len_frames'], c['starts_s'][0], c['ends_s'][-1]
        fps, t = n/int(c['duration_s']), c['frames_per_transcript']*c['num_transcripts']
        span, first = int((end - start)*fps), max(int(start*fps), 0)
        got = first + segments(span, min(t, span), True, Python(c['python_seed']), 'tvts')
        if 'error' not in c: assert got.tolist() == c['indices'], f'{c}: {got}'
        if start >= 0 and end*fps < n and span >= t:                               # the sampler, by times, sees that span and at most two frames more
            ours = SegmentSampler(t, 'tvts')(n, fps, np.arange(n)/fps, start, end, True, Python(c['python_seed']))
            assert first <= ours.min() and ours.max() <= first + span + 1, f'{c}: {ours}'


@kind('tvts', 'ssv2_frame_indices')
def ssv2_frame_indices(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, t = c['video_len'], c['num_frames']
        if c['kind'] == 'train_or_val':
            got = segments(n, t, True, np.random.RandomState(c['numpy_seed']), 'floor_zero').tolist()
            assert got == c['indices'], f'{c}: {got}'
            if n >= t: assert got == segments(n, t, True, np.random.RandomState(c['numpy_seed']), 'floor').tolist()
        elif c['kind'] == 'test':
            by = segments(n, t, rule='floor', clips=2)
            assert sorted(by.tolist()) == c['indices_all'], f'{c}: {by}'
            for k, got in enumerate(by.reshape(2, t).tolist()):                    # the published reader knows two clips
                assert got == c[f'indices_view{k}'] == SegmentSampler(t, 'floor')(n, 25., None, clip=k, clips=2).tolist(), f'{c}: {got}'
        else: raise AssertionError(f'unknown kind {c["kind"]}')


@kind('tvts', 'pretrain_clip_transform')
def pretrain_clip_transform(case, tensors):
    from vidlab.data.transforms import ClipTransform, normalise, scaled
    cfg = case['config']
    size, frames = cfg['crop_size'], tensors['input/video_uint8_cthw'].permute(1, 2, 3, 0).contiguous().numpy()
    tfm = ClipTransform(size, 'crop', short=int(1.2*size), resize='pillow')
    assert np.array_equal(scaled(frames, 'pillow', tfm.short), tensors['output/resized_uint8_thwc'].numpy())
    clips = {'val': tfm(frames)}
    for i, c in enumerate(cfg['train']):
        draws = tfm.draw(*frames.shape[1:3], Python(c['python_random_seed']))
        assert draws[0]['box'][:2] == (c['x1'], c['y1']), f'{c}: {draws}'
        clips[f'train{i}'] = tfm.apply(frames, draws)
    assert {f'output/{k}' for k in clips} == {k for k in tensors if k.startswith('output/') and 'resized' not in k}
    for k, v in clips.items(): close(k, normalise(v, MEAN, STD).transpose(0, 1), tensors[f'output/{k}'], case['tolerance'])


class Torch:
    "torchvision's random draws, from torch's global generator, in the shape of a numpy Generator"
    def __init__(self, seed): import torch; self.torch, _ = torch, torch.manual_seed(seed)
    def random(self): return self.torch.rand(1).item()
    def uniform(self, a, b): return self.torch.empty(1).uniform_(a, b).item()
    def integers(self, n): return int(self.torch.randint(0, n, (1,)))


@kind('tvts', 'cc3m_image_transform')
def cc3m_image_transform(case, tensors):
    """The published chain works on floats and resizes twice in a test: the same steps and kernels here, unrounded. The
    transform of the package rounds to uint8 and resizes once: at most a level apart in training."""
    import torch
    from vidlab.data.transforms import ClipTransform, centred, normalise, resize, resized
    cfg, image = case['config'], tensors['input/image_uint8_hwc'].numpy()[None]
    x, res, mid = image.astype(np.float32)/255, cfg['input_res'], cfg['center_crop']
    norm = lambda v: normalise(torch.from_numpy(v[0].copy()).permute(2, 0, 1), MEAN, STD)
    for name, how in dict(noantialias='bilinear', antialias='fast').items():
        v = resize(x, *resized(*x.shape[1:3], mid), how, 'bilinear')
        l, t, r, b = centred(*v.shape[1:3], mid)
        close(name, norm(resize(v[:, t:b, l:r], res, res, how, 'bilinear')), tensors[f'output/val_{name}'], case['tolerance'])
    tfm, state = ClipTransform(res, 'rrc-s0-a0.5 flip', resize='opencv'), torch.get_rng_state()
    draws = tfm.draw(*x.shape[1:3], Torch(cfg['torch_seed']))
    torch.set_rng_state(state)
    v = x
    for o, d in zip(tfm.steps, draws): v = o.apply(v, tfm, **d)
    want = tensors['output/train_noantialias']
    close('train', norm(v), want, case['tolerance'])
    assert (normalise(tfm.apply(image, draws)[0], MEAN, STD) - want).abs().max() < 1/255/.22, 'train: more than a level apart'


@kind('tvts', 'ssv2_aug_params')
def ssv2_aug_params(case, tensors):
    from vidlab.data.transforms import SIGNED, ClipTransform, make_steps, rand_args
    assert case['cases']
    for c in case['cases']:
        if c['kind'] == 'random_resized_crop_box':
            gen = Crops(c['python_seed'])
            gen.scale, gen.ratio = c['scale'], c['ratio']
            l, t, r, b = ClipTransform(8, 'rrc-s0', resize='opencv').draw(c['height'], c['width'], gen)[0]['box']
            assert [t, l, b - t, r - l] == [c[k] for k in ('top', 'left', 'crop_h', 'crop_w')], f'{c}: {(l, t, r, b)}'
        elif c['kind'] == 'random_erasing_box':
            step, = make_steps(f"erase-p{c['prob']}")
            draw = step.draw(c['height'], c['width'], None, Python(c['python_seed']))
            want = [c[k] for k in ('left', 'top', 'right_exclusive', 'bottom_exclusive')]
            assert list(draw['box'] or [None]*4) == want and (draw['box'] is not None) == c['erased'], f'{c}: {draw}'
            frames = step.apply(np.zeros((3, c['height'], c['width'], 3), np.uint8), ClipTransform(8), **draw)
            assert bool((frames == frames[:1]).all()) == c['same_noise_every_frame'], c
        elif c['kind'] == 'randaugment_level':
            plus, minus = (np.array(rand_args(c['op'], c['level'], Sign(o)), float) for o in (0., 1.))
            signed = rand_args(c['op'], c['level'], Python(12345))
            if c.get('args_magnitude') is not None:
                close(c['op'], plus, c['args_magnitude'], case['tolerance']), close(c['op'], -minus, c['args_magnitude'], case['tolerance'])
            if c.get('args') is not None: close(c['op'], plus, c['args'], case['tolerance'])
            if c.get('python_seed_12345_signed') is not None: close(c['op'], list(signed), c['python_seed_12345_signed'], case['tolerance'])
            assert c['op'] in SIGNED or (plus == minus).all()
        else: raise AssertionError(f'unknown kind {c["kind"]}')


class Sign:
    "Says which sign"
    def __init__(self, v): self.v = v
    def random(self): return self.v


@kind('tvts', 'ssv2_eval_views')
def ssv2_eval_views(case, tensors):
    from vidlab.data.sample import SegmentSampler
    from vidlab.data.transforms import ClipTransform, normalise
    cfg, seen = case['config'], set()
    n, short, sampler = cfg['video_len'], cfg['short_side'], SegmentSampler(cfg['num_frames'], 'floor')
    views = {k.split('/')[1]: v.numpy() for k, v in tensors.items() if k.startswith('input/')}
    for name, want in tensors.items():
        if name.startswith('input/'): continue
        _, which, what = name.split('/')
        frames = views[which]
        assert len(frames) == n and list(frames.shape[1:3]) == list(cfg['sizes'][which])
        if what == 'val':                                                          # published: random frames
            idx = sampler(n, 25., None, train=True, gen=np.random.RandomState(cfg['numpy_seed']))
            got = ClipTransform(cfg['crop'], short=short, resize='opencv')(frames[idx])
        else:
            clip, crop = (int(o[1:]) for o in what.removeprefix('view_').split('_'))
            got = ClipTransform(short, short=short, resize='opencv')(frames[sampler(n, 25., None, clip=clip, clips=2)], crop=crop, crops=3)
        close(name, normalise(got, MEAN, STD).transpose(0, 1), want, case['tolerance'])
        seen.add(what)
    assert seen == {'val', *(f'view_t{t}_s{s}' for t in range(2) for s in range(3))}, seen


@kind('tvts', 'ssv2_train_aug')
def ssv2_train_aug(case, tensors):
    from vidlab.data.transforms import ClipTransform, normalise
    cfg, frames = case['config'], tensors['input/video_uint8_thwc'].numpy()
    tfm = ClipTransform(cfg['crop'], f"{cfg['aa']} rrc-s0 erase-p{cfg['reprob']}", resize='opencv')
    for i, seed in enumerate(cfg['seeds']):
        draws = tfm.draw(*frames.shape[1:3], Crops(seed))
        got, want = (v.clone() for v in (normalise(tfm.apply(frames, draws), MEAN, STD).transpose(0, 1), tensors[f'output/clip{i}']))
        if box := draws[-1]['box']:                                                # its noise is torch's: compared by its size alone
            l, t, r, b = box
            for v in (got, want):
                assert v[..., t:b, l:r].std() > .5
                v[..., t:b, l:r] = 0
        close(f'clip{i}', got, want, case['tolerance'])


@kind('tvts', 'mixup_video')
def mixup_video(case, tensors):
    "Outputs `as_run*` are those of the box in frames and rows; here boxes are always in rows and columns"
    from vidlab.data.transforms import draw_mix, mix_clips
    cfg, x, y = case['config'], tensors['input/video'].transpose(1, 2), tensors['input/label']
    opts = dict(mixup=cfg['mixup_alpha'], cutmix=cfg['cutmix_alpha'], prob=cfg.get('mix_prob', 1.), switch=cfg['switch_prob'])
    assert cfg['draws'] and [d['numpy_seed'] for d in cfg['draws']] == cfg['numpy_seeds']
    for i, d in enumerate(cfg['draws']):
        lam, box = draw_mix(*x.shape[-2:], np.random.RandomState(d['numpy_seed']), **opts)
        assert (box is not None) == d['cutmix'], d
        close('lam', lam, d['lam_corrected' if box else 'lam_drawn'], 1e-9)
        if box: assert [box[1], box[3], box[0], box[2]] == d['box_yl_yh_xl_xh'], f'{d}: {box}'
        v, t = mix_clips(x, y, cfg['num_classes'], np.random.RandomState(d['numpy_seed']), **opts, smoothing=cfg['label_smoothing'])
        close(f'fixed{i}/video', v.transpose(1, 2), tensors[f'output/fixed{i}/video'], case['tolerance'])
        close(f'fixed{i}/target', t, tensors[f'output/fixed{i}/target'], case['tolerance'])
