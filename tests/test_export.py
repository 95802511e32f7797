"Weights in other forms and encoders for other runtimes: nothing is lost on the way, what is said about it is true, what cannot be written is refused."
import dataclasses, json
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from conftest import HERE
from goldens import clip4clip_model, stan_model, tvts_model
from test_official_files import MODELS, shaken
from vidlab import export as E
from vidlab.ckpt import read_file, read_weights, state_dict_of
from vidlab.config import make_config
from vidlab.export import encoders, export, program, read_back, recall_loss, run_onnx, save_onnx, told, write_weights, _inputs
from vidlab.ready import Ready, load
from vidlab.tasks.base import Task

GOLDEN = HERE/'golden'
equal = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def ready(name, seed=0, **kw):
    cfg = make_config(model=name, sampler='segment', device='cpu', workers=0, **MODELS[name], **kw)
    m = shaken(name, seed)
    return Ready(Task(m), dataclasses.replace(cfg, max_frames=m.card.frames or 4), name)


@pytest.mark.parametrize('name', MODELS)
def test_official_to_ours_and_back(name, tmp_path):
    "The file of the published code, a folder of ours made of it, and the file again: the same bits, and the report says so"
    first, kept, again = tmp_path/'first.pth', tmp_path/'kept', tmp_path/'again.pth'
    r = write_weights(ready(name), first)
    assert r['equal'] + len(r['rounded']) + len(r['left_out']) == r['tensors']
    assert (name == 'clip4clip') == bool(r['rounded']) and r['farthest'] < 1e-3
    assert set(r['left_out']) <= {'clip.logit_scale'}
    model = load(first, model=name, device='cpu', task='retrieval', **MODELS[name]) if name in ('clip4clip', 'stan', 'mugstan', 'tvts') else None
    if model is None:
        model = ready(name, 1)
        model.model.load_weights(first, exact=True)
    ours = write_weights(model, kept, 'vidlab')
    assert ours['equal'] == ours['tensors'] and not ours['left_out']
    back = ready(name, 2)
    back.model.load_weights(kept/'weights.safetensors', exact=True)
    write_weights(back, again)
    assert equal(state_dict_of(read_file(first)), state_dict_of(read_file(again)))


CASES = [('clip4clip/sim_seqTransf_2d', clip4clip_model), ('clip4clip/sim_tightTransf_3d', clip4clip_model), ('stan/stan_retrieval', stan_model), ('stan/mugstan_retrieval', stan_model),
         ('tvts/tvts_full_distilbert', tvts_model)]

@pytest.mark.parametrize('case,build', CASES, ids=[c for c, _ in CASES])
def test_weights_of_the_published_code_go_through(case, build, tmp_path):
    "Read, kept as ours, written again: its own names and, where its file holds halves, its own halves"
    w = {k[7:]: v for k, v in load_file(GOLDEN/f'{case}.safetensors').items() if k.startswith('weight/')}
    model = build.build(json.loads((GOLDEN/f'{case}.json').read_text())['config'], w)
    r = Ready(Task(model), make_config(device='cpu'), case)
    write_weights(r, tmp_path/'w.pth')
    got = state_dict_of(read_file(tmp_path/'w.pth'))
    unread = {k for k in w if 'position_ids' in k}
    assert set(got) == set(w) - unread
    assert all(torch.equal(got[k].float(), w[k].to(got[k].dtype).float()) for k in got)
    blank = E._rubbed_out(model)
    write_weights(r, tmp_path/'ours.safetensors', 'safetensors')
    blank.load_weights(tmp_path/'ours.safetensors', exact=True)
    assert equal(dict(blank.state_dict()), dict(model.state_dict()))


def test_open_clip_reads_the_towers(tmp_path):
    "Its own class with the same sizes, strictly, and the same vectors"
    import open_clip
    r = load('clip4clip', preset='tiny', weights='shapes', head='seqTransf', device='cpu')
    said = write_weights(r, tmp_path/'t.safetensors', 'open_clip')
    assert said['equal'] == said['tensors']
    open_clip.add_model_config(tmp_path/'t.json')
    c, theirs = r.model.clip.card, open_clip.create_model('t', pretrained=str(tmp_path/'t.safetensors')).eval()
    x, ids = torch.randn(2, 3, c.image_size, c.image_size), open_clip.tokenize(['a dog', 'a small red circle'], c.context)
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(x), r.model.clip.encode_image(x), atol=1e-4) and torch.allclose(theirs.encode_text(ids), r.model.clip.encode_text(ids), atol=1e-4)
    back = load('clip4clip', preset='tiny', clip=str(tmp_path/'t.safetensors'), head='meanP', device='cpu')       # the activation is told by the file beside it
    assert torch.equal(back.model.clip.visual.proj, r.model.clip.visual.proj)
    with pytest.raises(ValueError, match='no CLIP'): write_weights(ready('videomamba'), tmp_path/'v.safetensors', 'open_clip')


def test_the_report_sees_what_is_lost(tmp_path, monkeypatch):
    "A writer that rounds or leaves out is found out"
    r = ready('videomamba')
    monkeypatch.setattr(type(r.model), 'official_file', lambda self: dict(model={k: v.half().float() for k, v in self.state_dict().items()}), raising=False)
    said = write_weights(r, tmp_path/'w.pth')
    assert said['rounded'] and 0 < said['farthest'] < .01 and 'rounded' in E.said(said)


def test_what_is_there_is_left_out_of_no_report(tmp_path):
    "A parameter that a form does not hold is named"
    r = ready('stan')
    said = write_weights(r, tmp_path/'w.pth')
    assert said['left_out'] == ['clip.logit_scale'] and 'not in this form: clip.logit_scale' in E.said(said)


def test_the_tool_and_its_refusals(tmp_path, run):
    "From a published file to a folder that needs no telling, and back"
    torch.save(shaken('clip4clip', 3).official_file(), tmp_path/'theirs.bin')
    how = ['--model', 'clip4clip', '--options', 'preset=tiny', 'head=seqTransf', 'weights=random']
    code, out, err = run('convert_checkpoint', tmp_path/'theirs.bin', tmp_path/'kept', '--to', 'vidlab', *how)
    assert code == 0 and 'equal to the last bit' in out and 'loaded' in out, out + err
    assert load(tmp_path/'kept', device='cpu').model.head == 'seqTransf'
    code, out, err = run('convert_checkpoint', tmp_path/'kept', tmp_path/'again.bin')
    assert code == 0 and equal(read_weights(tmp_path/'theirs.bin'), read_weights(tmp_path/'again.bin')), err
    for args, said in ((['kept', '--to', 'keras'], 'unknown form'), (['x.bin', '--to', 'open_clip'], 'called .safetensors'), (['again.bin'], 'there already'), (['y', '--options', 'a'], 'name=value')):
        code, out, err = run('convert_checkpoint', tmp_path/'kept', tmp_path/args[0], *args[1:], *(['--force'] if args[0] == 'kept' else []))
        assert code == 2 and said in err, err
    code, out, err = run('convert_checkpoint', tmp_path/'theirs.bin', tmp_path/'z.bin')
    assert code == 2 and 'say what it is' in err
    code, out, err = run('export', tmp_path/'kept', tmp_path/'e', '--parts', 'speech')
    assert code == 2 and 'unknown encoder' in err and not (tmp_path/'e').exists()


def test_videomamba_as_onnx(tmp_path):
    "The scan is a loop of ONNX; two directions, batches that it has not seen"
    pytest.importorskip('onnxscript')
    r = ready('videomamba')
    said = export(r, tmp_path)['encoders']['logits']
    assert list(said['inputs']) == ['video'] and said['from_program'] < 1e-6 and 0 < said['from_onnx'] < 1e-5
    x = _inputs(r, 'logits', 7)
    with torch.no_grad(): assert torch.allclose(run_onnx(tmp_path/'logits.onnx', x), encoders(r)['logits'](x['video']), atol=1e-5)
    import onnx
    ops = {n.op_type for f in onnx.load(tmp_path/'logits.onnx').functions for n in f.node} | {n.op_type for n in onnx.load(tmp_path/'logits.onnx').graph.node}
    assert 'Scan' in ops


@pytest.fixture(scope='module')
def tiny(): return load('clip4clip', preset='tiny', weights='shapes', device='cpu', max_frames=2, workers=0)


def test_which_encoders(tiny):
    assert list(encoders(tiny)) == ['text', 'image', 'video'] and list(encoders(ready('videomamba'))) == ['logits'] and list(encoders(ready('mugstan'))) == ['image']
    x = _inputs(tiny, 'video', 3)
    assert not x['mask'].all() and x['video'].dtype == torch.uint8
    with torch.no_grad(): v = encoders(tiny)['video'](**x)
    assert v.shape == (3, 64) and torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-5)


def test_programs_of_torch(tiny, tmp_path):
    "Text and pictures: any batch, from a file"
    r = export(tiny, tmp_path, ['text', 'image'], ['pt2'])
    assert max(e['from_program'] for e in r['encoders'].values()) < 1e-4 and 'ids batchx' in told(r)
    for part in ('text', 'image'):
        back, x = torch.export.load(tmp_path/f'{part}.pt2').module(), _inputs(tiny, part, 7)
        with torch.no_grad(): assert torch.allclose(back(**x), encoders(tiny)[part](**x), atol=1e-5)
    texts, x = ['a large red circle on the left', 'two dogs'], None
    ids, mask = E.tokenize(texts, tiny.words)
    with torch.no_grad(): assert torch.allclose(torch.export.load(tmp_path/'text.pt2').module()(ids=ids, mask=mask), tiny.embed_texts(texts), atol=1e-5)
    assert json.loads((tmp_path/'export.json').read_text())['encoders']['text']['inputs']['ids']['shape'] == ['batch', tiny.words]


def test_int8_and_onnx_need_their_packages(tiny, tmp_path, monkeypatch, run):
    "Said before any work"
    monkeypatch.setattr(E, 'need', lambda m, p=None: (_ for _ in ()).throw(ImportError(f'this needs the package {p!r}')))
    with pytest.raises(ImportError, match='export'): export(tiny, tmp_path/'e', ['text'])
    with pytest.raises(ValueError, match='as ONNX'): export(tiny, tmp_path/'e', ['image'], int8=True)
    with pytest.raises(ValueError, match='unknown form'): export(tiny, tmp_path/'e', ['text'], ['tflite'])
    assert not (tmp_path/'e').exists()


def needs_onnx():
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name, reason=f'{name} is not installed: pip install vidlab[export]')


def test_text_as_onnx_and_in_eight_bits(tiny, tmp_path):
    "As the model to 1e-4, a third of the size in int8, and the loss of R@1 is that of the vectors"
    needs_onnx()
    from vidlab.data.sets.shapes import shapes
    r = export(tiny, tmp_path, ['text'], ['onnx'])
    assert r['encoders']['text']['from_onnx'] < 1e-4
    small = E.quantised(tmp_path/'text.onnx', tmp_path/'small.onnx')
    assert small.stat().st_size < .4*r['encoders']['text']['bytes']
    m = shapes(kind='stills', split='test').select(range(90))
    d = recall_loss(tiny, small, m)
    texts, v = m.column('text').to_pylist(), tiny.embed_videos([m.row(i)['path'] for i in range(90)])
    ids, mask = E.tokenize(texts, tiny.words)
    hit = lambda t: np.array([(t[i] @ v.T).argmax() == i for i in range(90)])
    assert d.value == pytest.approx(100*(hit(run_onnx(small, dict(ids=ids, mask=mask))).mean() - hit(tiny.embed_texts(texts)).mean())) and d.low <= d.value <= d.high and d.n == 90
    same = recall_loss(tiny, tmp_path/'text.onnx', m)
    assert same.value == 0 and same.disagree == 0


@pytest.mark.parametrize('name,part', [('stan', 'video'), *(pytest.param(*p, marks=pytest.mark.long) for p in (
    ('clip4clip', 'video'), ('clip4clip', 'image'), ('stan', 'text'), ('tdsclip', 'logits'), ('tvts', 'video'), ('tvts_classifier', 'logits')))])
def test_encoders_of_the_systems_as_onnx(name, part, tmp_path):
    needs_onnx()
    r = export(ready(name), tmp_path, [part], ['onnx'])
    assert r['encoders'][part]['from_onnx'] < 1e-4
