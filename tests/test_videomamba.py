"""VideoMamba beyond its page: memory and graph over length, orders on masked clips, precision, contract, files, a run."""
import argparse
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from vidlab.ckpt import save_checkpoint
from vidlab.core import RunFolder, saved_bytes
from vidlab.models.videomamba import ORDERS, TAPS, VideoMamba, VideoMambaStudent, capture_scans, time_first
from vidlab.optim import param_groups
from vidlab.registry import create_model, list_models
from vidlab.ssm import scan_paths, selective_scan, use_path
from vidlab.tasks import RecognitionTask

SMALL = dict(dim=24, depth=3, image_size=24, patch=8, max_frames=4)


def make(seed=0, classes=5, **kw):
    torch.manual_seed(seed)
    return VideoMamba(classes, **{**SMALL, **kw})


def make_student(seed=0, **kw):
    torch.manual_seed(seed)
    return VideoMambaStudent(**{**SMALL, 'out_dim': 10, **kw})


def clips(B=2, T=4, S=24, seed=1): return torch.randn(B, T, 3, S, S, generator=torch.Generator().manual_seed(seed))


def spread(model, seed=3):
    "Every parameter away from its special start, so that nothing is zero or the same in both directions"
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data.add_(0.2*torch.randn(p.shape, generator=g))
    return model


# ---------------------------------------------------------------------------------------------------------------- length
def nodes(t):
    "Number of nodes of the graph behind a tensor"
    seen, todo = set(), [t.grad_fn]
    while todo:
        n = todo.pop()
        if n is None or n in seen: continue
        seen.add(n); todo += [f for f, _ in n.next_functions]
    return len(seen)


def test_linear_in_length():
    "Twice the tokens: twice the memory, and the same graph"
    kept, graph = [], []
    for T in (8, 16, 32):
        m, v = make(max_frames=T), clips(1, T)
        f = lambda: m(dict(video=v))['logits'].sum()
        kept.append(saved_bytes(f, m)); graph.append(nodes(f()))
    assert kept[1] < 2.05*kept[0] and kept[2] < 2.05*kept[1], kept
    assert len(set(graph)) == 1, graph


# ---------------------------------------------------------------------------------------------------------------- orders
@pytest.mark.parametrize('order', ORDERS)
def test_orders(order):
    "Paths agree; a student that sees all tokens is the classifier's trunk; gradients pass through every order"
    m, s, v = spread(make(order=order)).eval(), make_student(order=order).eval(), clips()
    with torch.no_grad():
        out = {}
        for p in scan_paths():
            if p not in ('numba', 'loop', 'reference'): continue                       # kernels need a GPU
            with use_path(p): out[p] = m(dict(video=v))['logits']
    assert all(torch.allclose(o, out['reference'], rtol=1e-4, atol=1e-5) for o in out.values())
    s.load_weights({k.replace('norm_f', 'norm'): x for k, x in m.state_dict().items()})
    everything = torch.arange(37).expand(2, -1)
    assert torch.allclose(list(s.states(s.embed(v), everything))[0], m.encode_tokens(v), atol=1e-5)
    m(dict(video=v))['logits'].square().sum().backward()
    # forwards the class token comes first, so how fast the last forward scan forgets does not matter to it
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()] == ['layers.2.mixer.A_log']
    w = v[:1].double().requires_grad_()
    d = make(order=order, depth=2).double()
    d.cls_token.data.normal_()
    with use_path('reference'): g = torch.autograd.grad(d(dict(video=w))['logits'][0, 0], w)[0]
    e = 1e-3*torch.randn_like(w)
    with torch.no_grad(): slope = (d(dict(video=w + e))['logits'] - d(dict(video=w - e))['logits'])[0, 0]/2
    assert abs(slope - (g*e).sum()) < 1e-4*abs(slope) + 1e-9


def test_masked_time_order():
    "Visible tokens in temporal order: each row by patch, then frame"
    g = torch.Generator().manual_seed(0)
    at = torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(24, generator=g)[:7].sort()[0]]) for _ in range(5)])
    order, back = time_first((4, 2, 3), at)
    for row, o, b in zip(at, order, back):
        rest = row[o][1:] - 1
        assert row[o][0] == 0 and rest.tolist() == sorted(rest.tolist(), key=lambda p: (p % 6, p//6)) and o[b].tolist() == list(range(8))


def test_direction_weights():
    "The backward scan has its own parameters, and mirrors the forward one: with swapped weights, a reversed sequence gives the reversed output"
    m = spread(make()).layers[0].mixer
    x = torch.randn(2, 11, 24)
    want = m(x)
    sd = m.state_dict()
    other = lambda k: k.replace('A_b_log', 'A_log') if 'A_b_log' in k else k.replace('A_log', 'A_b_log') if 'A_log' in k else k.replace('_b.', '.') if '_b.' in k else \
        'D' if k == 'D_b' else 'D_b' if k == 'D' else k.replace('.', '_b.') if k.startswith(('conv1d', 'x_proj', 'dt_proj')) else k
    m.load_state_dict({other(k): v.clone() for k, v in sd.items()})
    assert torch.allclose(m(x.flip(1)).flip(1), want, atol=1e-5)


@pytest.mark.parametrize('order', ['spatial', 'st_v1', 'st_v2'])
def test_scan_maps(order):
    "The matrices of a layer against impulses sent through its scans, and the outputs with and without somebody looking"
    m, v = spread(make(order=order)).eval(), clips(1)
    with torch.no_grad():
        want = m(dict(video=v))['logits']
        with capture_scans(m) as got: assert torch.equal(m(dict(video=v))['logits'], want)
        assert sorted(got) == [0, 1, 2] and not m.layers[0].mixer.scan._forward_hooks
        g, routes, L = got[1], m.layers[1].mixer.routes, 37
        mixer = m.layers[1].mixer
        y = selective_scan(g['u'], g['delta'], g['A'], g['B'], g['C'], mixer.per_route('D'))
        assert torch.allclose(y, g['y'], rtol=1e-4, atol=1e-5)
        impulse = torch.eye(L)[:, None].expand(L, g['u'].shape[2], L)                                       # one clip for each place
        many = [x.expand(-1, L, -1, -1) for x in (g['delta'], g['B'], g['C'])]
        y = selective_scan(impulse.expand(len(routes), -1, -1, -1).contiguous(), many[0], g['A'], *many[1:]).abs().mean(2).mT      # (K,into,from)
        swap = time_first(m.card.grid)
        maps = m.scan_maps(v, 1)
        for k, (time, reverse) in enumerate(routes):
            walk = swap[0] if time else torch.arange(L)
            walk = walk.flip(0) if reverse else walk
            assert torch.allclose(maps[k][walk][:, walk], y[k], rtol=1e-3, atol=1e-6), k
        assert m.scan_maps(v, 1, gate=True, reduce='mean').shape == maps.shape and not torch.equal(m.scan_maps(v, 1, gate=True), maps)


# ---------------------------------------------------------------------------------------------------------------- student
@pytest.mark.parametrize('tap', TAPS)
def test_student(tap):
    "No gradient reaches the pixels of hidden patches; rows do not see each other; the number of aligned layers"
    s = spread(make_student(tap=tap, aligned=2, normalize='none')).eval()
    see = torch.zeros(2, 37, dtype=torch.bool); see[:, 0] = True; see[0, 3:12] = True; see[1, 20:29] = True
    v = clips().requires_grad_()
    f = s(dict(video=v, visible=see))['features']
    assert f.shape == (2, 2, 10, 10)
    g = torch.autograd.grad(f[:, 0].square().sum(), v)[0]
    assert not g[1].any()
    seen = see[0, 1:].view(4, 3, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert not g[0].permute(0, 2, 3, 1)[~seen].any() and g[0].permute(0, 2, 3, 1)[seen].any(-1).all()
    alone = s(dict(video=v[:1], visible=see[:1]))['features']
    assert torch.allclose(alone[:, 0], f[:, 0], atol=1e-5)


def test_student_refuses():
    s, v = make_student(), clips()
    see = torch.ones(2, 37, dtype=torch.bool)
    with pytest.raises(ValueError, match='as many in each row'): s(dict(video=v, visible=see.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(False))))
    with pytest.raises(ValueError, match='class token'): s(dict(video=v, visible=see.index_fill(1, torch.tensor([0]), False)))
    with pytest.raises(ValueError, match=r'it must be \(2, 37\)'): s(dict(video=v, visible=see[:, 1:]))
    for bad in (dict(aligned=4), dict(aligned=2, interval=0.4), dict(aligned=2, interval=3)):
        with pytest.raises(ValueError, match='different blocks'): make_student(**bad)
    with pytest.raises(ValueError, match="did you mean 'official'"): make_student(tap='oficial')


# ---------------------------------------------------------------------------------------------------------------- contract
@pytest.mark.parametrize('name', ['videomamba', 'videomamba_pretrain'])
def test_contract(name):
    m = create_model(name, preset='tiny')
    assert name in list_models()
    names = [n for n, _ in m.named_parameters()]
    top = len(m.layers) + 1
    assert {m.layer_of(n) for n in names} == set(range(top + 1)) and m.no_decay() == {'cls_token', 'pos_embed', 'temporal_pos_embedding'}
    assert m.token_layout('layers.1.mixer') == dict(kind='scan', prefix=1, grid=(8, 4, 4)) and set(m.paths('cpu')) == {'scan'}
    assert m.card.mean == (0.485, 0.456, 0.406) and m.card.size == 64 and m.card.frames == 8
    m.freeze(2)
    assert {m.layer_of(n) for n, p in m.named_parameters() if p.requires_grad} == {3, 4, 5}
    m.freeze(['layers.*']); assert not any(p.requires_grad for p in m.layers.parameters()) and m.cls_token.requires_grad
    m.freeze('none')
    groups = param_groups(m, lr=1., weight_decay=.1, layer_decay=.5)
    rate = {n: g['lr'] for g in groups for n in g['names']}
    assert rate['cls_token'] == .5**5 and rate['layers.0.mixer.in_proj.weight'] == .5**4 and rate['temporal_pos_embedding'] == 1.
    decay = {n: g['weight_decay'] for g in groups for n in g['names']}
    assert decay['layers.0.mixer.A_b_log'] == .1 and not any(decay[n] for n in ('pos_embed', 'layers.0.mixer.D', 'layers.0.norm.weight', 'layers.3.mixer.dt_proj_b.bias'))


def test_recompute_first_mixers():
    "`checkpoint_layers`: only so many; memory between none and all, numbers as before, stochastic depth included"
    kept, grads = [], []
    for n in (None, 0, 2):
        m = make(depth=4, drop_path=.5, max_frames=8).train()
        m.checkpoint_layers = n; m.set_grad_checkpointing()
        f = lambda: (torch.manual_seed(5), m(dict(video=clips(4, 8)))['logits'].square().sum())[1]
        kept.append(saved_bytes(f, m)); f().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert kept[0] < kept[2] < kept[1]
    assert torch.allclose(grads[0], grads[1], atol=1e-5) and torch.allclose(grads[2], grads[1], atol=1e-5)


def test_task_step_and_regression():
    m = make(classes=3)
    task = RecognitionTask(m, ['a', 'b', 'c'])
    b = dict(video=torch.randint(0, 256, (2, 4, 3, 24, 24), dtype=torch.uint8), video_mask=torch.ones(2, 4, dtype=torch.bool), label=torch.tensor([0, 2]), sid=torch.arange(2), view=torch.zeros(2, dtype=torch.int64))
    task(task.prep(b))['loss'].backward()
    assert all(p.grad is not None for p in m.parameters())
    assert make(classes=1)(dict(video=clips()))['logits'].shape == (2, 1)
    with pytest.raises(ValueError, match='classes is 0'): make(classes=0)
    with pytest.raises(ValueError, match='not a multiple of tubelet'): make(tubelet=3)
    with pytest.raises(ValueError, match='not a multiple of patch'): make(image_size=20)


def test_precision():
    "bf16 autocast: the stream stays float32, numbers stay near; a model of bf16 weights runs"
    m, v = spread(make()).eval(), clips()
    want = m(dict(video=v))['logits']
    with torch.autocast('cpu', torch.bfloat16):
        assert all(s.dtype == torch.float32 for s in m.streams(m.embed(v)))
        got = m(dict(video=v))['logits']
    got.float().sum().backward()
    assert (got - want).abs().max() < 0.05*want.abs().max() and all(p.grad.dtype == torch.float32 for p in m.parameters())
    half = m.bfloat16()(dict(video=v.bfloat16()))['logits']
    assert half.dtype == torch.bfloat16 and (half - want).abs().max() < 0.1*want.abs().max()


# ---------------------------------------------------------------------------------------------------------------- files
def same(a, b, v=None):
    v = clips() if v is None else v
    with torch.no_grad(): return torch.equal(a.eval()(dict(video=v))['logits'], b.eval()(dict(video=v))['logits'])


def test_containers(tmp_path):
    "The official layouts, and our own checkpoint folders"
    m = spread(make()); sd = m.state_dict()
    files = dict(bare=sd, model=dict(model=sd, optimizer={}, epoch=7, scaler={}, args=argparse.Namespace(lr=1e-3)), module=dict(module=sd), ddp={'module.' + k: v for k, v in sd.items()},
                 backbone={'backbone.' + k: v for k, v in sd.items()}, encoder=dict(model={'encoder.' + k: v for k, v in sd.items()}))
    for name, obj in files.items():
        torch.save(obj, tmp_path/f'{name}.pth')
        n = make(1); report = n.load_weights(tmp_path/f'{name}.pth', exact=True)
        assert same(n, m) and report.count('loaded') == len(sd) and n.card.source == f'{name}.pth'
    save_checkpoint(tmp_path/'last', sd, dict(step=1))
    n = make(1); n.load_weights(tmp_path/'last'/'weights.safetensors', exact=True); assert same(n, m)
    s = make_student(aligned=2); save_checkpoint(tmp_path/'pt', s.state_dict(), dict(step=1))
    n = make_student(1, aligned=2); n.load_weights(tmp_path/'pt'/'weights.safetensors', exact=True)
    assert all(torch.equal(a, b) for a, b in zip(n.state_dict().values(), s.state_dict().values()))


def test_loud():
    "What does not fit is an error, not a silence"
    from vidlab.ckpt import WeightsError
    sd = make().state_dict()
    for kw, word in ((dict(depth=2), 'layers.2'), (dict(depth=4), 'not in the file'), (dict(dim=48), 'another shape'), (dict(bidirectional=False), '_b'), (dict(tubelet=2), 'another shape'),
                     (dict(mixer=dict(state=8)), 'another shape'), (dict(norm='layer'), 'not in the file'), (dict(max_frames=0), 'temporal_pos_embedding')):
        with pytest.raises(WeightsError, match=word): make(**kw).load_weights(sd)
    with pytest.raises(WeightsError, match='odd'): make().load_weights({**sd, 'odd': torch.zeros(1)})
    with pytest.raises(WeightsError, match='not in the file'): make().load_weights({k: v for k, v in sd.items() if k != 'norm_f.weight'})
    with pytest.raises(WeightsError, match='not a square'): make().load_weights({**sd, 'pos_embed': torch.zeros(1, 9, 24)})
    for other in (make(classes=6).state_dict(), make_student().state_dict(), make(max_frames=0).state_dict(), {k: v for k, v in sd.items() if not k.startswith('head')}):
        with pytest.raises(WeightsError): make().load_weights(other, exact=True)


def test_heads(tmp_path):
    "Cut, map, new; a head behind a prefix is treated the same, unless `compat`"
    big = make(classes=710); sd = big.state_dict(); pre = {'backbone.' + k: v for k, v in sd.items()}
    for state in (sd, pre):
        m = make(1, 400); m.load_weights(state); assert torch.equal(m.head.weight, big.head.weight[:400]) and 'head.weight' in m.report.names('resized')
    m = make(1, 400); start = m.head.weight.detach().clone(); m.load_weights(pre, compat=True)
    assert torch.equal(m.head.weight, start) and {'head.weight', 'head.bias'} <= set(m.report.names('dropped'))
    m = make(1, 710); m.load_weights(pre, compat=True, new_head=True); assert torch.equal(m.head.weight, big.head.weight)
    m = make(1, 710); start = m.head.weight.detach().clone(); m.load_weights(pre, new_head=True); assert torch.equal(m.head.weight, start)
    (tmp_path/'map.json').write_text(json.dumps(list(range(10, 610))))
    m = create_model('videomamba', classes=600, max_frames=4, dim=24, depth=3, image_size=24, patch=8, label_map=str(tmp_path/'map.json'))
    m.load_weights(sd); assert torch.equal(m.head.bias, big.head.bias[10:610])
    with pytest.raises(ValueError, match='label_map'): create_model('videomamba', new_head=True, label_map='x.json', dim=24, depth=3)


def test_carry_over():
    "Pictures to video at another size, classifier to more frames, student to classifier and back"
    image = make(max_frames=0, classes=9)
    with torch.no_grad(): pic = image.eval()(dict(video=clips(T=1)))['video']
    video = make(1, max_frames=2, tubelet=2)
    for how in ('centre', 'mean'):
        video.load_weights(image.state_dict(), how=how)
        with torch.no_grad(): assert torch.allclose(video.eval()(dict(video=clips(T=1).expand(-1, 2, -1, -1, -1)))['video'], pic, atol=1e-5)      # a still of one tubelet is the picture
    assert make(1, classes=9).load_weights(image.state_dict()).count('new') == 3                                                                # its head is never taken
    m = spread(make()); n = make(1, max_frames=7, image_size=40); r = n.load_weights(m.state_dict())
    want = F.interpolate(m.temporal_pos_embedding.detach().transpose(1, 2), 7, mode='linear').transpose(1, 2)
    assert torch.equal(n.temporal_pos_embedding, want) and n.pos_embed.shape[1] == 26 and set(r.names('resized')) == {'pos_embed', 'temporal_pos_embedding'}
    assert torch.equal(n.pos_embed[:, 0], m.pos_embed[:, 0]) and torch.equal(n.head.weight, m.head.weight)
    s = spread(make_student(aligned=2)); n = make(1); r = n.load_weights(s.state_dict())
    assert torch.equal(n.norm_f.weight, s.norm.weight) and sorted(r.names('new')) == ['head.bias', 'head.weight'] and r.count('dropped') == 8
    t = make_student(1, aligned=1); r = t.load_weights(s.state_dict()); assert torch.equal(t.clip_decoder[0].head.weight, s.clip_decoder[0].head.weight)
    t = make_student(1); t.load_weights(m.state_dict()); assert torch.equal(t.norm.weight, m.norm_f.weight) and torch.equal(t.layers[2].mixer.D_b, m.layers[2].mixer.D_b)


# ---------------------------------------------------------------------------------------------------------------- a run
av = pytest.importorskip('av')
from test_extract_frames import ROWS, manifest, videos                                 # noqa: E402,F401 (fixtures)


def test_run(videos, tmp_path):
    "One epoch from files through the loop; the run's checkpoint is built and loaded again, exactly"
    from vidlab.learner import make_engine
    from vidlab.train import build_learner, build_task, make_config
    src = manifest(videos, ROWS)
    (tmp_path/'names.txt').write_text('one\ntwo\nthree\n')
    cfg = make_config(data='manifest', data_path=str(src), classes=str(tmp_path/'names.txt'), task='recognition', model='videomamba', preset='tiny', depth=2, image_size=32, max_frames=4,
                      sampler='segment', epochs=1, batch_size=2, eval_batch_size=2, workers=0, lr=.001, layer_decay=.75, device='cpu', val_split='', test_split='test', grad_checkpointing=True)
    learn = build_learner(cfg, RunFolder(tmp_path/'run'), make_engine(precision='fp32', device='cpu'))
    learn.fit()
    model = learn.raw_task.model
    again = build_task(dataclasses.replace(cfg, start=str(tmp_path/'run')), exact=True).model
    assert same(again, model, clips(1, 4, 32))
