"Masks of pretraining and the CLIP teacher, against loops and against open_clip's own tower."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pages import execute
from vidlab.attend import attention_names
from vidlab.clip import CLIPBackbone
from vidlab.core import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, rng
from vidlab.data.transforms import normalise
from vidlab.masks import MASKS, drawn_order, hidden_mask, hide_last, keep_indices, paint_mask, take_visible, torch_gen, visible_tokens
from vidlab.teacher import Teacher, align_loss, aligned_blocks, create_teacher, pca_rgb, teacher_clip

IMAGENET = IMAGENET_MEAN, IMAGENET_STD

DIMS = dict(embed_dim=24, image_size=32, patch=8, vision_width=32, vision_layers=4, vision_heads=2, text_width=16, text_layers=1, text_heads=1, context=8, vocab=50, quick_gelu=True)

def make_clip(**kw):
    torch.manual_seed(0)
    clip = CLIPBackbone(**{**DIMS, **kw})
    for p in clip.parameters():
        if p.ndim < 2: nn.init.normal_(p, 0.5 if p.ndim else 1., .1)              # norms and biases that matter
    return clip

# ---------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('window,ratio', [((1, 3, 5), .5), ((4, 14, 14), .8), ((3, 7, 2), .9), ((2, 4, 4), 0.)])
def test_masks_hide_what_they_say(kind, window, ratio):
    T, h, w = window
    odds = torch.rand(T, h*w) if kind == 'attention' else None
    draw = lambda *keys: hidden_mask(kind, window, ratio, rng(*keys), odds)
    m = draw(0)
    assert m.shape == window and m.dtype == torch.bool and m.is_contiguous() and torch.equal(m, draw(0))
    n = dict(tube=T*int(ratio*(h*w)), random=int(ratio*(T*h*w)), frame_row=T*int(ratio*h)*w, clip_row=T*int(ratio*h)*w, attention=T*int(ratio*(h*w)))[kind]
    assert m.sum() == n
    if ratio and T*h > 3: assert any(not torch.equal(m, draw(i)) for i in range(1, 9))
    if kind == 'tube': assert (m == m[:1]).all()
    if kind.endswith('row'): assert (m == m[..., :1]).all()
    if kind in ('frame_row', 'attention'): assert len(m.sum((1, 2)).unique()) == 1

def test_masks_are_shuffled_zeros_and_ones():
    "The published draw, written as a loop over numpy's global functions"
    for seed in range(3):
        np.random.seed(seed); rows = []
        for _ in range(3):
            v = np.hstack([np.zeros(14 - int(.8*14)), np.ones(int(.8*14))]); np.random.shuffle(v); rows.append(v)
        got = hidden_mask('frame_row', (3, 14, 2), .8, np.random.RandomState(seed))
        assert np.array_equal(got[..., 0].numpy(), np.stack(rows).astype(bool))

def test_a_samples_mask_is_its_own():
    odds, window = torch.rand(3, 2, 12).square(), (2, 3, 4)
    for kind in MASKS:
        a = odds if kind == 'attention' else None
        full = visible_tokens(kind, window, .7, [rng(7, 0, s) for s in (4, 9, 2)], a)
        part = visible_tokens(kind, window, .7, [rng(7, 0, s) for s in (2, 4)], None if a is None else a[[2, 0]])
        assert torch.equal(part, full[[2, 0]]) and full[:, 0].all() and len(full.sum(1).unique()) == 1

def test_attention_mask_follows_the_odds():
    odds = torch.zeros(500, 10); odds[:, 3], odds[:, 5] = 3., 1.
    first = drawn_order(odds, torch.Generator().manual_seed(0))[:, 0]
    assert set(first.tolist()) == {3, 5} and abs((first == 3).float().mean() - .75) < .06
    assert (~hide_last(drawn_order(odds, torch.Generator().manual_seed(0)), .8)).nonzero()[:, 1].unique().tolist() == [3, 5]
    flat = drawn_order(torch.zeros(400, 5, dtype=torch.bfloat16), torch_gen(rng(1)))[:, 0]
    assert flat.bincount().min() > 40                                               # an attention of zeros has even odds
    a, b = rng(3), rng(3)
    assert torch_gen(a).initial_seed() == torch_gen(b).initial_seed() != torch_gen(a).initial_seed()

@pytest.mark.parametrize('call,match', [(lambda: hidden_mask('row', (1, 2, 2), .5, rng(0)), 'clip_row'), (lambda: hidden_mask('tube', (1, 2, 2), 1.2, rng(0)), '1.2'),
    (lambda: hidden_mask('tube', (1, 2, 2), .5, rng(0), torch.ones(1, 4)), 'takes no attention'), (lambda: keep_indices(2, 9, 1., [rng(0)]), 'drop ratio 1.0'),
    (lambda: visible_tokens('attention', (2, 2, 2), .5, [rng(0)], torch.rand(1, 4, 4)), 'number of frames'), (lambda: take_visible(torch.zeros(2, 5, 3), torch.ones(2, 6).bool()), '6 tokens'),
    (lambda: paint_mask(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 2, 2).bool()), 'does not divide')])
def test_wrong_masks(call, match):
    with pytest.raises(ValueError, match=match): call()

def test_take_visible_passes_gradients():
    x, v = torch.randn(2, 3, 9, 4, requires_grad=True), visible_tokens('random', (2, 2, 2), .5, [rng(i) for i in range(3)])
    y = take_visible(x, v)
    assert torch.equal(y, torch.stack([torch.stack([x[k, b, v[b]] for b in range(3)]) for k in range(2)]))
    y.sum().backward()
    assert torch.equal(x.grad, v[None, ..., None].expand_as(x).float())

def test_keep_indices():
    k = keep_indices(5, 16, .75, [rng(0, s) for s in range(4)])
    assert k.shape == (4, 5, 4) and k.dtype == torch.int64 and all(len(set(r.tolist())) == 4 for r in k.flatten(0, 1))
    assert torch.equal(k[2], keep_indices(5, 16, .75, [rng(0, 2)])[0]) and not torch.equal(k[0], k[1])

# ---------------------------------------------------------------------------------------------------- teacher

def official(clip, x, block): # x (N,3,S,S) as the tower sees it -> tokens after a block, mean attention of the last block; open_clip's own modules
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    d = {**DIMS, **{k: getattr(clip.card, k) for k in DIMS}}
    own = CLIP(d['embed_dim'], CLIPVisionCfg(layers=d['vision_layers'], width=d['vision_width'], head_width=d['vision_width']//d['vision_heads'], patch_size=d['patch'], image_size=d['image_size']),
               CLIPTextCfg(context_length=d['context'], vocab_size=d['vocab'], width=d['text_width'], heads=1, layers=1), quick_gelu=True).eval()
    own.load_state_dict(clip.state_dict())
    seen = {}
    v = own.visual
    for i, b in enumerate(v.transformer.resblocks): b.register_forward_hook(lambda m, a, y, i=i: seen.__setitem__(i, y))
    v.transformer.resblocks[-1].ln_1.register_forward_hook(lambda m, a, y: seen.__setitem__('in', y))
    with torch.no_grad():
        v(x)
        att = v.transformer.resblocks[-1].attn(seen['in'], seen['in'], seen['in'], need_weights=True, average_attn_weights=True)[1]
        return seen[block] @ v.proj, v.ln_post(seen[block]) @ v.proj, att[:, 0, 1:]

@pytest.fixture(scope='module')
def pixels(): return torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def test_teacher_says_what_open_clip_computes(pixels):
    clip = make_clip()
    shown = normalise(pixels, CLIP_MEAN, CLIP_STD).flatten(0, 1)
    out = Teacher(clip, layers=2, interval=2, attention=True, norm='none', chunk=5)(normalise(pixels, *IMAGENET))
    bare = Teacher(clip, layers=2, interval=2, cls=False, norm='l2')(normalise(pixels, *IMAGENET))
    for k, block in enumerate((1, 3)):
        raw, normed, att = official(clip, shown, block)
        raw, normed = raw.unflatten(0, (2, 6)), normed.unflatten(0, (2, 6))
        torch.testing.assert_close(out['features'][k], torch.cat([raw[:, :, 0].mean(1, keepdim=True), raw[:, :, 1:].flatten(1, 2)], 1), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(bare['features'][k], F.normalize(normed[:, :, 1:].flatten(1, 2), dim=-1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out['attention'].flatten(0, 1), att, atol=1e-6, rtol=1e-4)
    assert set(bare) == {'features'}

def test_published_input_is_the_students(pixels):
    clip, x = make_clip(), normalise(pixels, *IMAGENET)
    raw = official(clip, x.flatten(0, 1), 3)[0].unflatten(0, (2, 6))[:, :, 1:].flatten(1, 2)
    for mean, std in (IMAGENET, ((.5,)*3, (.5,)*3)):                                # whatever the student's card says
        got = Teacher(clip, input='imagenet', mean=mean, std=std, norm='none')(normalise(pixels, mean, std))['features'][0, :, 1:]
        torch.testing.assert_close(got, raw, atol=5e-5, rtol=1e-4)

def test_other_sizes(pixels):
    "Positions and frames are resampled as the published code does, without antialiasing"
    x, clip = normalise(pixels, *IMAGENET), make_clip()
    pos = clip.visual.positional_embedding.data
    for size in (48, 16):
        t = Teacher(make_clip(), image_size=size, input='imagenet', norm='none'); n = size//8
        want = F.interpolate(pos[1:].T.view(1, -1, 4, 4), (n, n), mode='bicubic', align_corners=False).flatten(2)[0].T
        torch.testing.assert_close(t.clip.visual.positional_embedding.data, torch.cat([pos[:1], want]))
        small = F.interpolate(x.flatten(0, 1), (size, size), mode='bicubic', align_corners=False).unflatten(0, (2, 6))
        assert torch.equal(t(x)['features'], t(small)['features']) and t.window(6) == (6, n, n)

@pytest.mark.parametrize('how', ['centre', 'mean'])
def test_tubelets_are_a_three_dimensional_convolution(pixels, how):
    x, k = normalise(pixels, *IMAGENET), 3
    t = Teacher(make_clip(), tubelet=k, inflate=how, input='imagenet', norm='none')
    w = make_clip().visual.conv1.weight.data
    w3 = torch.stack([torch.zeros_like(w), w, torch.zeros_like(w)], 2) if how == 'centre' else w[:, :, None].repeat(1, 1, k, 1, 1)/k
    torch.testing.assert_close(t.clip.visual.conv1.weight.data.unflatten(1, (3, k)), w3)
    grid = F.conv3d(x.transpose(1, 2), w3, stride=(k, 8, 8)).transpose(1, 2).flatten(0, 1)                  # (B*T' d h w)
    tokens = grid.flatten(2).transpose(1, 2)
    v = t.clip.visual
    tokens = v.ln_pre(torch.cat([v.class_embedding.expand(4, 1, -1), tokens], 1) + v.positional_embedding)
    with torch.no_grad(): want = (v.transformer(tokens) @ v.proj).unflatten(0, (2, 2))
    torch.testing.assert_close(t(x)['features'][0, :, 1:], want[:, :, 1:].flatten(1, 2), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='no multiple of the tubelet 3'): t(x[:, :4])

def test_teacher_is_no_part_of_the_model(pixels):
    class Task(nn.Module):
        def __init__(self): super().__init__(); self.student, self.teacher = nn.Linear(2, 2), Teacher(make_clip())
    task = Task().train()
    assert list(task.state_dict()) == ['student.weight', 'student.bias'] and len(list(task.parameters())) == 2
    assert not task.teacher.clip.training and not any(p.requires_grad for p in task.teacher.clip.parameters())
    x = normalise(pixels, *IMAGENET).requires_grad_()
    out = task.teacher(x)
    assert not out['features'].requires_grad
    handles = [len(m._forward_hooks) for m in attention_names(task.teacher.clip).values()]
    assert sum(handles) == 0                                                        # looking leaves nothing behind

def test_half_precision(pixels):
    t, x = Teacher(make_clip(), layers=2, attention=True), normalise(pixels, *IMAGENET)
    full = t(x)
    with torch.autocast('cpu', torch.bfloat16): half = t(x)
    assert half['features'].dtype == half['attention'].dtype == torch.float32
    assert (half['features']-full['features']).abs().max() < .05 and (half['attention']-full['attention']).abs().max() < .02
    torch.testing.assert_close(half['features'].norm(dim=-1), torch.ones(half['features'].shape[:-1]), atol=1e-5, rtol=0)

@pytest.mark.parametrize('cut,time,wrap', [(False, 0, None), (True, 1, 'model'), (True, 2, None), (False, 2, 'module')])
def test_files_with_the_image_tower_alone(tmp_path, pixels, cut, time, wrap):
    clip, x = make_clip(), normalise(pixels, *IMAGENET)
    sd = {('' if cut else 'visual.') + k: v for k, v in clip.visual.state_dict().items()}
    key = next(k for k in sd if k.endswith('conv1.weight'))
    if time: sd[key] = torch.stack([sd[key]*(i == time-1) for i in range(time)], 2)
    torch.save({wrap: sd} if wrap else sd, tmp_path/'v.pth')
    t = create_teacher(str(tmp_path/'v.pth'), vision_heads=2)
    assert t.tubelet == max(1, time) and t.clip.card.quick_gelu and t.clip.report.count('loaded') == len(sd)
    torch.testing.assert_close(t(x)['features'], Teacher(clip)(x[:, max(1, time)-1::max(1, time)])['features'], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='vision_heads'): teacher_clip(str(tmp_path/'v.pth'))
    with pytest.raises(ValueError, match='another architecture than ViT-B-32'): teacher_clip('ViT-B-32', str(tmp_path/'v.pth'), vision_heads=2)
    if time == 2:
        with pytest.raises(ValueError, match='spans 2 frames'): create_teacher(str(tmp_path/'v.pth'), vision_heads=2, tubelet=4)

def test_whole_clip_files_and_names(tmp_path, pixels):
    clip, x = make_clip(text_width=64), normalise(pixels, *IMAGENET)
    torch.save(clip.state_dict(), tmp_path/'whole.pt')
    t = create_teacher(str(tmp_path/'whole.pt'), quick_gelu=True, vision_heads=2)
    torch.testing.assert_close(t(x)['features'], Teacher(clip)(x)['features'])
    assert create_teacher('tiny', 'random').dim == 64
    with pytest.raises(TypeError, match='layer'): create_teacher('tiny', 'random', layer=2)
    with pytest.raises(ValueError, match='4 different blocks'): create_teacher('tiny', 'random', layers=4)

@pytest.mark.parametrize('x', [torch.zeros(2, 3, 32, 32), torch.zeros(1, 2, 3, 32, 24), torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)])
def test_wrong_clips(x):
    with pytest.raises(ValueError, match='normalised square frames'): Teacher(make_clip())(x)

def test_alignment_loss():
    s, t = F.normalize(torch.randn(2, 3, 5, 7), dim=-1).requires_grad_(), F.normalize(torch.randn(2, 3, 5, 7), dim=-1)
    want = np.mean([2 - 2*float(a @ b) for a, b in zip(s.detach().flatten(0, 2), t.flatten(0, 2))])
    torch.testing.assert_close(float(align_loss(s, t).detach()), want, atol=1e-5, rtol=0)
    d = (s-t).detach().abs()
    torch.testing.assert_close(align_loss(s, t, 'smooth_l1').detach(), torch.where(d < 1, d*d/2, d-.5).mean())
    assert align_loss(s.bfloat16(), t.bfloat16()).dtype == torch.float32
    align_loss(s, t, 'mse').backward(); torch.testing.assert_close(s.grad, 2*(s-t).detach()/s.numel())

def test_pca_colours():
    x = torch.randn(4, 6, 10)*torch.tensor([9., 5., 3.] + [.1]*7)
    c = pca_rgb(x)
    assert c.shape == (4, 6, 3) and c.min() >= 0 and c.max() <= 1
    r = np.corrcoef(c.flatten(0, 1).T, x[..., :3].flatten(0, 1).T)[:3, 3:]
    assert (np.abs(np.diag(r)) > .8).all()
    assert aligned_blocks(32, 6, 2) == [21, 23, 25, 27, 29, 31]

@pytest.mark.slow
def test_page_of_one_video(outputs, tmp_path):
    "The run page with its own video, an untrained teacher and other settings"
    from vidlab.data.shapes import encode, shapes_item
    encode(tmp_path/'a.mp4', shapes_item('clips', 'test', 0)[0])
    execute('teacher.ipynb', clip='tiny', weights='random', video=str(tmp_path/'a.mp4'), frames=4, layers=3, norm='none', input='imagenet', ratio=.5)
    npz = np.load(next((tmp_path/'outputs').glob('teacher/*/figs/teacher.npz')))
    assert npz['features'].shape == (3, 1 + 4*16, 64) and npz['hidden'].sum() == 4*8 and npz['blocks'].tolist() == [0, 1, 2]
