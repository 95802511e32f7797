"What models cost: multiply-adds without memory against formulas, passes in turns, what grows with what."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from vidlab.core import saved_bytes
from vidlab.cost import kept_bytes, multiply_adds, on_meta, pass_cost
from vidlab.registry import create_model
from vidlab.ssm import selective_scan
from vidlab.viz import show_growth


def shape(*s): return torch.empty(s, device='meta')


@pytest.mark.parametrize('d,depth,frames,size,state,tubelet,both', [(96, 4, 8, 64, 16, 1, True), (48, 2, 4, 32, 6, 2, True), (64, 3, 3, 48, 4, 1, False)])
def test_videomamba(d, depth, frames, size, state, tubelet, both):
    m = on_meta(lambda: create_model('videomamba', preset='tiny', dim=d, depth=depth, max_frames=frames, image_size=size, state=state, tubelet=tubelet, bidirectional=both))
    got = multiply_adds(m, lambda m: m.encode_video(shape(2, frames, 3, size, size)))
    L, E, R, K = 1 + frames//tubelet*(size//16)**2, 2*d, math.ceil(d/16), 1 + both
    part = dict(in_proj=2*E*d*L, out_proj=E*d*L, scan=K*4.5*E*state*L)
    one = sum(part.values()) + K*(4*E*(L + 3) + E*(R + 2*state)*L + R*E*L)           # the convolution pads by three
    for k, want in part.items(): assert got[f'layers.0.mixer.{k}'] == 2*want, k       # a batch of two
    assert got['layers.0'] == 2*one and got['layers'] == 2*depth*one
    assert got[''] == 2*(depth*one + tubelet*3*256*d*(L - 1))


@pytest.mark.parametrize('frames,text', [(1, False), (5, False), (3, True)])
def test_clip(frames, text):
    m = on_meta(lambda: create_model('clip4clip', preset='base', weights='random', head='meanP'))
    got = multiply_adds(m, lambda m: m.encode_video(shape(1, frames, 3, 224, 224)))
    one, D = 50*12*(12*768**2 + 2*50*768), 768
    assert got['clip'] == frames*(one + 49*3*32*32*D)
    assert got[''] == got['clip'] + frames*D*512                # the projection stands in a method, which is no module
    assert got['clip.visual.transformer'] == frames*one and got['clip.visual.transformer.resblocks.3.attn.attend'] == frames*2*50*50*D
    if text: assert multiply_adds(m, lambda m: m.encode_text(torch.ones(1, 9, dtype=torch.long, device='meta')))[''] > 9*12*12*512**2


def test_a_module_says_its_own_work_once_for_every_call():
    class Own(nn.Module):
        def forward(self, x): return x
        def flops(self, x): return 10*x.shape[0]
    m = on_meta(lambda: nn.Sequential(nn.Sequential(Own(), nn.Linear(4, 4, bias=False)), Own()))
    got = multiply_adds(m, lambda m: m(m(shape(3, 4))))
    assert got == {'': 2*(15 + 48 + 15), '0': 2*(15 + 48), '0.0': 30, '0.1': 96, '1': 30}
    assert not any(x._forward_hooks for x in m.modules())


def test_a_scan_on_meta_has_the_shapes_of_one_on_a_cpu():
    for K, M, E, L, S in ((2, 1, 3, 5, 4), (1, 2, 6, 3000, 16)):
        u, d, A, B, C = torch.randn(K, M, E, L), torch.randn(K, M, E, L), -torch.rand(K, E, S), torch.randn(K, M, S, L), torch.randn(K, M, S, L)
        far = [x.to('meta') for x in (u, d, A, B, C)]
        for got, want in zip(selective_scan(*far, last_state=True), selective_scan(u, d, A, B, C, last_state=True)):
            assert got.is_meta and (got.shape, got.dtype) == (want.shape, want.dtype)
    with pytest.raises(ValueError, match='expected the shape of u'): selective_scan(far[0], far[1][..., 1:], *far[2:])


def test_passes_in_turns():
    said = []
    def f(n): return lambda: said.append(n)
    def full():
        said.append('full')
        raise torch.OutOfMemoryError('full')
    t = pass_cost(dict(a=f('a'), full=full, b=f('b')), rounds=3, device='cpu')
    assert ''.join(said).replace('full', '!') == 'aa!bbababab' and list(t.index) == ['a', 'full', 'b']
    assert t.loc['full'].isna().all() and (t.loc[['a', 'b'], 'ms'] >= 0).all()
    x = torch.randn(4, requires_grad=True)
    pass_cost(dict(a=lambda: said.append((x*2).requires_grad)), rounds=1, device='cpu')
    assert said[-1] is False


def test_growth():
    n = np.array([4, 8, 16, 64])
    t = pd.concat([pd.DataFrame(dict(frames=n, who=w, ms=3*n.astype(float)**p, MiB=float('nan'))) for w, p in dict(one=1, two=2, none=0).items()])
    t.loc[(t.who == 'two') & (t.frames == 64), 'ms'] = float('nan')
    fig = show_growth(t, 'frames', 'who', ['ms', 'MiB'])
    said = [x.get_text() for x in fig.axes[0].get_legend().get_texts()]
    assert said == ['one (power 1.0)', 'two (power 2.0)', 'none (power 0.0)']
    assert all(a.get_xscale() == a.get_yscale() == 'log' for a in fig.axes) and [a.get_ylabel() for a in fig.axes] == ['ms', 'MiB']
    assert [x.get_text() for x in fig.axes[1].get_legend().get_texts()] == ['one', 'two', 'none']        # nothing measured: no power


@pytest.mark.parametrize('model,freeze,frames', [('probe', 'none', 3), ('probe', 'all', 3), ('tdsclip', 'all', 10), ('tdsclip', 'none', 10), ('videomamba', 'none', 8)])
def test_bytes_kept_without_memory_are_those_of_a_real_pass(model, freeze, frames):
    build = lambda: create_model(model, preset='tiny', classes=5, freeze=freeze)
    step = lambda m: m(dict(video=torch.randn(2, frames, 3, 64, 64)))['logits'].logsumexp(1).sum()
    real = build().train()
    assert kept_bytes(build, step) == saved_bytes(lambda: step(real), real) > 0
