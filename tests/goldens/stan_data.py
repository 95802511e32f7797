"""Checks of the STAN data kinds: segments of frames, the geometry and pixels of its transforms, its token rows."""
import numpy as np

from goldens import close, kind, only


@kind('stan', 'frame_sampling')
def frame_sampling(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, t, clips = c['num_frames'], c['clip_len'], c.get('num_clips', 1)
        train = c['mode'] == 'train'
        gen = lambda: np.random.RandomState(c['numpy_seed']) if train else None
        got = segments(n, t, train, gen(), 'inclusive', clips)
        assert got.tolist() == c['frame_inds'], f'{c}: {got.tolist()}'
        if clips == 1: assert got.tolist() == SegmentSampler(t, 'inclusive')(n, 25., None, train=train, gen=gen()).tolist()
        if 'segments_inclusive' in c:
            lo, hi = np.array(c['segments_inclusive']).T
            draws = np.stack([segments(n, t, True, np.random.default_rng(i), 'inclusive') for i in range(64)])
            assert (draws >= lo).all() and (draws <= hi).all(), f'{c}: a draw outside its segment'
            for i in np.flatnonzero(hi - lo <= 3):                      # small segments: every frame is drawn
                assert set(draws[:, i]) == set(range(lo[i], hi[i] + 1)), f'{c}: segment {i} gives {set(draws[:, i])}'


@kind('stan', 'geometry')
def geometry(case, tensors):
    from vidlab.data.transforms import centred, crop_box, crop_sizes, resized
    only(case, 'resize', 'center_crop', 'random_resized_crop')
    for r in case.get('resize', []):
        got = resized(r['height'], r['width'], r['short_edge'], 'mmcv')
        assert got == (r['new_height'], r['new_width']), f'{r}: {got}'
    for r in case.get('center_crop', []):
        got = centred(r['height'], r['width'], r['crop'], 'mmcv')
        assert list(got) == r['box_left_top_right_bottom'], f'{r}: {got}'
    for r in case.get('random_resized_crop', []):
        h, w, want = r['height'], r['width'], r['box_left_top_right_bottom']
        sizes = crop_sizes(h, w, np.array(r['aspect_ratios']), np.array(r['area_fractions']))
        assert sizes.tolist() == r['candidate_wh'], f'{r}: {sizes.tolist()}'
        if r['first_fitting'] is None:
            assert list(crop_box(h, w, sizes, None)) == want, f'{r}: {crop_box(h, w, sizes, None)}'
            continue
        fits = [i for i, (a, b) in enumerate(sizes) if a <= w and b <= h]
        assert fits[0] == r['first_fitting'], f'{r}: {fits}'

        class Said:                                                     # the offsets of the published draw
            def __init__(self): self.at = iter(want[:2])
            def integers(self, n):
                at = next(self.at)
                assert 0 <= at < n, f'{r}: offset {at} is not below {n}'
                return at
        assert list(crop_box(h, w, sizes, Said())) == want, r


@kind('stan', 'pixels')
def pixels(case, tensors):
    import torch
    from vidlab.data.transforms import ClipTransform, normalise, resized
    cfg = case['config']
    frames = tensors['input/frames'].numpy()
    draw = dict(hw=resized(*frames.shape[1:3], cfg['short_edge'], 'mmcv'), box=cfg['train_crop_box'])
    mean, std = [[v/255 for v in cfg[k]] for k in ('mean', 'std')]
    for how, most in dict(bilinear=2, mmcv=0).items():                   # levels of 255; the one of the released code is the same to the bit
        tfm = ClipTransform(cfg['crop'], 'rrc-s%d' % cfg['short_edge'], cfg['short_edge'], how)
        for name, got in dict(val=tfm(frames), train=tfm.apply(frames, [draw])).items():
            want = tensors[f'output/{name}_uint8']
            assert got.shape == want.shape and got.dtype == torch.uint8
            off = (got.int() - want.int()).abs().max().item()
            assert off <= most, f'{how}, {name}: {off} levels of 255 off, allowed are {most}'
            close(f'{how}, {name}', normalise(got[None], mean, std), tensors[f'output/{name}_normalised'], case['tolerance'])


@kind('stan', 'tokens')
def tokens(case, tensors):
    from vidlab.data.text import CONTEXT, END, tokenize
    assert case['cases']
    for c in case['cases']:
        whole = tokenize(c['text'], CONTEXT)[0][0].tolist()
        assert whole == c['ids77'] + [0]*(CONTEXT - len(c['ids77'])), f"{c['text']!r}: {whole}"
        for k, want in c.items():
            if not k.startswith('length'): continue
            words = int(k.removeprefix('length'))
            ids, mask = (o[0] for o in tokenize(c['text'], words, 'official'))
            assert ids.tolist() == whole[:words] and mask.tolist() == [int(i < len(c['ids77'])) for i in range(words)]
            got = dict(nonzero=int((ids != 0).sum()), has_end_token=END in ids.tolist(), argmax=int(ids.argmax()))
            assert got == want, f"{c['text']!r}, {k}: {got}, expected {want}"
