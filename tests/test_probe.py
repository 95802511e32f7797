"""The linear probe as a model of a run: from files and from extracted folders, saved and evaluated again."""
import dataclasses

import pytest
import torch

av = pytest.importorskip('av')
from test_extract_frames import ROWS, manifest, videos                                 # noqa: F401 (fixtures)
from vidlab.core import RunFolder
from vidlab.learner import make_engine
from vidlab.models.probe import Probe
from vidlab.registry import create_model, list_models
from vidlab.train import build_learner, build_task, make_config


def config(path, names, **more):
    return make_config(data='manifest', data_path=str(path), classes=str(names), task='recognition', model='probe', preset='tiny', weights='random',
                       max_frames=4, sampler='segment', epochs=1, batch_size=2, eval_batch_size=2, workers=0, lr=.01, device='cpu', val_split='',
                       test_split='test', freeze='all', **more)


def test_run_from_files_and_folders(videos, tmp_path, run, monkeypatch):
    "One epoch from the files and from the folders: the same losses within what JPEG loses; only the classifier has moved"
    src = manifest(videos, ROWS)
    (tmp_path/'names.txt').write_text('one\ntwo\nthree\n')
    assert run('extract_frames', src, tmp_path/'f', '--quality', 95)[0] == 0
    losses, made = [], []
    for i, path in enumerate((src, tmp_path/'f'/'manifest.csv')):
        cfg = config(path, tmp_path/'names.txt')
        torch.manual_seed(0)
        learn = build_learner(cfg, RunFolder(tmp_path/f'run{i}'), make_engine(precision='fp32', device='cpu'))
        before = {n: p.clone() for n, p in learn.raw_task.model.state_dict().items()}
        learn.fit()
        model = learn.raw_task.model
        after = model.state_dict()
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert moved == {'fc.weight', 'fc.bias', 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}
        made.append(model); losses.append(after['fc.weight'])
    assert (losses[0] - losses[1]).abs().max() < 2e-3
    again = build_task(dataclasses.replace(config(src, tmp_path/'names.txt'), start=str(tmp_path/'run1')), exact=True).model.eval()
    v = torch.randn(1, 4, 3, 64, 64)
    assert torch.equal(again(dict(video=v))['logits'], made[1].eval()(dict(video=v))['logits'])


def test_contract():
    m = create_model('probe', preset='tiny', classes=3)
    assert 'probe' in list_models() and isinstance(m, Probe)
    top = m.layer_of('fc.weight')
    assert all(0 <= m.layer_of(n) <= top for n, _ in m.named_parameters()) and m.no_decay() <= {n for n, _ in m.named_parameters()}
    assert m.token_layout('clip.visual.transformer.resblocks.0.attn') == dict(kind='image', prefix=1, grid=(4, 4))
    assert not any(k.startswith(('clip.transformer', 'clip.token')) for k in m.state_dict())
    v = torch.randn(2, 3, 3, 64, 64)
    m.freeze('none'); m.set_grad_checkpointing(); m.train()
    m(dict(video=v))['logits'].square().sum().backward()
    assert m.clip.visual.conv1.weight.grad.abs().sum() > 0
    m.freeze('all'); m.eval()
    want = m(dict(video=v))['logits']
    half = m.clip.to_official_half() and m(dict(video=v))
    assert half['video'].dtype == torch.float32 and torch.allclose(half['logits'], want, atol=1e-2)
    m.clip.float()
    v.requires_grad_(); m(dict(video=v))['logits'].sum().backward()
    assert v.grad.abs().sum() > 0                                                      # maps of relevance need the graph
