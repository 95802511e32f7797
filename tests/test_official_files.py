"Weights written for the published code: its names, its forms, nothing lost on the way there and back."
import json, re
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from vidlab.ckpt import read_file, state_dict_of
from vidlab.registry import create_model
from goldens import stan_model
from conftest import HERE

GOLDEN = HERE/'golden'
TEXT = dict(model_type='distilbert', vocab_size=128, dim=64, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64)
MODELS = dict(clip4clip=dict(preset='tiny', head='seqTransf', weights='random'), tdsclip=dict(preset='tiny', weights='random', side_dim=64, classes=5),
              videomamba=dict(preset='tiny', dim=32, depth=2, state=4, classes=5), videomamba_pretrain=dict(preset='tiny', dim=32, depth=2, state=4, out_dim=32),
              tvts=dict(preset='tiny', weights='random', text=TEXT, text_weights='random'), tvts_classifier=dict(preset='tiny', weights='random', classes=5),
              stan=dict(preset='tiny', weights='random'), mugstan=dict(preset='tiny', weights='random'))
CONTAINER = dict(tdsclip='model_state_dict', videomamba='model', videomamba_pretrain='model', tvts='state_dict', tvts_classifier='model', stan='state_dict', mugstan='state_dict')
plain = lambda n: re.sub(r'\d+', '{}', n)


def shaken(name, seed):
    torch.manual_seed(seed)
    m = create_model(name, **MODELS[name])
    with torch.no_grad():
        for p in m.parameters(): p.add_(.02*torch.randn_like(p))
    return m.eval()


@pytest.mark.parametrize('name', MODELS)
def test_there_and_back(name, tmp_path):
    "A fresh model that reads the file has every number; CLIP4Clip's matrices are halves, as published"
    m, other = shaken(name, 0), shaken(name, 1)
    torch.save(m.official_file(), tmp_path/'w.pth')
    assert isinstance(read_file(tmp_path/'w.pth'), dict) and (name not in CONTAINER or CONTAINER[name] in read_file(tmp_path/'w.pth'))
    other.load_weights(tmp_path/'w.pth', exact=True)
    own, got = m.state_dict(), other.state_dict()
    far = [k for k in own if k != 'clip.logit_scale' and not torch.allclose(own[k].float(), got[k].float(), atol=2e-4 if name == 'clip4clip' else 0, rtol=1e-3 if name == 'clip4clip' else 0)]
    assert far == []


@pytest.mark.parametrize('case', ['stan_retrieval', 'mugstan_retrieval', 'clip_meanpool_retrieval'])
def test_stan_writes_what_it_has_read(case):
    "The official weights of a case, read and written again: the same names and numbers"
    w = {k[7:]: v for k, v in load_file(GOLDEN/'stan'/f'{case}.safetensors').items() if k.startswith('weight/')}
    got = stan_model.build(json.loads((GOLDEN/'stan'/f'{case}.json').read_text())['config'], w).official_file()['state_dict']
    unread = {k for k in w if 'position_ids' in k}
    assert set(got) == set(w) - unread and all(torch.equal(got[k], w[k]) for k in got)


@pytest.mark.parametrize('name,case', [('clip4clip', 'clip4clip/sim_seqTransf_2d'), ('tdsclip', 'tdsclip/train_loop'), ('videomamba', 'videomamba/video_base')])
def test_names_are_those_of_the_published_code(name, case):
    "Of a model of another size: the same names, numbers of layers apart"
    w = {plain(k[7:]) for k in load_file(GOLDEN/f'{case}.safetensors') if k.startswith('weight/')}
    got = {plain(k) for k in state_dict_of(shaken(name, 0).official_file())}
    assert got == {n for n in w if not n.endswith('num_batches_tracked')} | {n for n in got if n.endswith('num_batches_tracked')}


def test_tvts_has_names_that_its_scripts_look_for():
    "`module.video_model.` in front of every name of the encoder, and the names of the published file behind it"
    keys = set(shaken('tvts', 0).official_file()['state_dict'])
    listed = json.loads((GOLDEN/'tvts'/'checkpoint_keys.json').read_text())
    said = {plain(n) for n in re.findall(r'"(?:module\.)?((?:video_model|txt_proj|vid_proj|pred_model)\.[\w.]+)"', json.dumps(listed))}
    assert all(k.startswith('module.') for k in keys) and said and {n for n in said if n.endswith(('.weight', '.bias', 'embed', 'token'))} <= {plain(k[7:]) for k in keys}


def test_the_tool(tmp_path, outputs, run, capsys):
    "A run's best weights; a file that is there stays; a model without a published form is refused"
    from vidlab.config import make_config
    from vidlab.data.shapes import make_shapes
    from vidlab.train import run as train
    shapes = make_shapes(tmp_path/'s', kinds=('clips',), sizes=dict(clips=dict(train=4, val=1, test=1)))
    common = dict(task='recognition', sampler='segment', max_frames=4, batch_size=4, epochs=1, workers=0, device='cpu', val_split='', test_split='', data_path=str(shapes), check=False)
    f = train(make_config(model='videomamba', preset='tiny', dim=32, depth=2, state=4, **common))
    code, out, err = run('convert_checkpoint', f.path, tmp_path/'w.pth')
    assert code == 0 and 'w.pth' in out, err
    got, want = torch.load(tmp_path/'w.pth')['model'], load_file(f/'ckpt'/'last'/'weights.safetensors')
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in got)
    code, out, err = run('convert_checkpoint', f.path, tmp_path/'w.pth')
    assert code == 2 and 'is there already' in err and run('convert_checkpoint', f.path, tmp_path/'w.pth', '--force')[0] == 0
    probe = train(make_config(model='probe', preset='tiny', weights='random', **common))
    code, out, err = run('convert_checkpoint', probe.path, tmp_path/'p.pth')
    assert code == 2 and 'nobody has published code' in err and not (tmp_path/'p.pth').exists()
