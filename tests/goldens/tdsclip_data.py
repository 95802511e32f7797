"""Checks of the TDS-CLIP data kinds: frame indices, neighbour windows, lists, transforms, RandAugment, views, mixup."""
import random, tempfile
from pathlib import Path

import numpy as np

from goldens import close, kind


class Python:
    "The published random draws, from Python's and numpy's global generators, in the shape of a numpy Generator"
    def __init__(self, seed): self.py, self.np = random.Random(seed), np.random.RandomState(seed % 2**32)
    def random(self): return self.py.random()
    def uniform(self, a, b): return self.py.uniform(a, b)
    def normal(self, m, s): return self.py.gauss(m, s)
    def beta(self, a, b): return self.np.beta(a, b)
    def integers(self, lo, hi=None, size=None):
        lo, hi = (0, lo) if hi is None else (lo, hi)
        if size is not None: return self.np.choice(np.arange(lo, hi), size)
        one = lambda a, b: self.py.randint(int(a), int(b) - 1)
        return one(lo, hi) if np.ndim(lo) == np.ndim(hi) == 0 else np.array([one(a, b) for a, b in zip(lo, hi)])


@kind('tdsclip', 'sampling')
def sampling(case, tensors):
    from vidlab.data.sample import DenseSampler, SegmentSampler, dense, segments
    window, base = case['config']['sample_range'], case['config']['index_bias']
    assert case['cases']
    for c in case['cases']:
        n, t, clips, rule = c['frames'], c['segments'], c.get('clips', 1), c['family']
        gen = (lambda s: Python(s)) if rule == 'kinetics' and not c['dense'] else np.random.RandomState
        if c['dense']:
            train = c['mode'] != 'test'                       # the published validation draws its window too
            draws = [(gen(c['seed']) if train else None, c['indices'])]
            take = lambda g: dense(n, t, window, train, g, clips=clips)
            one = DenseSampler(t, window)
        else:
            train = c['mode'] == 'train'
            draws = [(gen(d['seed']), d['indices']) for d in c['draws']] if train else [(None, c['indices'])]
            take = lambda g: segments(n, t, train, g, rule, clips)
            one = SegmentSampler(t, rule)
        for g, want in draws:
            got = (take(g) + base).tolist()
            assert got == want, f'{c}: {got}'
        if not train:
            by_clip = [one(n, 25., None, clip=k, clips=clips) + base for k in range(clips)]
            assert np.concatenate(by_clip).tolist() == c['indices'], f'{c}: the sampler gives {by_clip}'
        if 'observed_min' in c:                               # 300 published draws stay within ours, ours within the support
            ours = np.stack([take(np.random.default_rng(i)) for i in range(400)]) + base
            assert (ours.min(0) <= c['observed_min']).all() and (ours.max(0) >= c['observed_max']).all(), c
            if 'allowed_min' in c:
                assert (ours >= c['allowed_min']).all() and (ours <= c['allowed_max']).all(), f'{c}: a draw outside its segment'


@kind('tdsclip', 'neighbour_window')
def neighbour_window(case, tensors):
    from vidlab.data.sample import neighbours
    assert case['cases']
    for c in case['cases']:
        n, i, m = c['frames'], c['index'] - 1, c['num_diff']
        got = (neighbours([i], n, m) + 1).tolist()
        assert got == c['frame_files'], f'{c}: {got}'
        if c['decord_frames'] is not None:                    # the published order at the start of a video file
            got = neighbours([i], n, m, wrap=True).tolist()
            assert got == c['decord_frames'], f'{c}: {got}'
            continue
        try: got = neighbours([i], n, m, wrap=True)
        except ValueError: continue
        raise AssertionError(f'{c}: {got}, expected an error')
