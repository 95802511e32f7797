"""CLIP weights from every kind of file, against open_clip's own model."""
import pytest
import torch
from torch import nn

from vidlab.ckpt import WeightsError
from vidlab.clip import CLIPBackbone, ClipCard, create_clip, load_clip

DIMS = dict(embed_dim=16, image_size=16, patch=4, vision_width=64, vision_layers=2, vision_heads=1, text_width=64, text_layers=2, text_heads=1, context=12, vocab=50)


class Named(nn.Module):
    "A module tree with the names of a state dict, to be saved as TorchScript like OpenAI's archives"
    def __init__(self, state):
        super().__init__()
        for k, v in state.items():
            m, (*way, leaf) = self, k.split('.')
            for w in way:
                if not hasattr(m, w): m.add_module(w, Empty())
                m = getattr(m, w)
            if v.is_floating_point(): m.register_parameter(leaf, nn.Parameter(v))
            else: m.register_buffer(leaf, v)
    def forward(self, x): return x


class Empty(nn.Module):
    def forward(self, x): return x


@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(0)
    return CLIPBackbone(**DIMS, quick_gelu=True).eval()


@pytest.fixture
def inputs(): return torch.randn(2, 3, 16, 16), torch.tensor([[48, 5, 49, 0], [48, 49, 0, 0]])


def same(a, b, inputs, tol=1e-6):
    x, ids = inputs
    torch.testing.assert_close(a.encode_image(x), b.encode_image(x), rtol=tol, atol=tol)
    torch.testing.assert_close(a.encode_text(ids), b.encode_text(ids), rtol=tol, atol=tol)


def test_openai_archive(clip, inputs, tmp_path):
    "TorchScript, fp16 matrices, three integers along: QuickGELU by its nature"
    half = CLIPBackbone(**DIMS, quick_gelu=True); half.load_state_dict(clip.state_dict()); half.to_official_half()
    state = dict(half.state_dict(), input_resolution=torch.tensor(16), context_length=torch.tensor(12), vocab_size=torch.tensor(50))
    torch.jit.save(torch.jit.script(Named(state)), str(tmp_path/'ViT.pt'))
    got = load_clip(tmp_path/'ViT.pt')
    assert got.card.quick_gelu and got.card.gelu_from == "OpenAI's archive" and len(got.card.sha256) == 64
    assert {p.dtype for p in got.parameters()} == {torch.float32} and got.report.count('dropped') == 3
    same(got, clip, inputs, 5e-3)


@pytest.mark.parametrize('kind', ['plain', 'openclip_pt', 'custom_text', 'safetensors'])
def test_layouts(clip, inputs, tmp_path, kind):
    sd = {k: v.contiguous() for k, v in clip.state_dict().items()}
    f = tmp_path/('w.safetensors' if kind == 'safetensors' else 'w.pt')
    text = lambda k: not k.startswith('visual.') and k != 'logit_scale'
    if kind == 'safetensors':
        from safetensors.torch import save_file
        save_file(sd, f)
    else: torch.save({'plain': sd, 'openclip_pt': {'epoch': 1, 'state_dict': {'module.'+k: v for k, v in sd.items()}},
                      'custom_text': {('text.'+k if text(k) else k): v for k, v in sd.items()}}[kind], f)
    with pytest.raises(ValueError, match='quick_gelu=True or False'): load_clip(f)
    same(load_clip(f, quick_gelu=True), clip, inputs)
    (tmp_path/'open_clip_config.json').write_text('{"model_cfg": {"quick_gelu": true}}')
    assert load_clip(f).card.gelu_from == 'open_clip_config.json'


def test_refuses(clip, tmp_path):
    sd = dict(clip.state_dict()); f = tmp_path/'w.pt'
    torch.save({**sd, 'visual.extra': torch.ones(1)}, f)
    with pytest.raises(WeightsError, match='visual.extra'): load_clip(f, quick_gelu=True)
    torch.save({k: v for k, v in sd.items() if k != 'ln_final.bias'}, f)
    with pytest.raises(WeightsError, match='ln_final.bias'): load_clip(f, quick_gelu=True)
    torch.save({**sd, 'ln_final.bias': torch.ones(3)}, f)
    with pytest.raises(WeightsError, match='another shape'): load_clip(f, quick_gelu=True)
    torch.save({'layer1.0.conv1.weight': torch.ones(1)}, f)
    with pytest.raises(WeightsError, match='not a CLIP'): load_clip(f, quick_gelu=True)
    torch.save(sd, f)
    with pytest.raises(ValueError, match='another architecture'): create_clip('tiny', str(f), quick_gelu=True)
    with pytest.raises(TypeError): CLIPBackbone(**DIMS, colour='red')


def test_tiny_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setenv('VIDLAB_CACHE', str(tmp_path))
    assert create_clip('tiny', 'random').card.image_size == 64


def test_matches_open_clip_gelu(inputs):
    "The other activation, and a block with another hidden width (open_clip's large models)"
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    torch.manual_seed(0)
    own = CLIP(16, CLIPVisionCfg(layers=2, width=64, patch_size=4, image_size=16, mlp_ratio=3.3), CLIPTextCfg(context_length=12, vocab_size=50, width=64, heads=1, layers=2)).eval()
    import tempfile, pathlib
    with tempfile.TemporaryDirectory() as d:
        torch.save(own.state_dict(), pathlib.Path(d)/'w.pt')
        got = load_clip(pathlib.Path(d)/'w.pt', quick_gelu=False).eval()
    x, ids = inputs
    torch.testing.assert_close(got.encode_image(x), own.encode_image(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.encode_text(ids), own.encode_text(nn.functional.pad(ids, (0, 8))), rtol=1e-5, atol=1e-5)


def test_backward_frozen_and_checkpointed(clip, inputs):
    "Gradients with recomputation equal those without; frozen parameters get none"
    c = CLIPBackbone(**DIMS, quick_gelu=True); c.load_state_dict(clip.state_dict()); c.freeze(1)
    grads = []
    for on in (False, True):
        c.set_grad_checkpointing(on); c.zero_grad()
        (c.encode_image(inputs[0]).sum() + c.encode_text(inputs[1]).sum()).backward()
        grads.append({n: p.grad.clone() for n, p in c.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and not any('resblocks.0' in n or 'embedding' in n for n in grads[0])
    for n in grads[0]: torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-5, atol=1e-6)


def test_card_is_plain(): assert ClipCard().grid == 7


def test_weights_of_the_hub_without_a_network(tmp_path, monkeypatch):
    "The hub is asked once, its cache never; what to do is said"
    import huggingface_hub
    from open_clip import pretrained
    from vidlab import clip as C
    asked = []
    def nobody(self, name, **kw):
        asked.append(name)
        raise ConnectionError('Name or service not known')
    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', nobody)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **kw: (_ for _ in ()).throw(FileNotFoundError('not in the cache')))
    monkeypatch.setattr(pretrained, 'download_pretrained', lambda cfg: pytest.fail('its loader tries for most of a minute'))
    with pytest.raises(ValueError, match="weights of ViT-B-32 'openai'.*not known.*hf download timm/vit_base_patch32_clip_224.openai.*in place of 'openai'"): create_clip('ViT-B-32', 'openai')
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **kw: str(tmp_path))
    for name in ('open_clip_model.safetensors', 'own.pt'): (tmp_path/name).touch()
    assert C._from_list(dict(hf_hub='a/b/'), 'x') == tmp_path/'open_clip_model.safetensors' and C._from_list(dict(hf_hub='a/b/own.pt'), 'x') == tmp_path/'own.pt'
    assert len(asked) == 1
