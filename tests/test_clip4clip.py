"""CLIP4Clip at its published size (no memory: meta tensors), under autocast, and its files."""
import pytest
import torch

from vidlab.ckpt import WeightsError
from vidlab.clip import CLIPBackbone, TINY, arch_dims
from vidlab.losses import contrastive
from vidlab.models.clip4clip import CLIP4Clip, HEADS, clip4clip, describe
from vidlab.mug import MugHead
from vidlab.registry import create_model

PUBLISHED = {('meanP', '2d'): 151.28, ('meanP', '3d'): 158.36, ('seqLSTM', '2d'): 153.42, ('seqTransf', '2d'): 163.93, ('tightTransf', '2d'): 164.19}


@pytest.mark.parametrize('head,patch', PUBLISHED)
def test_published_size(head, patch):
    "Parameter counts, shapes and storage types of the official checkpoints"
    dims = dict(arch_dims('ViT-B-32'), quick_gelu=True)
    with torch.device('meta'): m = CLIP4Clip(CLIPBackbone(**dims), head, patch)
    sd = {n: (tuple(p.shape)) for n, p in m.named_parameters()}
    assert round(sum(p.numel() for p in m.parameters())/1e6, 2) == PUBLISHED[head, patch]
    assert set(m.state_dict()) == set(sd)       # no buffers in the file
    half = set(m.clip.half_names())
    assert sd['clip.visual.transformer.resblocks.11.mlp.c_fc.weight'] == (3072, 768) and sd['clip.text_projection'] == (512, 512)
    assert {'visual.proj', 'visual.conv1.weight', 'transformer.resblocks.0.attn.in_proj_bias', 'transformer.resblocks.0.mlp.c_proj.bias'} <= half
    assert not half & {'logit_scale', 'token_embedding.weight', 'visual.class_embedding', 'visual.ln_pre.weight', 'positional_embedding'}
    if head in ('seqTransf', 'tightTransf'): assert sd[('transformerClip' if head == 'seqTransf' else 'cross.transformer') + '.resblocks.3.attn.in_proj_weight'] == (1536, 512)
    if patch == '3d': assert sd['clip.visual.conv2.weight'] == (768, 3, 3, 32, 32)


def make(head, patch='2d', seed=0):
    torch.manual_seed(seed)
    return CLIP4Clip(CLIPBackbone(**{**TINY, 'vocab': 50}), head, patch, 1, 2, max_words=8, max_frames=4)


def score(m, o): return m.similarity(**{k: v for k, v in o.items() if k != 'logit_scale'})


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return dict(video=torch.randn(3, 4, 3, 64, 64), video_mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]), text=torch.randint(1, 48, (3, 6)))


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('patch', ['2d', '3d'])
def test_bf16_and_gradients(head, patch, batch):
    "Autocast trains; its scores stay float32 and near the full ones; everything trainable gets a gradient"
    m = make(head, patch).train()
    with torch.autocast('cpu', torch.bfloat16):
        o = m(batch); s = score(m, o)
    assert s.dtype == torch.float32 and o['video'].dtype == torch.float32
    contrastive(s).backward()
    assert {n for n, p in m.named_parameters() if p.requires_grad and p.grad is None} == set()
    if head != 'tightTransf':
        with torch.no_grad():
            full = score(m, m(batch))
        assert (full - s).abs().max() < 0.05*m.logit_scale.exp()


@pytest.mark.parametrize('head', HEADS)
def test_padding_does_not_matter(head, batch):
    "What padding frames hold and how many there are changes no score"
    m = make(head).eval()
    t, words = m.encode_text(batch['text']), m(batch)['text_mask']
    score = lambda v, k: m.similarity(t, m.encode_video(v, k), k, words)
    a = score(batch['video'][1:2], batch['video_mask'][1:2])
    torch.testing.assert_close(score(batch['video'][1:2, :1], batch['video_mask'][1:2, :1]), a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(batch['video'][1:2]*batch['video_mask'][1:2, :, None, None, None], batch['video_mask'][1:2]), a, rtol=1e-4, atol=1e-5)
    both = score(batch['video'], batch['video_mask'])
    torch.testing.assert_close(both[:, 1:2], a, rtol=1e-4, atol=1e-5)     # nor does the company in the batch


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('patch', ['2d', '3d'])
def test_official_file_round_trip(head, patch, batch, tmp_path):
    a, f = make(head, patch), tmp_path/'pytorch_model.bin.0'
    torch.save(a.to_official_state(), f)
    b = make(head, patch, seed=1); b.load_weights(f, exact=True)
    for n, p in b.state_dict().items(): torch.testing.assert_close(p, a.to_official_state()[n].float(), rtol=0, atol=0)
    c = clip4clip('tiny', checkpoint=f, temporal_heads=2)
    kind = 'meanP' if head == 'mug' else head           # the file of a mug model is that of a meanP model
    assert (c.head, c.patch) == (kind, patch) and c.state_dict().keys() == a.state_dict().keys()
    assert describe(a.state_dict())['head'] == kind
    other = make('meanP' if head != 'meanP' else 'seqTransf', seed=2); r = other.load_weights(f)
    assert torch.equal(other.clip.visual.proj, b.clip.visual.proj) and (kind == 'meanP' or r.count('dropped'))


def test_mug_head(batch, tmp_path):
    "Mug scores the projected tokens with CLIP's temperature; its weights, where it has some, survive files and the builder"
    m = make('mug'); o = m(batch)
    tokens = m.clip.encode_text(batch['text'], tokens=True)[1] @ m.clip.text_projection
    torch.testing.assert_close(o['text'], tokens)
    torch.testing.assert_close(score(m, o), m.logit_scale.exp()*MugHead()(tokens, o['text_mask'], o['video'], o['video_mask']))
    end = batch['text'].argmax(1)
    torch.testing.assert_close(o['text'][range(3), end], make('meanP')(batch)['text'])
    own = dict(batch, text_mask=torch.tensor([[1]*4 + [0]*2]*3))
    assert torch.equal(m(own)['text_mask'], own['text_mask'])
    with pytest.raises(ValueError, match='give text_mask'): m.similarity(o['text'], o['video'], o['video_mask'])
    drl = CLIP4Clip(m.clip, 'mug', mug_mode='drl_wti', max_words=8, max_frames=4)
    assert {n for n, _ in drl.named_parameters() if not n.startswith('clip.')} == {f'mug.{s}_weight_fc.{p}' for s in ('text', 'video') for p in ('weight', 'bias')}
    torch.save(drl.to_official_state(), tmp_path/'drl.bin')
    c = clip4clip('tiny', checkpoint=tmp_path/'drl.bin')
    assert (c.head, c.mug.mode) == ('mug', 'drl_wti') and torch.equal(c.mug.text_weight_fc.weight, drl.mug.text_weight_fc.weight)
    assert clip4clip('tiny', head='mug', mug_mode='full', mug_tau=50.).mug.extra_repr() == "mode='full', tau=50"
    with pytest.raises(WeightsError, match='mug/2d'): make('meanP').load_weights(tmp_path/'drl.bin', exact=True)
    assert 'mug.text_weight_fc.bias' in make('meanP').load_weights(tmp_path/'drl.bin').names('dropped')
    assert 'mug.text_weight_fc.bias' in drl.load_weights(make('meanP').state_dict()).names('new')


def test_plain_clip_as_weights(tmp_path):
    clip = CLIPBackbone(**{**TINY, 'vocab': 50}); torch.save(clip.state_dict(), tmp_path/'clip.pt')
    m = make('seqTransf', '3d', seed=3); m.load_weights(tmp_path/'clip.pt')
    assert torch.equal(m.transformerClip.resblocks[0].mlp.c_fc.weight, clip.transformer.resblocks[0].mlp.c_fc.weight)
    assert torch.equal(m.clip.visual.conv2.weight[:, :, 1], clip.visual.conv1.weight)


def test_builder_contract():
    m = create_model('clip4clip', preset='tiny')
    assert m.card.size == 64 and len(m.card.mean) == 3 and m.card.frames >= 1 and m.card.words >= 1
    names = {n for n, _ in m.named_parameters()}
    assert {m.layer_of(n) for n in names} == set(range(5)) and m.no_decay() <= names
    assert {m.token_layout(n)['kind'] for n in ('clip.visual.transformer.resblocks.0.attn', 'clip.transformer.resblocks.0.attn')} == {'image', 'text'}


def test_a_tight_head_contrasts_its_own_batch_as_released(monkeypatch):
    from vidlab.tasks import RetrievalTask
    seen = []
    monkeypatch.setattr('vidlab.tasks.retrieval.gather_dict', lambda d, how: seen.append(how) or d)
    for head, gather in (('tightTransf', 'official'), ('meanP', 'official'), ('tightTransf', 'full')):
        model = create_model('clip4clip', preset='tiny', weights='random', head=head)
        RetrievalTask(model, gather=gather)(model.example())
    assert seen == ['local', 'official', 'full']
