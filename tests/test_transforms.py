"""The clip transform: geometry, bilinear arithmetic and random crops against definitions, one draw for all frames of a clip."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vidlab.data.transforms import HOW, ClipTransform, centred, crop_box, crop_sizes, resize, resized, square

sides = st.integers(2, 90)


def noise(t, h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides)
def test_bilinear_is_the_rounded_definition(h, w, nh, nw):
    "torch in double precision, half-pixel centres, no antialias; torch's integer kernel rounds once more: one level"
    f = noise(2, h, w, h*w)
    x = torch.from_numpy(f).permute(0, 3, 1, 2).double()
    want = torch.nn.functional.interpolate(x, (nh, nw), mode='bilinear', align_corners=False, antialias=False).round()
    got = resize(f, nh, nw, 'bilinear')
    assert got.dtype == np.uint8 and got.shape == (2, nh, nw, 3)
    assert np.abs(got.astype(int) - want.permute(0, 2, 3, 1).numpy()).max() <= 1


@pytest.mark.parametrize('how', HOW)
@settings(max_examples=25, deadline=None)
@given(sides, sides, st.integers(1, 40), st.integers(0, 20))
def test_square_is_resize_then_centre(how, h, w, size, more):
    f = noise(2, h, w)
    if max(h, w) > 20*min(h, w): return
    nh, nw = resized(h, w, size + more, HOW[how][1])
    assert min(nh, nw) == size + more and abs(nh*w - nw*h) <= max(h, w)      # ratio kept within a pixel
    l, t, r, b = centred(nh, nw, size, HOW[how][1])
    assert (r - l, b - t) == (size, size) and l >= 0 and t >= 0 and r <= nw and b <= nh
    got = square(f, size, how, size + more)
    assert got.shape == (2, 3, size, size) and got.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), resize(f, nh, nw, how)[:, t:b, l:r])


def test_a_square_never_shares_memory_with_the_frames():
    f = noise(2, 32, 32)
    for how in HOW:
        square(f, 32, how).zero_()
        ClipTransform(32, 'rrc-s0-a1', resize=how)(f, True, np.random.default_rng(0)).zero_()
    assert np.array_equal(f, noise(2, 32, 32))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 10**6), st.floats(.01, 1))
def test_a_box_lies_in_the_frame_and_keeps_its_bounds(h, w, seed, least):
    gen = np.random.default_rng(seed)
    for _ in range(4):
        d, = ClipTransform(8, f'rrc-s0-a{least:.6f}').draw(h, w, gen)
        l, t, r, b = d['box']
        assert d['hw'] == (h, w) and 0 <= l < r <= w and 0 <= t < b <= h
        bw, bh = r - l, b - t
        if (l, t, r, b) == centred(h, w, min(h, w), 'mmcv'): continue        # none of ten fitted
        slack = .5/min(bw, bh)                                                # sides are rounded to pixels
        assert 3/4*(1 - slack)**2 - .01 <= bw/bh <= 4/3*(1 + slack)**2 + .01 + 1/bh
        assert bw*bh >= least*h*w - .5*(bw + bh) - .25


def first_fit(h, w, sizes, gen):
    "The published loop in words"
    for bw, bh in sizes:
        if bw <= w and bh <= h:
            l = gen.integers(0, w - bw + 1); t = gen.integers(0, h - bh + 1)
            return l, t, l + bw, t + bh
    s = min(h, w)
    return (w - s)//2, (h - s)//2, (w - s)//2 + s, (h - s)//2 + s


@settings(max_examples=100, deadline=None)
@given(st.integers(4, 300), st.integers(4, 300), st.integers(0, 10**6))
def test_the_first_candidate_that_fits(h, w, seed):
    gen = np.random.default_rng(seed)
    aspect, area = np.exp(gen.uniform(np.log(.3), np.log(3), 10)), gen.uniform(.3, 1.2, 10)
    sizes = crop_sizes(h, w, aspect, area)
    for (bw, bh), a, s in zip(sizes, aspect, area):
        assert abs(bw - (s*h*w*a)**.5) <= .5 + 1e-9 and abs(bh - (s*h*w/a)**.5) <= .5 + 1e-9
    assert crop_box(h, w, sizes, np.random.default_rng(seed)) == first_fit(h, w, sizes, np.random.default_rng(seed))


def test_distribution_of_the_draws():
    "On a frame where every candidate fits: area uniform, aspect log-uniform, corner uniform"
    tfm, gen = ClipTransform(8, 'rrc-s0-a0.08'), np.random.default_rng(0)
    h = w = 2000
    boxes = np.array([tfm.draw(h, w, gen)[0]['box'] for _ in range(4000)])
    bw, bh = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    small = bw*bh < .5*h*w                                                    # these always fit
    area, aspect = bw*bh/(h*w), np.log(bw/bh)/np.log(4/3)
    uniform = np.linspace(.1, .9, 9)
    assert np.abs(np.quantile(area[small], uniform) - (.08 + .42*uniform)).max() < .02
    assert np.abs(np.quantile(aspect[small], uniform) - (2*uniform - 1)).max() < .1
    assert np.abs(np.quantile(boxes[small, 0]/(w - bw)[small], uniform) - uniform).max() < .04


@pytest.mark.parametrize('how', HOW)
def test_one_draw_for_all_frames_and_a_pure_function(how):
    tfm, f = ClipTransform(24, 'rrc-s40', resize=how), noise(5, 50, 70)
    one = tfm(f, True, np.random.default_rng(3))
    assert torch.equal(one, tfm(f, True, np.random.default_rng(3)))
    assert not torch.equal(one, tfm(f, True, np.random.default_rng(4)))
    draw = tfm.draw(50, 70, np.random.default_rng(3))
    for t in range(5): assert torch.equal(one[t], tfm.apply(f[t:t+1], draw)[0])
    (nh, nw), (l, t, r, b) = draw[0]['hw'], draw[0]['box']
    want = resize(np.ascontiguousarray(resize(f, nh, nw, how)[:, t:b, l:r]), 24, 24, how)
    assert np.array_equal(one.permute(0, 2, 3, 1).numpy(), want)


def test_no_draw_outside_training():
    "A test neither needs nor moves a generator; nor does training without augmentation"
    f, gen = noise(2, 40, 60), np.random.default_rng(0)
    assert torch.equal(ClipTransform(24, 'rrc', 32)(f, False, gen), square(f, 24, 'official', 32))
    assert torch.equal(ClipTransform(24, resize='fast')(f, True, gen), square(f, 24, 'fast'))
    assert gen.random() == np.random.default_rng(0).random()
    with pytest.raises(ValueError, match='rrc.*generator'): ClipTransform(24, 'rrc')(f, True)
