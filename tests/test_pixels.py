"RandAugment on whole clips gives the pixels of PIL on each frame: every operation, any magnitude, any content."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from timm.data.auto_augment import rand_augment_choices
from vidlab.data import pixels
from vidlab.data.pixels import by_frame, operate
from vidlab.data.transforms import RandAugment, rand_args

NAMES = sorted({*rand_augment_choices('rand', increasing=True), *rand_augment_choices('rand', increasing=False)})

def contents(kind, t, h, w, seed):
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (t, h, w, 3)).astype(np.uint8)
    if kind == 'noise': return noise
    if kind == 'flat': return np.repeat(np.repeat(noise[:, ::5, ::7], 5, 1), 7, 2)[:, :h, :w]
    if kind == 'ramp': return np.broadcast_to(np.linspace(0, 255, w).astype(np.uint8)[None, None, :, None], noise.shape)
    return np.where(noise < 200, 0, 255).astype(np.uint8)                             # black with white dots

@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(['noise', 'flat', 'ramp', 'dots']), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70),
       st.one_of(st.floats(0, 10), st.integers(0, 20).map(lambda k: k/2)), st.sampled_from(['bicubic', 'bilinear']), st.integers(0, 10**6))
def test_each_operation_is_pils(name, kind, t, h, w, level, kernel, seed):
    frames = contents(kind, t, h, w, seed)
    op = (name, *rand_args(name, level, np.random.default_rng(seed)))
    assert np.array_equal(operate(frames, [op], kernel), by_frame(frames, [op], kernel))

@pytest.mark.parametrize('seed', range(6))
def test_a_draw_is_pils(seed):
    "Frames of video size, several operations after each other, as recipes have them"
    frames, rand = contents(('noise', 'flat')[seed % 2], 8, 120, 160, seed), RandAugment(m=7, n=4, p=1., mstd=.5, inc=1)
    ops = rand.draw(120, 160, None, np.random.default_rng(seed))['ops']
    assert np.array_equal(rand.apply(frames, None, ops), by_frame(frames, ops)) and frames.flags.writeable

def test_large_angles_and_quarters_of_a_turn():
    frames = contents('noise', 5, 31, 31, 0)
    for angle in (0., 90., 180., 270., 359.9, -45.):
        assert np.array_equal(operate(frames, [('Rotate', angle)]), by_frame(frames, [('Rotate', angle)]))

def test_pil_does_what_is_not_ours(monkeypatch):
    "On other processors, and what moves where nothing compiles"
    frames, asked = contents('noise', 6, 20, 20, 0), []
    monkeypatch.setattr(pixels, 'by_frame', lambda f, ops, kernel='bicubic': asked.append([o[0] for o in ops]) or by_frame(f, ops, kernel))
    ops = [('ShearX', .2), ('Sharpness', 1.3)]
    moved = operate(frames, ops)
    assert asked == []
    monkeypatch.setattr(pixels, 'NUMBA', False)
    assert np.array_equal(operate(frames, ops), moved) and asked == [['ShearX', 'Sharpness']]
    monkeypatch.setattr(pixels, 'SAME', False)
    assert np.array_equal(operate(frames, ops), moved) and asked[1:] == [['ShearX', 'Sharpness']]
