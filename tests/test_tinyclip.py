"The tiny CLIP: what a step learns from, the cache, the same twice"
import pytest
import torch
from vidlab import tinyclip as tc
from vidlab.clip import create_clip
from vidlab.core import file_hash, read_json
from vidlab.data.shapes import STILL_CAPTIONS, make_shapes

SIZES = dict(stills=dict(train=90, val=1, test=90))


@pytest.fixture(scope='module')
def root(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), 'stills', sizes=SIZES)


def test_stills(root):
    x, y, captions = tc.load_stills(root)
    assert x.shape == (90, 3, 64, 64) and x.dtype == torch.uint8
    assert captions == STILL_CAPTIONS and y.tolist() == list(range(90))


def test_loss_is_the_plain_contrastive_one_for_one_picture_per_caption(root):
    from vidlab.data.text import tokenize
    from vidlab.losses import contrastive
    m = tc.start_tiny(0).eval()
    x, ids = torch.randn(6, 3, 64, 64), tokenize(STILL_CAPTIONS[:6], 9)[0]
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        v, t = (torch.nn.functional.normalize(e.float(), dim=-1) for e in (m.encode_image(x), m.encode_text(ids)))
    with torch.no_grad(): assert tc.clip_loss(m, x, ids, 1).item() == pytest.approx(contrastive(m.logit_scale.exp()*t @ v.T).item(), rel=2e-2)


def test_a_few_steps_learn_and_are_repeatable(root):
    a, acc = tc.train_tiny(root, steps=8, per_class=1, seed=3)
    b, _ = tc.train_tiny(root, steps=8, per_class=1, seed=3)
    assert 0 <= acc <= 1
    start = tc.start_tiny(3).state_dict()
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.visual.conv1.weight, start['visual.conv1.weight'])


def test_cache(root, tmp_path, monkeypatch):
    monkeypatch.setenv('VIDLAB_CACHE', str(tmp_path))
    monkeypatch.setattr(tc, 'make_shapes', lambda kinds: root)
    card = tc.tiny_clip(steps=2, per_class=1)
    path = tmp_path/'clip'/'tiny_shapes.safetensors'
    before = path.stat().st_mtime_ns
    assert tc.tiny_clip(steps=2, per_class=1) == card == read_json(path.with_suffix('.json'))
    assert path.stat().st_mtime_ns == before
    with monkeypatch.context() as m:                                # what was trained with other settings is not the default one
        m.setattr(tc, 'start_tiny', lambda seed: pytest.fail(f'trains again, seed {seed}'))
        with pytest.raises(pytest.fail.Exception, match='seed 0'): tc.tiny_clip()
    with pytest.raises(ValueError, match="did you mean 'steps'"): tc.tiny_clip(step=2)
    clip = create_clip('tiny')
    assert clip.card.quick_gelu and clip.card.sha256 == card['sha256']
    path.write_bytes(path.read_bytes()[:-10])                       # damaged: made again
    assert tc.tiny_clip(steps=2, per_class=1)['sha256'] == card['sha256']
    assert file_hash(path) == card['sha256']                        # whole again
