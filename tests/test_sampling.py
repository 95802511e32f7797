"""Frame samplers against loops, the image transform against torchvision on any size, tokens on any text."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vidlab.data import sample as S
from vidlab.data.text import END, START, tokenize
from vidlab.data.transforms import square


def walk(n, fps, rate, start, end):
    "The published extractor in words: second by second, stop at the first frame that is not there"
    whole, out = int(fps), []
    total = (n + whole - 1)//whole
    first, last = (0, total) if start is None else (start, min(end, total))
    step = max(whole//rate, 1) if rate else 1
    for sec in range(first, last + 1):
        for j in range(rate or whole):
            i = sec*whole + j*step
            if i >= n: return out
            out.append(i)
    return out


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.floats(1, 61), st.integers(0, 5),
       st.one_of(st.none(), st.tuples(st.integers(0, 40), st.integers(1, 40))))
def test_grid(n, fps, rate, span):
    start, end = (None, None) if span is None else (span[0], span[0] + span[1])
    if rate > int(fps):
        with pytest.raises(ValueError, match='rate'): S.frames_per_second(n, fps, rate, start, end)
    else: assert S.frames_per_second(n, fps, rate, start, end).tolist() == walk(n, fps, rate, start, end)


@pytest.mark.parametrize('fps', [0, float('nan'), float('inf'), -3])
def test_bad_rate(fps):
    with pytest.raises(ValueError, match='fps'): S.GridSampler(4)(10, fps, np.arange(10.))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 99), st.one_of(st.none(), st.tuples(st.integers(0, 99), st.integers(1, 99))))
def test_slow_slides(n, percent, span):
    "Below a frame per second: the frames on screen at some whole second of the range, each once"
    start, end = (None, None) if span is None else (span[0], span[0] + span[1])
    fps = percent/100
    seconds = range(start or 0, (int(n/fps) + 1 if end is None else end) + 1)
    want = sorted({int(s*fps) for s in seconds if int(s*fps) < n})
    sampler = S.GridSampler(1000)
    if want: assert sampler(n, fps, None, start, end).tolist() == want
    else:
        with pytest.raises(ValueError, match='no frame lies'): sampler(n, fps, None, start, end)


def test_a_rate_of_nearly_nothing_costs_nothing():
    assert S.GridSampler(4)(10, 1e-12, None).tolist() == [0, 3, 6, 9]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 9))
def test_segments(n, t, seed):
    draw = S.segments(n, t, True, np.random.default_rng(seed))
    for idx in (S.segments(n, t), draw):
        assert idx.shape == (t,) and idx.dtype == np.int64 and (np.diff(idx) >= 0).all() and 0 <= idx[0] and idx[-1] < n
    assert all(i*n//t <= d <= max((i+1)*n//t - 1, i*n//t) for i, d in enumerate(draw))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 4), st.integers(0, 9))
def test_inclusive_segments(n, t, clips, seed):
    "STAN's rule in words: python rounds half to even too; the draws of a RandomState come in the order of the frames"
    seg, gen = (n - 1)/t, np.random.RandomState(seed)
    assert S.segments(n, t, rule='inclusive', clips=clips).tolist() == [
        round(seg*i) + int(seg/(clips + 1)*(c + 1)) for c in range(clips) for i in range(t)]
    want = [gen.randint(round(seg*i), round(seg*(i + 1)) + 1) for i in range(t)]
    assert S.segments(n, t, True, np.random.RandomState(seed), 'inclusive').tolist() == want
    idx = S.segments(n, t, True, np.random.default_rng(seed), 'inclusive')
    assert idx.dtype == np.int64 and (np.diff(idx) >= 0).all()
    assert all(round(seg*i) <= d <= round(seg*(i + 1)) for i, d in enumerate(idx))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(.005, 2), min_size=3, max_size=80), st.integers(1, 12))
def test_uneven_times(gaps, most):
    "On a varying frame rate: rising indices inside the video, each frame shown at or after its grid time (or the last)"
    times = np.concatenate([[0], np.cumsum(gaps)])
    n, fps = len(times), len(times)/(times[-1] + .1)
    plain, timed = [S.GridSampler(most, timed=o)(n, fps, times) for o in (False, True)]
    assert len(plain) == len(timed) <= most and (np.diff(timed) >= 0).all() and timed[-1] < n
    if not S.evenly_spaced(times): assert all(times[j] >= i/fps - 1.1e-3 or j == n - 1 for i, j in zip(plain, timed))


@pytest.mark.parametrize('rate', [3., 23.976, 25., 29.97, 59.94, 240.])
@pytest.mark.parametrize('stamp', [3, 6])
def test_even_times_are_the_index_grid(rate, stamp):
    "Rounded time stamps of a constant rate change nothing"
    n = int(rate*37)
    times = np.round(np.arange(n)/rate, stamp)
    for kw in (dict(), dict(start=3, end=9), dict(start=30)):
        timed, plain = [S.GridSampler(12, timed=o)(n, rate, times, **kw) for o in (True, False)]
        assert timed.tolist() == plain.tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(1, 48), st.integers(0, 3))
def test_square(h, w, size, seed):
    from PIL import Image
    from torchvision import transforms as T
    if max(h, w) > 64*min(h, w): return
    frame = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    want = T.Compose([T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size),
                      T.PILToTensor()])(Image.fromarray(frame))
    got = square(frame[None], size)[0]
    assert torch.equal(got, want)
    off = (square(frame[None], size, 'fast')[0].int() - want.int()).abs()    # of noise: it overshoots, and what is clamped between the two
    assert off.float().mean() <= 1                                           # passes of the kernels may put single pixels 20 levels apart


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.integers(2, 20))
def test_any_text(text, words):
    ids, mask = tokenize([text], words)
    n = int(mask.sum())
    assert ids.shape == (1, words) and ids[0, 0] == START and ids[0, n-1] == END
    assert not ids[0, n:].any() and mask[0, :n].all()
    assert torch.equal(tokenize([text], 77)[0][0, :n-1], ids[0, :n-1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(['a', 'dog', 'carrots,', 'supercalifragilistic', '!', '&', '3.14']), max_size=90), st.integers(2, 77))
def test_the_official_cut_is_a_slice(words, n):
    "77 ids with the end token, then the first n of them: equal to the other rule unless the text is longer"
    text = ' '.join(words)
    whole, ids = tokenize(text, 77)[0][0], tokenize(text, n, 'official')[0][0]
    assert torch.equal(ids, whole[:n])
    if END in ids: assert torch.equal(ids, tokenize(text, n)[0][0])
    else: assert ids.argmax() == 0 and tokenize(text, n)[0][0].argmax() == n - 1


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
def test_something_and_kinetics_segments(n, t, clips, seed):
    "TDS-CLIP's two loaders in words; a RandomState gives the published draws of the first"
    assert S.segments(n, t, rule='something', clips=clips).tolist() == S.segments(n, t, rule='inclusive', clips=clips).tolist()
    gen, got = np.random.RandomState(seed), S.segments(n, t, True, np.random.RandomState(seed), 'something').tolist()
    ticks = [i*n//t for i in range(t + 1)]
    if n > t: assert got == [a + gen.randint(b - a) for a, b in zip(ticks, ticks[1:])]
    else: assert got == sorted(list(range(n)) + list(gen.randint(n, size=t - n))) and set(got) == set(range(n))
    test = S.segments(n, t, rule='kinetics', clips=clips).reshape(clips, t)
    first = np.floor(np.linspace(0, n/t - 1, clips))
    assert test.tolist() == [[int(s + i*(n/t)) % n for i in range(t)] for s in first]
    if n >= t: assert (np.diff(test, axis=1) >= 0).all() and test[0].tolist() == [int(i*(n/t)) for i in range(t)]
    assert S.segments(n, t, True, np.random.default_rng(seed), 'kinetics').tolist() == S.segments(n, t, True, np.random.default_rng(seed), 'inclusive').tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 120), st.integers(1, 5), st.integers(0, 9), st.sampled_from(S.SHORT))
def test_dense_windows(n, t, more, clips, seed, short):
    window, step = t + more, (t + more)//t
    def walk(s):
        out = [s]
        while len(out) < t: out.append((out[-1] + step) % n if short == 'loop' else out[-1] + step if out[-1] + step < n else out[-1])
        return out
    starts = [k*(max(n - window, 0)//(clips - 1)) for k in range(clips)] if clips > 1 else [max(n - window, 0)//2]
    assert S.dense(n, t, window, short=short, clips=clips).tolist() == [i for s in starts for i in walk(s)]
    draw = S.dense(n, t, window, True, np.random.default_rng(seed), short)
    if n > window: assert (np.diff(draw) == step).all() and 0 <= draw[0] <= n - window
    else: assert draw.tolist() == walk(0)


@pytest.mark.parametrize('rule', S.WINDOWS)
def test_random_windows_reach_both_ends(rule):
    "Every place is drawn, the last one too; the published draw, of a RandomState, leaves it out"
    first = lambda gen: {int(S.dense(20, 4, 16, True, gen(i), rule=rule)[0]) for i in range(200)}
    assert first(np.random.default_rng) == {0, 1, 2, 3, 4} and first(np.random.RandomState) == {0, 1, 2, 3}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([3, 5, 7, 9, 13]), st.booleans(), st.integers(0, 9))
def test_windows_around_short_videos(n, t, m, wrap, seed):
    "Of one frame and few, with more neighbours than frames: numbers of frames there are"
    for train in (False, True):
        for sampler in (S.SegmentSampler(t, neighbours=m, wrap=wrap), S.DenseSampler(t, 8, neighbours=m, wrap=wrap)):
            idx = sampler(n, 25., np.arange(n)/25, train=train, gen=np.random.default_rng(seed))
            assert len(idx) == t*m and 0 <= idx.min() and idx.max() < n
            if wrap: assert (np.diff(idx.reshape(t, m)) % n <= 1).all() or n == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 59), min_size=1, max_size=9), st.integers(0, 4))
def test_neighbours(n, at, half):
    at, m = [i % n for i in at], 2*half + 1
    got = S.neighbours(at, n, m)
    assert got.tolist() == [min(max(i + k, 0), n - 1) for i in at for k in range(-half, half + 1)]
    assert got.reshape(-1, m)[:, half].tolist() == at
    if half > n: return
    assert S.neighbours(at, n, m, wrap=True).tolist() == [list(range(n))[min(i + k, n - 1)] for i in at for k in range(-half, half + 1)]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
def test_floor_and_tvts_segments(n, t, clips, seed):
    "VideoMAE's family and TVTS in words; all rules give the same draws where their segments agree"
    wide, tick, draw = n//t, n/t, lambda rule: S.segments(n, t, True, np.random.RandomState(seed), rule)
    for rule in ('floor', 'floor_zero', 'floor_folder'):
        test = S.segments(n, t, rule=rule, clips=clips)
        if clips > 1: assert np.sort(test).tolist() == sorted(int(c*tick/clips + tick*i) for c in range(clips) for i in range(t))
        if wide: assert draw(rule).tolist() == (np.arange(t)*wide + np.random.RandomState(seed).randint(wide, size=t)).tolist()
    assert S.segments(n, t, rule='floor').tolist() == [int(tick/2 + tick*i) for i in range(t)]
    if not wide:
        front = [0]*(t - n) + list(range(n))
        assert draw('floor').tolist() == [i*n//t for i in range(t)] and not draw('floor_zero').any()
        assert draw('floor_folder').tolist() == S.segments(n, t, rule='floor_folder').tolist() == front
    edge = [int(i) for i in np.linspace(0, n, t + 1)]
    for rule in S.RULES:
        for idx in (draw(rule), *S.segments(n, t, rule=rule, clips=clips).reshape(clips, t)):
            assert idx.dtype == np.int64 and len(idx) == t and 0 <= idx.min() and idx.max() < n
    assert all(a <= i <= max(b - 2, a) for i, a, b in zip(draw('tvts'), edge, edge[1:]))
    assert S.segments(n, t, rule='tvts').tolist() == [(a + max(b - 1, a))//2 for a, b in zip(edge, edge[1:])]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_windows_from_end_to_end(n, t, step, clips, seed):
    "VideoMamba's dense loader in words"
    window = t*step
    def held(idx): return (list(idx) + [idx[-1]]*t)[:t]
    want = [held(range(s, min(s + window, n), step)) for s in (int(c*max((n - window)/(clips - 1), 0)) for c in range(clips))] if clips > 1 else None
    if want: assert S.dense(n, t, window, clips=clips, rule='ends').reshape(clips, t).tolist() == want
    one, draw = S.dense(n, t, window, rule='ends'), S.dense(n, t, window, True, np.random.RandomState(seed), rule='ends')
    if n > window:
        end = np.random.RandomState(seed).randint(window, n)
        assert draw.tolist() == np.clip(np.linspace(end - window, end, t), end - window, end - 1).astype(int).tolist()
        assert abs(int(one[0]) + int(one[-1]) - (n - 1)) <= step + 1 or t == 1
    else:
        m = n//step
        want = np.clip(np.concatenate([np.linspace(0, n, m), np.ones(t - m)*n]), 0, n - 1).astype(int).tolist()
        assert draw.tolist() == one.tolist() == want


@settings(max_examples=150, deadline=None)
@given(st.floats(.1, 2000), st.floats(.5, 90), st.floats(.5, 60))
def test_trimmed_windows(duration, trimmed, stride):
    got = S.windows(duration, trimmed, stride)
    assert got and got[0][0] == 0
    for i, (a, b) in enumerate(got): assert a == i*stride and a < b <= duration + 1e-9 and (b - a >= trimmed/2 - 1e-6 or len(got) == 1)
    if duration < trimmed: assert got == [(0, duration)]
    elif stride <= trimmed/2: assert got[-1][1] > duration - 1 - stride


def test_a_range_holds_the_frames_on_screen():
    "From the frame that the start falls on to the one that is shown at the end"
    s, times = S.SegmentSampler(3), np.arange(300)/29.97
    for start, end in [(0, 5), (2.5, 3), (1/29.97, 9), (9.9, 99)]:
        i, j = S._window(times, 300, start, end)
        assert i == int(start*29.97 + 1e-6) and j == min(int(end*29.97 + 1e-6), 299) + 1
        assert i <= s(300, 29.97, times, start, end).min()
    assert S._window(times, 300, None, 1.) == (0, 30) and S._window(times, 300, 9.99, None)[1] == 300
    for bad in [(10.1, 12), (-3, -1)]:
        with pytest.raises(ValueError, match='no frame lies within'): S._window(times, 300, *bad)


@pytest.mark.parametrize('sampler', [S.SegmentSampler(5, 'kinetics'), S.SegmentSampler(5, 'something', 3), S.DenseSampler(5, 20, neighbours=5), S.DenseSampler(4, 64, 'hold'), S.SegmentSampler(5, 'floor', 3), S.SegmentSampler(5, 'tvts'),
                                     S.DenseSampler(4, 32, rule='ends')])
def test_clips_of_a_sampler(sampler):
    "Clip k of K from the middle of a video: within the range, as the function says, the same length for any video"
    times = np.arange(200)/25
    for n, i, j in ((200, 0, 200), (200, 50, 75), (200, 50, 53)):
        span = {} if (i, j) == (0, n) else dict(start=times[i], end=times[j - 1])
        for clips in (1, 2, 3):
            for k in range(clips):
                idx = sampler(n, 25., times, clip=k, clips=clips, **span)
                assert len(idx) == sampler.max_frames and i <= idx.min() and idx.max() < j
                inner = type(sampler)(**{**vars(sampler), 'neighbours': 1})(j - i, 25., None, clip=k, clips=clips) + i
                assert idx.reshape(-1, sampler.neighbours)[:, sampler.neighbours//2].tolist() == inner.tolist()
