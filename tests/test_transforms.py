"""The clip transform: geometry, arithmetic and words against definitions, PIL, torchvision and timm, one draw for all frames of a clip; mixing."""
import random, time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vidlab.data.transforms import (HOW, ClipTransform, centred, crop_box, crop_sizes, draw_mix, mix_clips, resize, resized, square,
                                    view_boxes)

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
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 10**6), st.floats(.01, 1), st.sampled_from(['bilinear', 'fast', 'mmcv', 'opencv']))
def test_a_box_lies_in_the_frame_and_keeps_its_bounds(h, w, seed, least, how):
    gen = np.random.default_rng(seed)
    for _ in range(4):
        d, = ClipTransform(8, f'rrc-s0-a{least:.6f}', resize=how).draw(h, w, gen)
        l, t, r, b = d['box']
        assert d['hw'] == (h, w) and 0 <= l < r <= w and 0 <= t < b <= h
        bw, bh = r - l, b - t
        if (l, t, r, b) == crop_box(h, w, [], None, HOW[how][1]): continue    # none of ten fitted
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


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 200), st.integers(8, 800), st.integers(0, 10**6), st.sampled_from([.08, .5]))
def test_random_resized_crop_is_torchvisions(h, w, seed, least):
    "The same box from the same draws, also where none of ten fits"
    from torchvision.transforms import RandomResizedCrop

    class Torch:
        def uniform(self, a, b): return torch.empty(1).uniform_(a, b).item()
        def integers(self, n): return int(torch.randint(0, n, (1,)))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        i, j, bh, bw = RandomResizedCrop.get_params(torch.empty(3, h, w), (least, 1.), (3/4, 4/3))
        torch.manual_seed(seed)
        l, t, r, b = ClipTransform(8, f'rrc-s0-a{least}').draw(h, w, Torch())[0]['box']
    assert max(abs(t - i), abs(l - j), abs(b - t - bh), abs(r - l - bw)) <= (0 if (bh, bw) == (b - t, r - l) else 1)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(4, 40), st.integers(0, 10**6))
def test_crop_at_a_random_place(h, w, size, seed):
    if max(h, w) > 20*min(h, w): return
    tfm, f = ClipTransform(size, 'crop', short=size + 7, resize='pillow'), noise(1, h, w)
    (d,), (nh, nw) = tfm.draw(h, w, np.random.default_rng(seed)), resized(h, w, size + 7)
    l, t, r, b = d['box']
    assert d['hw'] == (nh, nw) and 0 <= l <= nw - size == nw - (r - l) and 0 <= t <= nh - size == nh - (b - t)
    assert np.array_equal(tfm.apply(f, [d])[0].permute(1, 2, 0), resize(f, nh, nw, 'pillow')[0, t:b, l:r])


def test_opencv_is_its_integer_arithmetic():
    "OpenCV's INTER_LINEAR for bytes, pixel by pixel"
    def taps(n, m, i, ends):
        at = np.float32((i + .5)*(n/m) - .5)
        k = int(np.floor(at)); f = np.float32(at - k)
        if ends and not 0 <= k < n - 1: f = np.float32(0)
        return max(k, 0), max(min(k + 1, n - 1), 0), round(float((np.float32(1) - f)*2048)), round(float(f*2048))
    for seed, (h, w, nh, nw) in enumerate([(7, 9, 4, 5), (5, 4, 9, 11), (1, 6, 3, 3), (12, 2, 5, 7), (6, 8, 3, 4), (31, 40, 14, 18)]):
        f = noise(2, h, w, seed)
        got, x = resize(f, nh, nw, 'opencv'), f[1, ..., 2].astype(int)
        for i in range(nh):
            for j in range(nw):
                top, bottom, b0, b1 = taps(h, nh, i, False)
                left, right, a0, a1 = taps(w, nw, j, True)
                rows = [(x[r, left]*a0 + x[r, right]*a1) >> 4 for r in (min(top, h - 1), bottom)]
                assert got[1, i, j, 2] == ((b0*rows[0] >> 16) + (b1*rows[1] >> 16) + 2) >> 2


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 90)]*4, st.integers(0, 10**6), st.booleans())
def test_opencv_is_opencv(h, w, nh, nw, seed, cut):
    cv2 = pytest.importorskip('cv2')
    f = noise(2, h + 3, w + 2, seed)[:, 1:h+1, 2:] if cut else noise(2, h, w, seed)          # a cut is not contiguous
    got = resize(f, nh, nw, 'mmcv')
    for a, b in zip(got, f): assert np.array_equal(a, cv2.resize(np.ascontiguousarray(b), (nw, nh), interpolation=cv2.INTER_LINEAR).reshape(nh, nw, 3))


def test_opencv_on_large_frames():
    "Numbers of OpenCV 4.10, of a frame that shrinks so far that rows are left out, and of one that grows"
    y, x = np.mgrid[:1080, :1920]
    f = np.stack([(x*7 + y*13) % 256, (x*y) % 251, (x//3 + y//5) % 256], -1).astype(np.uint8)[None]
    got = [resize(f[:, :h, :w], nh, nw, 'mmcv')[0].astype(np.int64) for h, w, nh, nw in ((1080, 1920, 256, 455), (240, 320, 224, 299), (31, 17, 224, 123))]
    assert [[int((v*np.arange(1, v.size + 1).reshape(v.shape) % 65521).sum()) for v in got], [v[-1, -2].tolist() for v in got]] == CV2


CV2 = [[11426971762, 6560291186, 2557892028], [[6, 150, 84], [212, 199, 153], [246, 229, 11]]]


def test_stan_as_released():
    "mmcv's rounding with OpenCV's integers, in a test and in training crops; at most a level or two from one rounding in floats"
    f = noise(3, 61, 83)
    new, old = (ClipTransform(24, 'rrc-s32', 32, how) for how in ('mmcv', 'bilinear'))
    draw = new.draw(61, 83, np.random.default_rng(5))
    assert draw == old.draw(61, 83, np.random.default_rng(5)) and draw[0]['hw'] == (32, 44)
    l, t, r, b = draw[0]['box']
    assert np.array_equal(new.apply(f, draw).permute(0, 2, 3, 1), resize(resize(f, 32, 44, 'opencv')[:, t:b, l:r], 24, 24, 'opencv'))
    for a, b in ((new(f), old(f)), (new.apply(f, draw), old.apply(f, draw))): assert 0 < (a.int() - b.int()).abs().max() <= 2


def test_opencv_is_not_slow():
    "Less than half of the time it took with a gather of pixels and new memory for every operation"
    from vidlab.data.transforms import _taps
    def plain(frames, h, w):
        (left, right), a = _taps(frames.shape[2], w, True)
        (top, bottom), b = _taps(frames.shape[1], h, False)
        for f in frames:
            rows = (f[:, left]*a[0] + f[:, right]*a[1]) >> 4
            yield (((rows[top]*b[0][..., None] >> 16) + (rows[bottom]*b[1][..., None] >> 16) + 2) >> 2).astype(np.uint8)
    def cpu(g):
        s = time.process_time()
        g()
        return time.process_time() - s
    f, times = noise(8, 540, 960), []
    assert np.array_equal(np.stack(list(plain(f, 256, 455))), resize(f, 256, 455, 'mmcv'))
    for _ in range(5): times.append((cpu(lambda: list(plain(f, 256, 455))), cpu(lambda: resize(f, 256, 455, 'mmcv'))))
    assert min(b for _, b in times) < .7*min(a for a, _ in times), times


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 90), st.integers(0, 60), st.booleans(), st.integers(2, 5))
def test_views_along_the_longer_side(size, more, tall, crops):
    long = size + more
    got = view_boxes(*((long, size) if tall else (size, long)), size, crops, 'slowfast')
    want = [int(k*((long - size)/(crops - 1))) for k in range(crops)]
    assert [o[1 if tall else 0] for o in got] == want and want[-1] == more and all(o[0 if tall else 1] == 0 and not o[4] for o in got)


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
    want = resize(np.ascontiguousarray(resize(f, nh, nw, how)[:, t:b, l:r]), 24, 24, 'bilinear' if how == 'opencv' else how)
    assert np.array_equal(one.permute(0, 2, 3, 1).numpy(), want)


def test_no_draw_outside_training():
    "A test neither needs nor moves a generator; nor does training without augmentation"
    f, gen = noise(2, 40, 60), np.random.default_rng(0)
    assert torch.equal(ClipTransform(24, 'rrc', 32)(f, False, gen), square(f, 24, 'official', 32))
    assert torch.equal(ClipTransform(24, resize='fast')(f, True, gen), square(f, 24, 'fast'))
    assert gen.random() == np.random.default_rng(0).random()
    with pytest.raises(ValueError, match='rrc.*generator'): ClipTransform(24, 'rrc')(f, True)


# ---- words ----------------------------------------------------------------------------------------------------------

class Python:
    "Draws from Python's generator (choices of operations: numpy's), as timm and the published loops take them"
    def __init__(self, seed): self.py, self.np = random.Random(seed), np.random.RandomState(seed)
    def random(self): return self.py.random()
    def uniform(self, a, b): return self.py.uniform(a, b)
    def normal(self, m, s): return self.py.gauss(m, s)
    def integers(self, n, size=None): return self.np.randint(n, size=size) if size is not None else self.py.randrange(n)


@pytest.fixture
def globals_kept():
    "timm draws from the global generators: seed them here, and put them back"
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0]); np.random.set_state(state[1]); torch.set_rng_state(state[2])


WORDS = ['rrc', 'rrc-s0-a0.4', 'sized', 'msc', 'flip', 'grey-p0.5', 'erase-p0.7', 'rand-m7-n4-mstd0.5-inc1', 'rand-m9-n2-p1', 'scale sized flip', 'flip msc',
         'rand-m7-n4-mstd0.5-inc1 scale sized flip grey erase-p1', 'scale', 'centre flip', 'crop flip', 'rand-m5-n2 rrc-s0 erase', 'rand-m5-kernel=bilinear jitter-f0.8 erase-p1-k3-fill=const']


@pytest.mark.parametrize('word', WORDS)
@pytest.mark.parametrize('how', HOW)
def test_each_word_is_one_draw_for_all_frames(word, how):
    "Pure function of generator and frames; equal frames stay equal (but for erased noise); the frames given are not touched"
    tfm = ClipTransform(24, word, resize=how, stretch=(30, 40))
    f = noise(1, 50, 70).repeat(3, 0)
    kept = f.copy()
    for seed in range(4):
        one = tfm(f, True, np.random.default_rng(seed))
        assert one.shape == (3, 3, 24, 24) and one.dtype == torch.uint8 and torch.equal(one, tfm(f, True, np.random.default_rng(seed)))
        draws = tfm.draw(50, 70, np.random.default_rng(seed))
        if not any(d.get('box') and 'seed' in d for d in draws): assert (one == one[:1]).all()
        one.zero_()
        assert np.array_equal(f, kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 300), st.integers(4, 300), st.integers(0, 10**6), st.integers(4, 40))
def test_sized_crop_is_the_published_loop(h, w, seed, size):
    from vidlab.data.transforms import RandomSizedCrop
    py, d = random.Random(seed), RandomSizedCrop().draw(h, w, ClipTransform(size), Python(seed))
    for _ in range(10):
        area, aspect = py.uniform(.08, 1)*h*w, py.uniform(3/4, 4/3)
        bw, bh = int(round((area*aspect)**.5)), int(round((area/aspect)**.5))
        if py.random() < .5: bw, bh = bh, bw
        if bw <= w and bh <= h:
            want = (h, w), (py.randint(0, w - bw), py.randint(0, h - bh))
            break
    else:
        nh, nw = resized(h, w, size)
        bw = bh = size
        want = (nh, nw), (py.randint(0, nw - size), py.randint(0, nh - size))
    assert (d['hw'], d['box'][:2]) == want and (d['box'][2] - d['box'][0], d['box'][3] - d['box'][1]) == (bw, bh)


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 200), st.integers(6, 200), st.integers(4, 60), st.integers(0, 10**6), st.integers(0, 3))
def test_multi_scale_crop(h, w, size, seed, most):
    "Every box comes from the published list of sizes and places"
    d = ClipTransform(size, f'msc-d{most}').draw(h, w, np.random.default_rng(seed))[0]
    l, t, r, b = d['box']
    near = [size if abs(int(min(h, w)*s) - size) < 3 and size <= min(h, w) else int(min(h, w)*s) for s in (1, .875, .75, .66)]
    pairs = {(near[i], near[j]) for i in range(4) for j in range(4) if abs(i - j) <= most}
    assert (r - l, b - t) in pairs and 0 <= l < r <= w and 0 <= t < b <= h
    x, y = (w - (r - l))//4, (h - (b - t))//4
    places = {(i*x, j*y) for i in range(0, 5, 2) for j in range(0, 5, 2)} | {(i*x, j*y) for i in (1, 3) for j in (1, 3)}
    assert (l, t) in places and len(places) <= 13


def test_every_scale_and_place_of_a_multi_scale_crop_is_drawn():
    gen, tfm = np.random.default_rng(0), ClipTransform(100, 'msc')
    d = [tfm.draw(400, 800, gen)[0]['box'] for _ in range(2000)]
    assert len({(r - l, b - t) for l, t, r, b in d}) == 10 and len(set(d)) == 8*13 + 2*5        # as high as the frame: five places


@pytest.mark.parametrize('word,kernel', [('rrc-s0', 'BICUBIC'), ('sized', 'BILINEAR'), ('msc', 'BILINEAR')])
def test_crops_are_torchvisions_resized_crop(word, kernel):
    from PIL import Image
    from torchvision.transforms.functional import InterpolationMode, resized_crop
    f, tfm = noise(2, 60, 90), ClipTransform(32, word, resize='official')
    for seed in range(5):
        draw = tfm.draw(60, 90, np.random.default_rng(seed))
        l, t, r, b = draw[0]['box']
        want = resized_crop(Image.fromarray(f[1]), t, l, b - t, r - l, [32, 32], InterpolationMode[kernel])
        assert np.array_equal(tfm.apply(f, draw)[1].permute(1, 2, 0).numpy(), np.array(want))


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 60), st.integers(0, 9), st.integers(0, 9))
def test_five_and_ten_crops_are_torchvisions(size, x, y):
    from torchvision.transforms.functional import five_crop
    h, w = size + 4*y, size + 4*x                                    # where quarters are whole pixels
    f = torch.from_numpy(noise(1, h, w)).permute(0, 3, 1, 2)
    want = five_crop(f, [size, size])
    got = [f[..., t:b, l:r].flip(-1) if m else f[..., t:b, l:r] for l, t, r, b, m in view_boxes(h, w, size, 10)]
    for i in range(5): assert torch.equal(got[2*i], want[i]) and torch.equal(got[2*i + 1], want[i].flip(-1))
    assert [o[:4] for o in view_boxes(h, w, size, 5)] == [o[:4] for o in view_boxes(h, w, size, 10)[::2]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10), st.integers(1, 5), st.sampled_from(['', '-mstd0.5', '-mstd101', '-mstd1.5']), st.sampled_from(['', '-inc1', '-inc0']),
       st.sampled_from(['', '-p1', '-p0.3']), st.sampled_from(['', '-mmax12']), st.integers(0, 10**6))
def test_randaugment_is_timms(m, n, mstd, inc, p, mmax, seed):
    "Same string, same choices, same pixels"
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform
    from vidlab.data.transforms import make_steps
    word, state = f'rand-m{m}-n{n}{mstd}{inc}{p}{mmax}', (random.getstate(), np.random.get_state())
    f = noise(2, 24, 30, seed % 7)
    try:
        random.seed(seed); np.random.seed(seed)
        want = rand_augment_transform(word, dict(img_mean=(128,)*3, interpolation=Image.Resampling.BICUBIC))(Image.fromarray(f[1]))
    except ValueError as e:                                          # newer PIL: posterize keeps at least one bit
        assert 'bits' in str(e)
        want = None
    finally: random.setstate(state[0]); np.random.set_state(state[1])
    step, = make_steps(word)
    draw = step.draw(24, 30, None, Python(seed))
    if want is None: assert any(o[0].startswith('Posterize') and o[1] == 0 for o in draw['ops']) and step.apply(f, None, **draw).shape == f.shape
    else: assert np.array_equal(step.apply(f, None, **draw)[1], np.array(want))


def test_erasing_is_timms_box(globals_kept):
    from timm.data.random_erasing import RandomErasing
    from vidlab.data.transforms import Erase
    hit = 0
    for seed in range(60):
        random.seed(seed)
        img = torch.ones(3, 40, 50)
        RandomErasing(.5, mode='const', max_count=1, device='cpu')._erase(img, 3, 40, 50, img.dtype)
        box = Erase(.5).draw(40, 50, None, Python(seed))['box']
        want = (img[0] == 0).nonzero()
        assert (box is None) == (not len(want))
        if box: hit += 1; assert [box[1], box[0], box[3] - 1, box[2] - 1] == [*want.amin(0).tolist(), *want.amax(0).tolist()]
    assert 10 < hit < 50


def test_erased_noise_is_new_in_each_pixel_and_frame():
    f = np.full((4, 60, 80, 3), 7, np.uint8)
    out = ClipTransform(60, 'erase-p1-l0.3', resize='fast')(f, True, np.random.default_rng(1)).permute(0, 2, 3, 1).numpy()
    gone = (out != 7).all(-1).any(0)
    v = out[:, gone].astype(float)
    assert (out[:, ~gone] == 7).all() and abs(v.mean() - 115) < 8 and len(np.unique(v[:, :40], axis=0)) == 4
    assert np.abs(np.corrcoef(v.reshape(4, -1)) - np.eye(4)).max() < .1


def test_several_erased_boxes_are_timms(globals_kept):
    from timm.data.random_erasing import RandomErasing
    from vidlab.data.transforms import Erase
    class Drawn(Python): # timm draws 1..k
        def integers(self, n, size=None): return self.py.randint(1, n) - 1 if n == 3 else super().integers(n, size)
    several = 0
    for seed in range(60):
        random.seed(seed)
        img = torch.ones(3, 40, 50)
        RandomErasing(.8, mode='const', max_count=3, device='cpu')._erase(img, 3, 40, 50, img.dtype)
        ours, d = torch.ones(40, 50), Erase(.8, k=3).draw(40, 50, None, Drawn(seed))
        boxes = [b for b in (d['box'], *d.get('more', ())) if b]
        for l, t, r, b in boxes: ours[t:b, l:r] = 0
        assert torch.equal(ours, img[0])
        several += len(boxes) > 1
    assert several > 10


def test_erased_boxes_have_the_pixels_of_the_model():
    "Noise, one colour for each frame, or the mean, about the mean of the model's pixels and not of CLIP's"
    f = np.full((4, 60, 60, 3), 7, np.uint8)
    cut = lambda fill: ClipTransform(60, f'erase-p1-l0.3-fill={fill}', mean=(.2, .5, .8), std=(.01, .01, .01))(f, True, np.random.default_rng(1)).permute(0, 2, 3, 1).numpy()
    gone = (cut('const') != 7).all(-1).any(0)
    assert gone.sum() > 900 and (cut('const')[:, gone] == np.round([.2*255, .5*255, .8*255])).all()
    for fill, colours in (('rand', 4), ('pixel', 1000)):
        v = cut(fill)[:, gone].astype(float)
        assert np.abs(v.mean((0, 1)) - np.array([.2, .5, .8])*255).max() < (5 if fill == 'rand' else .3) and (len(np.unique(v.reshape(-1, 3), axis=0)) == colours or fill == 'pixel' and .5*255*.01 < v.std(1).mean() < 2*255*.01)


def test_jitter_is_torchvisions():
    from PIL import Image
    from torchvision.transforms import functional as TF
    from vidlab.data.transforms import Jitter
    f, how = noise(2, 20, 30), (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for seed in range(6):
        d = Jitter(.6).draw(20, 30, None, np.random.default_rng(seed))
        im = Image.fromarray(f[1])
        for i in d['order']: im = how[i](im, d['by'][i])
        assert np.array_equal(Jitter(.6).apply(f, None, **d)[1], np.array(im))
        assert all(.4 <= x <= 1.6 for x in d['by'])


def test_rand_augment_moves_pixels_by_the_kernel():
    from vidlab.data.transforms import RandAugment
    f, ops = noise(1, 40, 40), [('Rotate', 17.)]
    a, b = (RandAugment(kernel=k).apply(f, None, ops)[0].astype(int) for k in ('bicubic', 'bilinear'))
    assert 5 < np.abs(a - b).mean() < 60 and np.array_equal(a, RandAugment().apply(f, None, ops)[0])
    with pytest.raises(ValueError, match='kernel'): RandAugment(kernel='nearest')


def test_words_in_another_order():
    "A word behind the crop sees the square; without a crop the centre comes before what needs no more"
    tfm = ClipTransform(24, 'rand-m5 flip-p1', resize='fast')
    assert [type(o).__name__ for o in tfm.steps] == ['RandAugment', 'Centre', 'Flip']
    tfm, f = ClipTransform(24, 'sized flip-p1', resize='fast'), noise(2, 40, 60)
    draw = tfm.draw(40, 60, np.random.default_rng(0))
    assert torch.equal(tfm.apply(f, draw), ClipTransform(24, 'sized', resize='fast').apply(f, draw[:1]).flip(3)) and tfm.mirrored(draw)
    assert not ClipTransform(24, 'flip-p1 flip-p1').mirrored(ClipTransform(24, 'flip-p1 flip-p1').draw(9, 9, np.random.default_rng(0)))


# ---- mixing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('opts', [dict(mixup=.8, cutmix=0.), dict(mixup=0., cutmix=1.), dict(mixup=.8, cutmix=1.), dict(mixup=.2, cutmix=1., prob=.5, switch=.3)])
@pytest.mark.parametrize('seed', range(4))
def test_mixing_is_timms_on_images(opts, seed, globals_kept):
    "One frame: timm's Mixup, up to the rounding of an odd box; the clip: the same in every frame, labels of the share that is seen"
    from timm.data.mixup import Mixup
    B, C, S = 6, 5, 32
    x, y = torch.rand(B, 2, 3, S, S), torch.arange(B) % C
    got, t = mix_clips(x, y, C, np.random.RandomState(seed), smoothing=.1, **opts)
    names = dict(mixup='mixup_alpha', cutmix='cutmix_alpha', prob='prob', switch='switch_prob')
    np.random.seed(seed)
    want, u = Mixup(**{names[k]: v for k, v in opts.items()}, label_smoothing=.1, num_classes=C)(x.flatten(1, 2).clone(), y)
    want = want.unflatten(1, (2, 3))
    lam, box = draw_mix(S, S, np.random.RandomState(seed), **opts)
    if box is None:
        assert torch.allclose(got, want, atol=1e-6) and torch.allclose(t, u, atol=1e-6)
    else:
        assert ((got != want).any(2).sum((2, 3)) <= 2*S).all()                # at most a row and a column
        seen = (got == x).all(2)[:, 0].float().mean((1, 2))
        assert torch.allclose(seen, torch.full((B,), lam), atol=1e-6)
    assert torch.allclose(t.sum(1), torch.ones(B)) and t.dtype == torch.float32


@pytest.mark.parametrize('opts', [dict(mixup=0., cutmix=0.), dict(mixup=.8, cutmix=0.), dict(mixup=.8, cutmix=.3, prob=.6, switch=.7)])
@pytest.mark.parametrize('mode', ['batch', 'elem', 'pair'])
def test_boxes_between_two_sides_are_timms(opts, mode, globals_kept):
    "timm's cutmix_minmax on images that are wider than high, to the last pixel; the clip: the same in every frame"
    from timm.data.mixup import Mixup
    x, y, low, high = torch.rand(6, 2, 3, 20, 36), torch.arange(6) % 5, .2, .7
    names = dict(mixup='mixup_alpha', cutmix='cutmix_alpha', prob='prob', switch='switch_prob')
    boxes = 0
    for seed in range(6):
        got, t = mix_clips(x, y, 5, np.random.RandomState(seed), smoothing=.1, mode=mode, minmax=[low, high], **opts)
        np.random.seed(seed)
        want, u = Mixup(**{names[k]: v for k, v in opts.items()}, cutmix_minmax=[low, high], mode=mode, label_smoothing=.1, num_classes=5)(x.flatten(1, 2).clone(), y)
        assert torch.allclose(got, want.unflatten(1, (2, 3)), atol=1e-6) and torch.allclose(t, u, atol=1e-6)
        sides = ((got != x).any(2).any(1)).float()
        for m in sides:
            h, w = int(m.any(1).sum()), int(m.any(0).sum())
            if not h or m.sum() != h*w or h*w == 20*36: continue
            boxes += 1
            assert int(20*low) <= h < int(20*high) and int(36*low) <= w < int(36*high)
    assert boxes > 3
    for bad in ([.5], [.7, .2], [0., .5], [.2, 1.2], [.3, .3]):
        with pytest.raises(ValueError, match='two shares of a side'): draw_mix(20, 36, np.random.RandomState(0), minmax=bad)


def test_mixing_bytes_and_shares():
    "uint8 is the rounded mixture of floats; shares go in as labels; the batch given is not touched"
    x = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept, y = x.clone(), torch.tensor([[1., 0], [.5, .5], [0, 1]])
    for seed in range(8):
        a, t = mix_clips(x, y, 2, np.random.default_rng(seed))
        b, _ = mix_clips(x.float(), y, 2, np.random.default_rng(seed))
        assert a.dtype == torch.uint8 and (a.float() - b).abs().max() <= .5 and torch.equal(x, kept)
        assert torch.allclose(t[1], y[1]) and torch.allclose(t.sum(1), torch.ones(3))
    assert torch.equal(mix_clips(x, y, 2, np.random.default_rng(0), prob=0)[0], x)


@pytest.mark.parametrize('mode', ['elem', 'pair'])
@pytest.mark.parametrize('opts', [dict(mixup=.8, cutmix=0.), dict(mixup=.8, cutmix=0., prob=.5)])
def test_mixing_clip_by_clip_is_timms(mode, opts, globals_kept):
    from timm.data.mixup import Mixup
    x, y = torch.rand(6, 2, 3, 8, 8), torch.arange(6) % 5
    for seed in range(4):
        got, t = mix_clips(x, y, 5, np.random.RandomState(seed), smoothing=.1, mode=mode, **opts)
        np.random.seed(seed)
        want, u = Mixup(mixup_alpha=opts['mixup'], prob=opts.get('prob', 1.), mode=mode, label_smoothing=.1, num_classes=5)(x.flatten(1, 2).clone(), y)
        assert torch.allclose(got, want.unflatten(1, (2, 3)), atol=1e-6) and torch.allclose(t, u, atol=1e-6)


@pytest.mark.parametrize('mode', ['batch', 'elem', 'pair'])
@pytest.mark.parametrize('n', [5, 6])
def test_labels_say_what_is_seen(mode, n):
    "Clips of one number each: the share of the clip itself in the pixels is the share in its label"
    x, y = torch.arange(n).float().view(n, 1, 1, 1, 1).expand(n, 2, 3, 16, 16), torch.arange(n)
    for seed in range(6):
        got, t = mix_clips(x, y, n, np.random.default_rng(seed), mode=mode)
        assert torch.allclose(got.mean((1, 2, 3, 4)), (t*torch.arange(n)).sum(1), atol=1e-4)
        if mode == 'pair' and n % 2: assert torch.equal(got[n//2], x[n//2])
