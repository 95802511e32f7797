"`vidlab.load`: the numbers of a run come out again from its files, without its data; names, files and texts as people have them."
import dataclasses, os, shutil
from pathlib import Path
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from vidlab.data.files import VideoError
from vidlab.ready import load
from vidlab.registry import create_model, list_models
from vidlab.train import config_from, load_manifest, run

pytestmark = pytest.mark.usefixtures('outputs')

@pytest.fixture(scope='session')
def shapes(rendered): return rendered(clips=dict(train=24, val=8, test=10), long=dict(train=8, val=4, test=4))

def trained(shapes, recipe, **kw):
    cfg = config_from(recipe, **dict(dict(data_path=str(shapes), epochs=1, batch_size=8, eval_batch_size=4, workers=0, precision='fp32', device='cpu', start=''), **kw))
    folder = run(cfg)
    return folder, load_manifest(cfg, 'test'), load_file(folder/'eval'/'test.safetensors')

def columns(m): return [r['path'] for r in map(m.row, range(len(m)))], [r.get('text') for r in map(m.row, range(len(m)))]


@pytest.mark.parametrize('recipe,more', [('shapes_seqTransf', {}), ('shapes_stan', {}), ('shapes_meanP', dict(head='tightTransf')), ('shapes_mugstan', {})])
def test_similarity_is_that_of_the_evaluation(shapes, recipe, more):
    folder, m, arrays = trained(shapes, recipe, weights='random', **more)
    paths, texts = columns(m)
    ready = load(folder.path)
    sim = ready.similarity(texts, paths)
    code = torch.from_numpy(m.groups().code)                                                # one caption a clip: rows by sid
    assert arrays['text_sid'].tolist() == list(range(len(m))) and torch.allclose(sim, arrays['sim'][code][:, code], atol=1e-4)
    if 'stan' == recipe[7:] or not more and 'mug' not in recipe:
        v, t = ready.embed_videos(paths), ready.embed_texts(texts)
        cos = t @ v.T
        assert torch.allclose(v.norm(dim=1), torch.ones(len(paths)), atol=1e-5) and cos.abs().max() <= 1 + 1e-5
        assert torch.allclose(sim/sim[0, 0], cos/cos[0, 0], atol=1e-3)                      # up to the temperature
    else:
        with pytest.raises(ValueError, match='use `similarity`'): ready.embed_videos(paths)


def test_predictions_are_those_of_the_evaluation_without_its_data(shapes, tmp_path):
    "Views, average and names of the classes come from the checkpoint alone; the folder may lie elsewhere"
    data = Path(shutil.copytree(shapes, tmp_path/'data'))
    folder, m, arrays = trained(data, 'shapes_videomamba', dim=32, depth=2, state=4, max_frames=4, eval_clips=2)
    paths, _ = columns(m)
    names = m.classes
    away = tmp_path/'away'
    away.mkdir()
    kept = [shutil.copy(p, away/f'{i} 100% süß.mp4') for i, p in enumerate(paths)]
    moved = shutil.copytree(folder/'ckpt'/'best', tmp_path/'moved')
    shutil.rmtree(data)
    ready = load(moved)
    every = ready.predict(kept, k=len(names))
    code = m.groups().code
    for i, p in enumerate(kept):
        got = every[every['video'] == str(p)].set_index('class')['probability']
        want = arrays['prob'][arrays['sid'].tolist().index(int(code[i]))]
        assert torch.allclose(torch.tensor([got[n] for n in names], dtype=want.dtype), want, atol=1e-5)
        assert got.is_monotonic_decreasing
    assert ready.predict(kept[0])['class'].tolist() == [every['class'][0]]
    best = {r['class'] for r in ready.predict(away).to_dict('records')}
    assert len(ready.predict(away)) == len(paths) and best <= set(names)


def test_a_number_in_its_own_unit(shapes):
    folder, m, arrays = trained(shapes, 'shapes_long_regression', dim=32, depth=2, state=4, max_frames=4)
    paths, _ = columns(m)
    got = load(folder.path).predict(paths)['value'].tolist()
    code = m.groups().code
    assert got == pytest.approx([float(arrays['predicted'][arrays['sid'].tolist().index(int(c))]) for c in code], rel=1e-4)


def test_classes_by_their_names(shapes):
    folder, m, _ = trained(shapes, 'shapes_meanP', weights='random')
    paths, texts = columns(m)
    ready, three = load(folder.path), sorted(set(texts))[:3]
    got, sim = ready.predict(paths, classes=three, k=3), ready.similarity(three, paths)
    for j, p in enumerate(paths):
        rows = got[got['video'] == p].set_index('class')['probability']
        assert torch.allclose(torch.tensor([rows[c] for c in three], dtype=sim.dtype), sim[:, j].softmax(0), atol=1e-4)
    said = ready.predict(paths, classes=['red', 'blue'], templates=['a {} circle', 'a {} square'])
    sims = ready.similarity([f'a {c} {s}' for s in ('circle', 'square') for c in ('red', 'blue')], paths)
    assert set(said['class']) <= {'red', 'blue'} and sims.shape == (4, len(paths))
    with pytest.raises(ValueError, match='name them'): ready.predict(paths)


def test_names_and_what_is_no_name(shapes, outputs, tmp_path, monkeypatch):
    folder, m, _ = trained(shapes, 'shapes_meanP', weights='random')
    paths, texts = columns(m)
    by_recipe, by_latest = load('shapes_meanP'), load('latest:shapes_meanP', eval_batch_size=2)
    assert torch.allclose(by_recipe.embed_videos(paths[:3]), by_latest.embed_videos(paths[:3]), atol=1e-5) and by_latest.cfg.eval_batch_size == 2
    with pytest.raises(ValueError, match="did you mean 'shapes_meanP'"): load('shapes_meanp')
    with pytest.raises(FileNotFoundError, match='no finished run'): load('shapes_stan')
    with pytest.raises(FileNotFoundError, match='no such file'): load(tmp_path/'gone.pth')
    with pytest.raises(ValueError, match='did you mean .device'): load('shapes_meanP', devise='cpu')
    weights = tmp_path/'published.pth'
    torch.save({k: v for k, v in load_file(folder/'ckpt'/'best'/'weights.safetensors').items()}, weights)
    with pytest.raises(ValueError, match=r"say what it is by recipe='...' or model="): load(weights)
    named = load(weights, recipe='shapes_meanP')
    assert torch.allclose(named.embed_videos(paths[:2]), by_recipe.embed_videos(paths[:2]), atol=1e-5)
    monkeypatch.chdir(Path(paths[0]).parent)
    assert torch.equal(by_recipe.embed_videos(Path(paths[0]).name), by_recipe.embed_videos(paths[0]))


def test_order_repeats_and_batches(shapes):
    folder, m, _ = trained(shapes, 'shapes_meanP', weights='random')
    paths, texts = columns(m)
    ready = load(folder.path, eval_batch_size=3, workers=2)
    v = ready.embed_videos([*paths, paths[0]])
    assert torch.equal(v[0], v[-1]) and torch.allclose(v[:-1], torch.cat([ready.embed_videos(p) for p in paths]), atol=1e-5)
    assert torch.allclose(ready.embed_videos(paths[::-1]), v[:-1].flip(0), atol=1e-5)
    assert torch.allclose(ready.embed_texts(texts*60)[-1], ready.embed_texts(texts[-1])[0], atol=1e-5)
    for empty in (lambda: ready.embed_videos([]), lambda: ready.embed_texts([])):
        with pytest.raises(ValueError, match='give'): empty()


def test_what_cannot_be_read(shapes, tmp_path):
    folder, m, _ = trained(shapes, 'shapes_meanP', weights='random')
    paths, texts = columns(m)
    half = tmp_path/'half.mp4'
    half.write_bytes(Path(paths[0]).read_bytes()[:300])
    with pytest.raises(VideoError, match='half.mp4'): load(folder.path).embed_videos([paths[0], half])
    with pytest.raises(ValueError, match='gone.mp4'): load(folder.path).embed_videos([paths[0], tmp_path/'gone.mp4'])
    lenient = load(folder.path, on_bad='miss')
    assert lenient.embed_videos([half, paths[0]]).isnan().all(1).tolist() == [True, False]
    assert lenient.similarity(texts[:2], [half, paths[0]]).isnan().tolist() == [[True, False]]*2
    seen = lenient.predict([half, paths[0]], classes=['left', 'right'])
    assert pd.isna(seen['class'][0]) and seen['unread'][0] and not seen['unread'][1]
    with pytest.raises(ValueError, match='none of 1 videos'): lenient.embed_videos(half)


@pytest.mark.parametrize('name', list_models())
def test_every_model_as_it_starts(name, shapes):
    "Each model gives vectors of clips, or says that it has none"
    known = dict(tvts=dict(text_weights='random'), tdsclip=dict(weights='random')).get(name, {})
    m = load(name, preset='tiny', device='cpu', **known)
    paths, _ = columns(load_manifest(config_from('shapes_meanP', data_path=str(shapes)), 'test'))
    if hasattr(m.model, 'encode_video') and 'mug' not in name: assert m.embed_videos(paths[:2]).shape[0] == 2
    else:
        with pytest.raises(ValueError): m.embed_videos(paths[:2])
