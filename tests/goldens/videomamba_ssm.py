"""VideoMamba's selective scan, on every path of this machine, and its causal convolution: values and all gradients."""
import torch

from goldens import close, part, sub

from . import kind


def _same(name, got, want, tol):
    "The cases' own note: relative to the tensor's maximum"
    close(name, got, want, tol, own=True)


@kind('videomamba', 'scan')
def check_scan(case, tensors):
    from vidlab.ssm import scan_paths, selective_scan
    c, tol, want = {'delta_softplus': False, **case['config']}, case['tolerance'], part(tensors, 'output/')
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    for device, path in [(d, p) for d in devices for p in scan_paths(d)]:
        with sub(path):
            x = {k: v.to(device, copy=True).requires_grad_() for k, v in part(tensors, 'input/').items()}
            dout = x.pop('dout').detach()
            out, last = selective_scan(**x, softplus=c['delta_softplus'], last_state=True, path=path)
            _same(f'{path} out', out, want['out'], tol); _same(f'{path} last_state', last, want['last_state'], tol)
            (out*dout).sum().backward()
            grads = part(tensors, 'grad/')
            assert set(grads) == set(x), f'gradients of {sorted(grads)}, inputs {sorted(x)}'
            for k, g in grads.items(): _same(f'{path} grad {k}', x[k].grad, g, tol)
            plain = selective_scan(**{k: v.detach() for k, v in x.items()}, softplus=c['delta_softplus'], path=path)
            assert torch.equal(plain, out), 'without gradients the values differ'


@kind('videomamba', 'conv')
def check_conv(case, tensors):
    from vidlab.ssm import causal_conv1d
    c, tol = {'activation': None, **case['config']}, case['tolerance']
    if c['activation'] not in (None, 'silu', 'swish'): raise AssertionError(f"unknown activation {c['activation']!r}")
    x = {k: v.clone().requires_grad_() for k, v in part(tensors, 'input/').items()}
    dout = x.pop('dout').detach()
    out = causal_conv1d(**x, silu=c['activation'] is not None)
    _same('out', out, tensors['output/out'], tol)
    (out*dout).sum().backward()
    for k, g in part(tensors, 'grad/').items(): _same(f'grad {k}', x[k].grad, g, tol)
    y = causal_conv1d(**{k: v.unsqueeze(1) if k == 'weight' else v for k, v in x.items()}, silu=c['activation'] is not None)
    assert torch.equal(y, out), 'weight (E,1,W) and (E,W) differ'
