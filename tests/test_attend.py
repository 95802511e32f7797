"Capture sees every softmax of a tower, whichever attention open_clip's version puts into the blocks, or says what it does not see."
import dataclasses, types
import pytest, torch
from open_clip.model import CLIPVisionCfg
from open_clip.transformer import Attention
from torch import nn

from vidlab.attend import attention_names, capture_attention, unseen_attention
from vidlab.clip import CLIPBackbone, TINY
from vidlab.explain import kinds_of, patch_maps
from vidlab.layers import MultiHeadAttention, OpenAttention, use_attend
from vidlab.registry import create_model
from vidlab.tasks import RetrievalTask

LAYERS = [f'visual.transformer.resblocks.{i}.attn' for i in range(3)] + [f'transformer.resblocks.{i}.attn' for i in range(2)]
CUSTOM = 'block_type' in {f.name for f in dataclasses.fields(CLIPVisionCfg)}


def blocks(clip): return [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]


def as_version_4(clip):
    "Blocks that hold open_clip's `Attention`, called as version 4 calls it"
    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None): return self.attn(q_x, attn_mask=attn_mask)
    for b in blocks(clip):
        if type(b.attn) is not nn.MultiheadAttention: continue                # version 4 is here
        new = Attention(b.attn.embed_dim, b.attn.num_heads)
        new.load_state_dict(b.attn.state_dict())
        b.attn, b.attention = new, types.MethodType(attention, b)
    return clip


def untouched(kind, monkeypatch):
    "A tiny CLIP as open_clip makes it"
    extra = {}
    if kind != 'default' and not CUSTOM: pytest.skip('this open_clip has no custom blocks')
    if kind in ('custom', 'normed'): extra = {f'{t}_extra': dict(block_type='custom', **(dict(qk_norm=True) if kind == 'normed' else {})) for t in ('vision', 'text')}
    with monkeypatch.context() as m:
        m.setattr('vidlab.clip.use_attend', lambda model: model)
        torch.manual_seed(0)
        clip = CLIPBackbone(**TINY, **extra).eval()
    for b in blocks(clip): nn.init.normal_(b.attn.in_proj_bias, std=.1)
    return as_version_4(clip) if kind == 'version 4' else clip


@torch.no_grad()
def outputs(clip):
    gen = torch.Generator().manual_seed(1)
    x, ids = torch.randn(2, 3, 64, 64, generator=gen), torch.randint(1, 1000, (3, 9), generator=gen)
    return clip.encode_image(x), clip.encode_text(ids)


@pytest.mark.parametrize('kind', ['default', 'custom', 'version 4'])
def test_every_softmax_is_seen(kind, monkeypatch):
    clip = untouched(kind, monkeypatch)
    if kind != 'default': assert {type(b.attn) for b in blocks(clip)} == {Attention}
    names, want = list(clip.state_dict()), outputs(clip)
    weights = [b.attn.in_proj_weight for b in blocks(clip)]
    assert attention_names(clip) == {} and sorted(unseen_attention(clip)) == sorted(LAYERS)
    with pytest.raises(ValueError, match="5 attention layers match '\\*', of which 0 go through Attend; 5 do not: .*resblocks"): capture_attention(clip).__enter__()
    use_attend(clip)
    assert {type(b.attn) for b in blocks(clip)} <= {MultiHeadAttention, OpenAttention} and list(clip.state_dict()) == names
    assert all(b.attn.in_proj_weight is w for b, w in zip(blocks(clip), weights))
    for got, ref in zip(outputs(clip), want): torch.testing.assert_close(got, ref, atol=3e-6, rtol=0)          # other kernels, other order of sums
    with capture_attention(clip) as maps: seen = outputs(clip)
    for got, ref in zip(seen, outputs(clip)): assert torch.equal(got, ref)
    assert sorted(maps) == sorted(LAYERS)
    for n, (a,) in maps.items():
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]), atol=1e-5, rtol=0)
        if not n.startswith('visual'): assert a.triu(1).abs().max() == 0                                       # the causal mask arrived
    assert unseen_attention(clip) == {}


@pytest.mark.parametrize('kind', ['default', 'custom', 'version 4'])
def test_maps_are_those_of_the_weights(kind, monkeypatch):
    "The map of the first layer, from the projections by hand"
    clip = use_attend(untouched(kind, monkeypatch))
    x = torch.randn(2, 3, 64, 64)
    with capture_attention(clip, LAYERS[0]) as maps, torch.no_grad(): clip.encode_image(x)
    b = blocks(clip)[0]
    with torch.no_grad():
        y = b.ln_1(clip.embed_image(x))
        q, k, _ = nn.functional.linear(y, b.attn.in_proj_weight, b.attn.in_proj_bias).chunk(3, -1)
        head = [(q[..., h:h+64] @ k[..., h:h+64].mT / 8).softmax(-1) for h in (0, 64)]
    torch.testing.assert_close(maps[LAYERS[0]][0], torch.stack(head, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['default', 'custom', 'version 4'])
def test_gradients_of_maps(kind, monkeypatch):
    clip = use_attend(untouched(kind, monkeypatch))
    with capture_attention(clip, 'visual.*', grad=True) as maps: out = clip.encode_image(torch.ones(1, 3, 64, 64))
    out.sum().backward()
    assert len(maps) == 3 and all(m[0].grad is not None and m[0].grad.abs().max() > 0 for m in maps.values())


def test_what_cannot_be_exchanged_is_said(monkeypatch):
    "Attention with norms of its own keeps working, and is no silence"
    clip = untouched('normed', monkeypatch)
    want = outputs(clip)
    use_attend(clip)
    for got, ref in zip(outputs(clip), want): assert torch.equal(got, ref)
    with pytest.raises(ValueError, match='5 do not: .*open_clip.transformer.Attention'): capture_attention(clip).__enter__()


def test_one_of_five_is_missed():
    clip = CLIPBackbone(**TINY)
    clip.visual.transformer.resblocks[1].attn = nn.MultiheadAttention(128, 2, batch_first=True)
    with pytest.raises(ValueError, match="5 attention layers match '\\*', of which 4 go through Attend; 1 do not: visual.transformer.resblocks.1.attn"): capture_attention(clip).__enter__()
    with capture_attention(clip, 'transformer.*') as maps: clip.encode_text(torch.ones(1, 4, dtype=torch.long))
    assert len(maps) == 2 and all(len(m) == 1 for m in maps.values())


class Softmax(nn.Module):
    "A layer of a library nobody knows"
    def forward(self, x, **kw): return x


def test_a_block_without_any_attention_class_is_missed_too():
    clip = CLIPBackbone(**TINY)
    clip.visual.transformer.resblocks[0].attn = Softmax()
    assert list(unseen_attention(clip)) == ['visual.transformer.resblocks.0']


@pytest.mark.parametrize('method', ['raw', 'rollout', 'relevance'])
def test_a_picture_of_an_unseen_tower_is_an_error(method, monkeypatch):
    model = create_model('clip4clip', clip='random', head='meanP')
    model.clip.visual = untouched('version 4', monkeypatch).visual
    task = RetrievalTask(model)
    text = torch.randint(1, 1000, (1, 8)); text[:, -1] = 49407
    b = dict(video=torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), video_mask=torch.ones(1, 2, dtype=torch.bool), text=text, text_mask=torch.ones_like(text, dtype=torch.bool))
    assert kinds_of(model)['image'] == ['clip.' + n for n in LAYERS[:3]]
    with pytest.raises(ValueError, match='go through Attend'): patch_maps(task, b, method)
    use_attend(model)
    assert patch_maps(task, b, method).shape == (1, 2, 4, 4)
