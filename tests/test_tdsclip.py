"""TDS-CLIP beyond its page: published memory, gradients, plug-ins, text classes, precision, files."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vidlab.attend import capture_attention
from vidlab.clip import CLIPBackbone, TINY, arch_dims
from vidlab.layers import unit, use_mlp
from vidlab.core import saved_bytes
from vidlab.models.tdsclip import PLUGINS, TDSCLIP, class_prompts, context_prompts, tdsclip
from vidlab.optim import make_optimizer, param_groups
from vidlab.registry import create_model

SMALL = {**TINY, 'image_size': 32, 'patch': 8, 'vocab': 50}


def make(seed=0, **kw):
    torch.manual_seed(seed)
    return TDSCLIP(CLIPBackbone(**SMALL), **{'classes': 6, **kw})


def clips(B=2, T=3, M=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return dict(video=torch.randn(B, T*M, 3, 32, 32, generator=g), video_mask=torch.ones(B, T*M, dtype=torch.bool))


def prompt_ids(C=4, n_ctx=2, seed=2):
    "Token ids of texts: start, words, end (the largest id), padding"
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(C, 12, dtype=torch.int64)
    for i in range(C):
        n = n_ctx + 2 + i % 3
        ids[i, :n+2] = torch.cat([torch.tensor([48]), torch.randint(1, 40, (n,), generator=g), torch.tensor([49])])
    return ids


def loss_of(m, b): return F.cross_entropy(m(b)['logits'], torch.arange(len(b['video'])))


# ---------------------------------------------------------------------------------------------------------------- memory and gradients
@pytest.mark.parametrize('arch', ['ViT-B-16', pytest.param('ViT-L-14', marks=pytest.mark.long)])
def test_published_memory(arch):
    "8 frames, 224 pixels: at most a third of full fine-tuning as autograd has it is kept, recomputing halves what the side network would keep"
    with FakeTensorMode():
        m = TDSCLIP(CLIPBackbone(**{**arch_dims(arch), 'text_layers': 1, 'vocab': 10, 'quick_gelu': True}))
        b = dict(video=torch.randn(1, 40, 3, 224, 224))
        f = lambda: m(b)['logits'].sum()
        frozen = saved_bytes(f, m)
        m.set_grad_checkpointing(); again = saved_bytes(f, m); m.set_grad_checkpointing(False)
        m.freeze('none'); ours = saved_bytes(f, m)
        use_mlp(m, once=False); full = saved_bytes(f, m)                        # hidden layers kept as often as autograd would
        m.freeze('all'); side = saved_bytes(f, m)
    assert frozen <= 0.33*full, f'{frozen/2**20:.0f} of {full/2**20:.0f} MiB'
    assert again <= 0.6*side and frozen < .9*side and ours < .72*full


def test_fake_tensors_count_right():
    real = make(); b = clips()
    mode = FakeTensorMode()
    with mode: fake = make(); c = dict(video=torch.randn(2, 15, 3, 32, 32))
    for policy in ('all', 'none'):
        real.freeze(policy); fake.freeze(policy)
        with mode: n = saved_bytes(lambda: fake(c)['logits'].sum(), fake)
        assert n == saved_bytes(lambda: real(b)['logits'].sum(), real)


@pytest.mark.parametrize('plugin', [None, *PLUGINS])
def test_gradients(plugin):
    "Everything that trains gets a gradient, CLIP gets none; the plug-in's parameters move and CLIP does not, though the optimiser is given everything"
    m = make(plugin=plugin).train(); b = clips()
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    opt = torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3): opt.zero_grad(); loss_of(m, b).backward(); opt.step()
    assert {n for n, p in m.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.grad is None and torch.equal(p, before['clip.' + n]) for n, p in m.clip.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in m.named_parameters() if n.startswith('plugins.'))
    if plugin in ('localuni', 't1d'): assert any(p.grad.any() for n, p in m.named_parameters() if n.endswith('pw_1.weight') and n.startswith('plugins'))


def test_tower_has_no_graph():
    m = make().train(); seen = []
    for blk in m.clip.visual.transformer.resblocks: blk.register_forward_hook(lambda mod, i, o: seen.append((o.requires_grad, torch.is_grad_enabled())))
    m(clips()); assert seen == [(False, False)]*3
    seen.clear(); m.freeze(2); m(clips())                 # the last block trains
    assert [g for g, _ in seen] == [False, False, True]
    seen.clear(); m.freeze('all'); m(dict(video=clips()['video'].requires_grad_()))      # pixels ask: relevance maps need the graph
    assert all(g for g, _ in seen)


def test_relevance_through_frozen_tower():
    m = make().eval(); v = clips()['video'].requires_grad_()
    with capture_attention(m, ['clip.visual*', 'side.*'], grad=True) as maps: m(dict(video=v))['logits'][:, 0].sum().backward()
    assert len(maps) == 6 and all(a[0].grad is not None for a in maps.values())
    side = maps['side.blocks.0.attn'][0]
    assert side.shape == (6, 1, 16, 17) and m.token_layout('side.blocks.0.attn') == dict(kind='side', prefix=1, grid=(4, 4))


def test_unfrozen_everything_trains():
    m = make(pool='transf').train(); m.freeze('none')
    loss_of(m, clips()).backward()
    assert {n for n, p in m.named_parameters() if p.grad is None} == set()
    for policy, kept in (('visual', 0), (['clip.visual.transformer.resblocks.0.*'], 3)):
        m.freeze(policy)
        assert any(p.requires_grad for n, p in m.named_parameters() if n.startswith('clip.')) == bool(kept)
    with pytest.raises(ValueError, match='matches no parameter'): m.freeze('visual.*')


# ---------------------------------------------------------------------------------------------------------------- the input
@pytest.mark.parametrize('M,T', [(1, 3), (3, 1), (5, 2), (7, 4)])
def test_neighbours(M, T):
    "Only the middle neighbour reaches CLIP; the others matter through differences, and alone nothing does"
    m = make(neighbours=M).eval(); b = clips(T=T, M=M)
    with torch.no_grad():
        out = m(b)['logits']; assert out.shape == (2, 6)
        x = b['video'].clone(); x[:, M//2::M] += 1
        assert not torch.allclose(m(dict(video=x))['logits'], out, atol=1e-4)
        if M > 1:
            shifted = m.side.stem(b['video'].unflatten(1, (T, M)) + 0.25) - m.side.stem(b['video'].unflatten(1, (T, M)))
            one = make(neighbours=1).eval(); one.side.stem.load_state_dict({k: v for k, v in m.side.stem.state_dict().items() if 'motion' not in k})
            c = b['video'][:, M//2::M, None]
            torch.testing.assert_close(shifted, one.side.stem(c + 0.25) - one.side.stem(c), rtol=1e-3, atol=1e-4)    # what is added to all neighbours is no motion
    with pytest.raises(ValueError, match='neighbours'): m(dict(video=torch.zeros(1, M*T + 1, 3, 32, 32))) if M > 1 else make(neighbours=2)


def test_order_of_frames_matters_and_batch_does_not():
    m = make().eval(); b = clips(B=3)
    with torch.no_grad():
        out = m(b)['logits']
        assert not torch.allclose(m(dict(video=b['video'].flip(1)))['logits'], out, atol=1e-4)
        torch.testing.assert_close(m(dict(video=b['video'][1:2]))['logits'], out[1:2], rtol=1e-4, atol=1e-5)
    bad = clips(B=3); bad['video_mask'][2, -1] = False
    with pytest.raises(ValueError, match='sids .*31'): m(dict(bad, sid=torch.tensor([11, 21, 31])))
    with pytest.raises(ValueError, match='more than 2 pixels'): TDSCLIP(CLIPBackbone(**{**SMALL, 'patch': 2}))


# ---------------------------------------------------------------------------------------------------------------- precision, regularisation
@pytest.mark.parametrize('plugin,pool', [(None, 'mean'), ('t1d', 'transf'), ('dividedst', 'mean')])
def test_bf16(plugin, pool):
    m = make(plugin=plugin, pool=pool).eval(); b = clips()
    with torch.no_grad(): full = m(b)['logits']
    with torch.autocast('cpu', torch.bfloat16): out = m(b)['logits']; loss = F.cross_entropy(out.float(), torch.tensor([0, 1]))
    loss.backward()
    assert (out.float() - full).abs().max() < 0.05*full.abs().max().clamp(min=1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    m.clip.to_official_half()
    with torch.no_grad(): assert (m(b)['logits'] - full).abs().max() < 0.02


def test_dropouts_act_in_training_only():
    a = make().eval(); b = clips()
    m = make(drop_path=0.9, embed_dropout=0.3, dropout=0.3); m.load_state_dict(a.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(m.eval()(b)['logits'], a(b)['logits'])
        m.clip.train(); m.training = True
        x = torch.randn(2*3, 17, 128)
        kept = [m.block(2, x, 3) - x for _ in range(30)]
    for y in kept:                                        # whole clips: all three frames of one are skipped or none
        for clip in y.unflatten(0, (2, 3)): assert (clip == 0).all() or (clip != 0).flatten(1).any(1).all()
    assert {bool((y[:3] == 0).all()) for y in kept} == {True, False}
    assert all((m.block(0, x, 3) - x).abs().sum() > 0 for _ in range(5))     # the first block is never skipped


def test_recomputing_is_exact():
    a, b, x = make(pool='transf', plugin='t1d').train(), make(pool='transf', plugin='t1d').train(), clips()
    b.set_grad_checkpointing()
    for m in (a, b): loss_of(m, x).backward()
    for p, q in zip(a.parameters(), b.parameters()):
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    for p, q in zip(a.buffers(), b.buffers()): assert torch.equal(p, q)


# ---------------------------------------------------------------------------------------------------------------- text classes
def test_text_classes_are_kept_while_they_are_right():
    m = make(head='text').train(); b = clips()
    assert m.card.side_dim == 64
    with pytest.raises(ValueError, match='set_classes'): m(b)
    m.set_classes(prompt_ids())
    calls = []; m.clip.ln_final.register_forward_hook(lambda *a: calls.append(1))
    for _ in range(3): loss_of(m, b).backward()
    assert len(calls) == 1 and m.clip.logit_scale.grad is None
    t = m.class_text(); m.clip.load_state_dict(make(seed=5, head='text').clip.state_dict())
    assert not torch.allclose(m.class_text(), t)                              # other weights, other texts
    m.set_classes(prompt_ids(7)); assert m(b)['logits'].shape == (2, 7) and m.card.classes == 7       # other classes, no training
    m.freeze('visual'); m.zero_grad(); loss_of(m, b).backward()
    assert m.clip.token_embedding.weight.grad is not None and m.clip.logit_scale.grad is not None
    twin = copy.deepcopy(m.eval())
    with torch.no_grad(): torch.testing.assert_close(twin(b)['logits'], m(b)['logits'])


def test_text_scores_and_templates():
    m = make(head='text').eval(); b = clips(); ids = torch.stack([prompt_ids(4, 2), prompt_ids(4, 3, seed=9)])
    m.set_classes(ids)
    with torch.no_grad():
        o = m(b)
        t = unit(m.encode_text(ids.flatten(0, 1))).unflatten(0, (2, 4)).mean(0)
        torch.testing.assert_close(o['logits'], o['logit_scale']*unit(o['video'])@unit(t).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m.similarity(o['text'], o['video']), o['logits'].T)
        with torch.autocast('cpu', torch.bfloat16): assert m(b)['logits'].dtype == torch.float32
    with pytest.raises(ValueError, match='side_dim'): make(head='text', side_dim=128)
    with pytest.raises(ValueError, match='no texts'): make().set_classes(ids)
    with pytest.raises(ValueError, match='no text tower'): TDSCLIP(make().clip, head='text')


@pytest.mark.parametrize('at', ['end', 'middle', 'front'])
@pytest.mark.parametrize('own', [False, True])
def test_learned_words(at, own):
    "Learned words train alone with the side network; put at the end they equal the words they start from"
    m = make(head='prompts', n_ctx=2, context_at=at, class_specific=own, classes=4).train(); ids = prompt_ids(4, 2)
    m.set_classes(ids, copy_context=True)
    if at == 'end' and own: torch.testing.assert_close(m.class_text(), m.encode_text(ids), rtol=1e-4, atol=1e-5)
    loss_of(m, clips()).backward()
    assert m.ctx.shape == ((4, 2, 64) if own else (2, 64)) and m.ctx.grad.abs().sum() > 0
    assert all(p.grad is None for p in m.clip.parameters())
    with torch.no_grad():
        t = m.eval().class_text(); m.ctx.add_(1.); assert not torch.allclose(m.class_text(), t)
    if own:
        with pytest.raises(ValueError, match='learned words for 4'): m.set_classes(prompt_ids(5))
    with pytest.raises(ValueError, match='places'): m.set_classes(torch.tensor([[48, 3, 49]]*4))


def test_prompt_texts():
    assert class_prompts(['a_b'], ('{}!', 'x {}')) == ['a b!', 'x a b'] and context_prompts(['yoga'], 3) == ['X X X yoga.']
    with pytest.raises(ValueError, match='n_ctx'): context_prompts(['yoga'], 3, 'two words')


# ---------------------------------------------------------------------------------------------------------------- groups and files
def test_optimiser_groups():
    m = make(plugin='localuni', pool='transf')
    every = {n for n, p in m.named_parameters() if p.requires_grad}
    g = m.official_groups(1e-3, 0.15, clip_ratio=0.1, accumulation=4)
    assert [x['lr'] for x in g] == pytest.approx([1e-4, 1e-3, 2.5e-4]) and set().union(*(x['names'] for x in g)) == every
    assert all('bn' in n for n in g[2]['names']) and not any('.bn' in n for n in g[0]['names'] if n.startswith('side.'))
    for decay in (None, 0.8):
        s = param_groups(m, 1e-3, 0.1, layer_decay=decay)
        assert set().union(*(x['names'] for x in s)) == every
        assert all(x['weight_decay'] == 0 for x in s if 'side.positions' in x['names'])
    make_optimizer('adamw', g)

def test_a_run_takes_the_official_groups():
    "groups=tdsclip: coef_lr for the whole visual part, the batch norms' rate divided by accum; of other models an error"
    from vidlab.build import build_optimizer
    from vidlab.config import make_config
    m = make()
    cfg = make_config(model='tdsclip', task='recognition', groups='tdsclip', lr=1e-3, coef_lr=.1, accum=4, weight_decay=.15)
    got, want = build_optimizer(cfg, m).param_groups, m.official_groups(1e-3, .15, .1, 4)
    assert [(g['name'], g['lr'], g['weight_decay'], g['names']) for g in got] == [(g['name'], pytest.approx(g['lr']), .15, g['names']) for g in want]
    with pytest.raises(ValueError, match="layer_decay does not go with rule='tdsclip'"): param_groups(m, 1e-3, layer_decay=.5, rule='tdsclip')
    with pytest.raises(ValueError, match="groups 'tdsclip' are those of model tdsclip, not of Linear"): param_groups(torch.nn.Linear(2, 2), 1e-3, rule='tdsclip')


@pytest.mark.parametrize('plugin', [None, *PLUGINS])
def test_official_file(plugin, tmp_path):
    "Export, `module.` in front, a container: the model built from the file alone gives the same"
    m = make(plugin=plugin, pool='transf').eval(); b = clips()
    with torch.no_grad(): [p.add_(0.02*torch.randn_like(p)) for p in m.parameters()]
    sd = m.to_official_state()
    torch.save(dict(epoch=3, model_state_dict={'module.' + k: v for k, v in sd.items()}), tmp_path/'best.pt')
    again = make(seed=1, plugin=plugin, pool='transf'); r = again.load_weights(tmp_path/'best.pt', exact=True)
    assert r.count('loaded') == len(sd) == len(m.state_dict())
    with torch.no_grad(): torch.testing.assert_close(again.eval()(b)['logits'], m(b)['logits'])
    new = tdsclip('tiny', checkpoint=tmp_path/'best.pt', plugin=plugin if plugin in ('tsm', 'tokenshift') else None).eval()     # the shifts leave no trace in a file
    with torch.no_grad(): torch.testing.assert_close(new(b)['logits'], m(b)['logits'])
    other = tdsclip('tiny', checkpoint=tmp_path/'best.pt', classes=9)
    assert other.fc.weight.shape[0] == 9 and set(other.report.names('new')) == {'fc.weight', 'fc.bias'} and torch.equal(other.side.positions, m.side.positions)
    assert ('.net.' in ''.join(sd)) == (plugin == 'tsm')


def test_files_of_other_kinds():
    m, full = make(), CLIPBackbone(**SMALL)
    r = m.load_weights(full.state_dict())
    assert torch.equal(m.clip.visual.conv1.weight, full.visual.conv1.weight) and 'clip.text_projection' in r.names('dropped') and 'fc.weight' in r.names('new')
    m.load_weights({'clip.' + k: v for k, v in full.state_dict().items()} | {'frame_position_embeddings.weight': torch.zeros(3, 3)})       # a CLIP4Clip
    with pytest.raises(ValueError, match='no rule|does not have'): m.load_weights(dict(full.state_dict(), extra=torch.zeros(1)))
    sd = make(seed=2, classes=8).state_dict()
    with pytest.raises(ValueError, match='another classifier'): m.load_weights(sd, exact=True)
    assert m.load_weights(sd).count('dropped') == 2
    with pytest.raises(ValueError, match='another shape'): make(side_dim=128).load_weights(sd)
    t = make(head='text'); t.load_weights(make(seed=3, head='text').state_dict(), exact=True)
    with pytest.raises(ValueError, match='linear classifier'): t.to_official_state()


def test_builder():
    m = create_model('tdsclip', preset='tiny', classes=4, neighbours=3, freeze='none')
    assert m.card.neighbours == 3 and all(p.requires_grad for p in m.parameters()) and sum(p.numel() for p in m.parameters()) < 2e6
    with pytest.raises(ValueError, match='say which weights'): create_model('tdsclip')
    with pytest.raises(ValueError, match='tsm'): make(plugin='tms')
    with pytest.raises(ValueError, match="did you mean 'side_dim'"): create_model('tdsclip', preset='tiny', side_dims=4)
    with torch.device('meta'): assert TDSCLIP(CLIPBackbone(**arch_dims('ViT-L-14-336'))).side.positions.shape == (576, 512)
