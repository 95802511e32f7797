"""Checks of the CLIP4Clip data kinds: frame grids, the image transform, tokens."""
import numpy as np
import torch

from goldens import close, kind


@kind('clip4clip', 'frame_index')
def frame_index(case, tensors):
    from vidlab.data.sample import clip_times, frames_per_second, order_frames, slice_frames
    for r in case.get('extract', []):
        args = r['frame_count'], r['fps'], r['feature_framerate'], r['start'], r['end']
        try: got = frames_per_second(*args).tolist()
        except ValueError: got = 'ValueError'
        if isinstance(r['frames'], str): assert got == 'ValueError', f"{args}: the official code raises {r['frames']}, got {got}"
        else: assert got == r['frames'], f'{args}: {got}, expected {r["frames"]}'
    for r in case.get('slice', []):
        pos = slice_frames(r['n_extracted'], r['max_frames'], r['slice_framepos'])
        gen = np.random.RandomState(r['numpy_seed_before']) if 'numpy_seed_before' in r else None
        got = order_frames(pos, r['frame_order'], gen).tolist()
        assert got == r['indices'] and len(got) == r['n_valid'], f'{r}: got {got}'
    for r in case.get('clip_times', []):
        got = list(clip_times(r['start'], r['end']))
        assert got == r['clip'], f'{r}: got {got}'


@kind('clip4clip', 'preprocess')
def preprocess(case, tensors):
    from vidlab.data.transforms import normalise, square
    cfg, n = case['config'], 0
    for k, frame in tensors.items():
        if not k.startswith('input/'): continue
        got = normalise(square(frame.numpy()[None], cfg['n_px']), cfg['mean'], cfg['std'])[0]
        close(k, got, tensors[k.replace('input/', 'output/')], case['tolerance']); n += 1
    assert n, 'the case holds no frames'


@kind('clip4clip', 'tokenize')
def tokenize_rows(case, tensors):
    from vidlab.data.text import END, START, piece_ids, pieces, tokenize
    assert (START, END) == (case['sot'], case['eot'])
    assert case['rows']
    for r in case['rows']:
        got = piece_ids(r['caption'])
        assert got == r['token_ids'], f"{r['caption']!r}: {got}"
        if 'tokens' in r: assert pieces(got) == r['tokens'], f"{r['caption']!r}: {pieces(got)}"
        for k, want in r.items():
            if not k.startswith('max_words_'): continue
            words = int(k.rsplit('_', 1)[1])
            ids, mask = tokenize([r['caption']], words)
            n = want['n_valid']
            assert ids.shape == mask.shape == (1, words)
            assert ids[0].tolist() == want['ids'] + [0]*(words - n), f"{r['caption']!r}, {words} words: {ids[0].tolist()}"
            assert mask[0].tolist() == [1]*n + [0]*(words - n)
            assert int(ids[0].argmax()) == want['argmax_position']
