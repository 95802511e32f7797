"TVTS as a model of tasks and files, its text towers, and the tokenizers they need."
import copy, dataclasses, json, sys

import pytest
import torch

transformers = pytest.importorskip('transformers')
WORDS_SEEN = int(transformers.__version__.split('.')[0]) >= 5          # older versions keep the softmax of their text towers to themselves
from vidlab.attend import attention_names, capture_attention
from vidlab.ckpt import WeightsError
from vidlab.data import shapes
from vidlab.data.text import _hub, pieces, tokenize, write_vocab
from vidlab.losses import contrastive, sort_loss
from vidlab.masks import fold_tokens
from vidlab.models.tvts import TVTS, VideoEncoder, describe, text_feature, text_tower
from vidlab.registry import create_model, list_models
from vidlab.tasks import RecognitionTask, RetrievalTask

SMALL = dict(model_type='distilbert', vocab_size=128, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=16)


def small(text=SMALL, **more):
    torch.manual_seed(0)
    return TVTS(VideoEncoder(32, 2, 4, size=16, patch=8, frames=8, time_std=1.), text if isinstance(text, torch.nn.Module) else text_tower(text), **{'projection_dim': 16, **more}).eval()


def batch(K=4, B=3, T=8, size=16, tokenizer='shapes'):
    g = torch.Generator().manual_seed(0)
    said = ['a red circle grows', 'a large blue square moves left', 'then it', 'up']
    ids, mask = tokenize([said[(k + i) % 4] for i in range(B) for k in range(K)], 10, tokenizer=tokenizer)
    rows = (lambda x: x.view(B, K, -1)) if K > 1 else (lambda x: x)
    return dict(video=torch.randn(B, T, 3, size, size, generator=g), video_mask=torch.ones(B, T).bool(), text=rows(ids), text_mask=rows(mask))


def loss_of(model, b):
    o = model(b)
    return contrastive(model.similarity(o['text'], o['video']), directions='sum') + (2*sort_loss(o['order']) if 'order' in o else 0)


# ---------------------------------------------------------------------------------------------------------------- tokenizers
def test_shapes_vocabulary_holds_the_grammar():
    captions = [*shapes.STILL_CAPTIONS, *shapes.CLIP_CAPTIONS, shapes.narrated_item(0, shapes.rng(0))[1]['text'], *(shapes.long_item(i, shapes.rng(i))[1]['text'] for i in range(4)), *shapes.MOTIONS, *shapes.ACTS]
    for c in captions:
        got = pieces(tokenize([c], 80, tokenizer='shapes')[0][0], 'shapes')
        words = c.replace(',', ' ,').split()
        assert got[1:1 + len(words)] == words and got[1 + len(words)] == '[SEP]', (c, got)
    assert len(_hub('shapes')) <= create_model('tvts', preset='tiny').text_model.config.vocab_size


def test_vocabulary_files(tmp_path):
    write_vocab(tmp_path/'v', ['a man', 'Naïve café'])
    from transformers import BertTokenizerFast
    want = BertTokenizerFast.from_pretrained(tmp_path/'v')
    for t in ('A man is naive', 'xyz!', '', 'cafe, (a)'): assert tokenize([t], 20, tokenizer=str(tmp_path/'v'))[0][0].tolist()[:len(want(t)['input_ids'])] == want(t)['input_ids']
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='not usable'): tokenize(['a'], tokenizer=str(tmp_path/'empty'))


def test_offline_and_missing_package(monkeypatch):
    import huggingface_hub, transformers
    asked = []
    def loader(name, local_files_only=False):
        asked.append(local_files_only)
        raise OSError('not in the cache')
    def offline(*a, **k): raise ConnectionError("couldn't connect to the hub")
    monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', loader); monkeypatch.setattr(transformers.AutoModel, 'from_pretrained', loader)
    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', offline)
    with pytest.raises(ValueError, match="tokenizer 'some-model'.*couldn't connect.*fetch it once"): tokenize(['a'], tokenizer='some-model')
    with pytest.raises(ValueError, match="text tower 'some-model'.*couldn't connect.*text_weights='random'"): text_tower('some-model')
    assert asked == [True, True]                                      # where there is no network no loader waits for it
    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', lambda *a, **k: None)
    with pytest.raises(ValueError, match='not in the cache'): text_tower('some-model')
    assert asked[2:] == [True, False]
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r'pip install vidlab\[text\]'): tokenize(['a'], tokenizer='other-model')
    with pytest.raises(ImportError, match=r'pip install vidlab\[text\]'): text_tower(SMALL)


# ---------------------------------------------------------------------------------------------------------------- model
TOWERS = dict(distilbert=SMALL, bert=dict(model_type='bert', vocab_size=128, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16), clip='clip:tiny')


@pytest.mark.parametrize('kind', TOWERS)
def test_every_parameter_learns(kind):
    "With each text tower, whatever its width; captions leave the sort head alone"
    model = small(text_tower(TOWERS[kind], 'random')).train()
    tok = 'clip' if kind == 'clip' else 'shapes'
    loss_of(model, batch(tokenizer=tok)).backward()
    none = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert none <= {'text_model.embeddings.token_type_embeddings.weight'}
    model.zero_grad(); loss_of(model, batch(1, tokenizer=tok)).backward()
    assert {n.split('.')[0] for n, p in model.named_parameters() if p.grad is None} == {'pred_model'}
    layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(4)) and model.no_decay() <= set(layers)
    assert {model.token_layout(n)['kind'] for n in attention_names(model)} == {'video', 'sort'} | ({'text'} if WORDS_SEEN or kind == 'clip' else set())
    model.set_grad_checkpointing(); loss_of(model, batch(tokenizer=tok)).backward()
    with torch.autocast('cpu', torch.bfloat16): assert loss_of(model, batch(tokenizer=tok)).isfinite()


def test_looking_changes_nothing_and_copies_are_apart():
    model, b = small(), batch()
    want = model(b)
    twin = copy.deepcopy(model)
    seen = '*' if WORDS_SEEN else ['video_model.*', 'pred_model.*']
    with capture_attention(model, seen) as maps, torch.no_grad(): got = model(b); twin(b)
    assert all(torch.allclose(got[k], want[k], atol=1e-5) for k in want) and {len(v) for v in maps.values()} == {1}
    assert all(torch.allclose(m[0].sum(-1), torch.ones_like(m[0][..., 0]), atol=1e-5) for m in maps.values())
    with capture_attention(model, seen, grad=True) as maps: model(b)['order'].sum().backward()
    assert all(m[0].grad is not None for n, m in maps.items() if 'text_model' not in n)


def test_padding_slots_do_not_count():
    model, b = small(), batch()
    mask = torch.tensor([[1]*8, [1]*4 + [0]*4, [1]*6 + [0]*2]).bool()
    loud = dict(b, video=b['video'].masked_fill(~mask[..., None, None, None], 7.), video_mask=mask)
    out = model(loud)
    for i, T in enumerate((8, 4, 6)):
        alone = model({k: v[i:i+1, :T] if k.startswith('video') else v[i:i+1] for k, v in b.items()})
        assert torch.allclose(out['video'][i], alone['video'][0], atol=1e-5) and torch.allclose(out['order'][i], alone['order'][0], atol=1e-5)
    keep = torch.rand(3, 4, 4).argsort(-1)[..., :2]
    some = model(dict(loud, keep=keep))
    assert torch.allclose(some['order'][1], model({**{k: v[1:2] for k, v in b.items()}, 'video': b['video'][1:2, :4], 'video_mask': None, 'keep': keep[1:2]})['order'][0], atol=1e-5)


def test_fold_tokens():
    x = torch.arange(2*3*6).view(2, 3, 6).float()                     # two clips, three rows, two slots of three places kept
    assert fold_tokens(x, (4, 1, 3)).tolist() == x.view(2, 3, 2, 1, 3).tolist()
    keep = torch.tensor([[[5, 0, 2], [1, 3, 4], [0, 1, 2]]]*2)
    f = fold_tokens(x, (4, 2, 3), keep)
    assert f.shape == (2, 3, 2, 2, 3) and f[1, 2, 0, 1, 2] == x[1, 2, 0] and f[0, 1, 1, 0, 1] == x[0, 1, 3] and f[0, 0, 0, 0, 1].isnan() and int(f.isnan().sum()) == 36
    with pytest.raises(ValueError, match='not slots of 3'): fold_tokens(x[..., :5], (4, 1, 3))


def test_in_tasks():
    "Captions in the retrieval task, classes in the recognition task"
    model = create_model('tvts', preset='tiny')
    task, n = RetrievalTask(model, directions='sum'), 3
    b = batch(1, n, 8, 64); b.update(video=torch.randint(0, 256, b['video'].shape, dtype=torch.uint8), sid=torch.arange(n), view=torch.zeros(n, dtype=torch.long), label=torch.tensor([0, 1, 0]))
    task(b)['loss'].backward(); task.after_step()
    task.eval()
    with torch.no_grad(): parts = {s: task.eval_step({k: v for k, v in b.items() if not k.startswith('text' if s == 'video' else 'video')}) for s in ('video', 'text')}
    m = task.score(parts)['metrics']
    assert m['texts'] == m['videos'] == n
    for probe in (False, True):
        rec = RecognitionTask(create_model('tvts_classifier', preset='tiny', classes=2, probe=probe), ['up', 'down'], mixup=.8)
        rec.train()({k: v for k, v in b.items() if 'text' not in k})['loss'].backward()
        assert {k for k, p in rec.model.named_parameters() if p.grad is not None} == ({'head.weight', 'head.bias'} if probe else {k for k, _ in rec.model.named_parameters()})
        assert rec.eval().score(dict(video=rec.eval_step(b)))['metrics']['clips'] == n
    assert {'tvts', 'tvts_classifier'} <= set(list_models())
    json.dumps(dataclasses.asdict(model.card))


# ---------------------------------------------------------------------------------------------------------------- files
def test_files(tmp_path):
    "A folder of the hub's layout, DeepSpeed's container, describing what a file holds, wrong files"
    model, b = small(), batch()
    model.text_model.save_pretrained(tmp_path/'tower')
    ids, mask = b['text'][0], b['text_mask'][0]
    again = text_tower(str(tmp_path/'tower')).eval()
    assert torch.allclose(text_feature(again, ids, mask), text_feature(model.text_model, ids, mask), atol=1e-6) and bool(attention_names(again)) == WORDS_SEEN
    assert describe(model.state_dict(), 4, 2)['text'] == SMALL
    bert = small(TOWERS['bert'])
    assert describe(bert.state_dict(), 4, 2)['text'] == dict(TOWERS['bert'], type_vocab_size=2)

    torch.save(dict(state_dict=model.state_dict()), tmp_path/'own.pth')
    made = create_model('tvts', checkpoint=str(tmp_path/'own.pth'), vision_heads=4, text_heads=2, max_frames=8).eval()
    assert made.video_model.grid == (4, 2, 2) and torch.allclose(made(b)['order'], model(b)['order'], atol=1e-6)
    tiny = create_model('tvts', preset='tiny')
    (tmp_path/'checkpoint-best').mkdir()
    head = create_model('tvts_classifier', preset='tiny', classes=3)
    torch.save(dict(module={k: v.half() for k, v in head.state_dict().items()}, epoch=3), tmp_path/'checkpoint-best'/'mp_rank_00_model_states.pt')
    other = create_model('tvts_classifier', preset='tiny', classes=3)
    report = other.load_weights(tmp_path/'checkpoint-best', exact=True)
    assert report.count('loaded') == len(head.state_dict()) and torch.allclose(other.head.weight, head.head.weight, atol=1e-3)

    for bad, why in ((dict(model=dict(x=torch.zeros(1))), 'no video encoder'), (dict(state_dict={k: v for k, v in tiny.state_dict().items() if 'txt_proj' not in k}), 'not in the file'),
                     (dict(state_dict=model.state_dict()), 'another shape|does not have|not in the file')):
        torch.save(bad, tmp_path/'bad.pth')
        with pytest.raises(WeightsError, match=why): tiny.load_weights(tmp_path/'bad.pth')
    assert not (tiny.state_dict().keys() ^ create_model('tvts', preset='tiny').state_dict().keys())
