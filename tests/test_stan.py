"STAN and Mug-STAN: official files, starts from other models, whole runs (retrieval, recognition, post-pretraining on lists and shards), two processes, cost."
import csv, io, tarfile
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from vidlab.ckpt import WeightsError, read_weights
from vidlab.core import read_json
from vidlab.data.annots import Manifest
from vidlab.data.shapes import MOTIONS, make_shapes
from vidlab.models.stan import OFFICIAL, STAN, StanBranch
from vidlab.registry import create_model
from vidlab.tasks import RecognitionTask, RetrievalTask
from vidlab.train import config_from, launch, list_recipes, load_config, load_manifest, make_config, run, run_eval

CASE = Path(__file__).parent/'golden'/'stan'/'stan_retrieval.safetensors'


@pytest.fixture(scope='session')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=32, val=12, test=12)))

pytestmark = pytest.mark.usefixtures('outputs')

def official():
    "A small file with the official names"
    return {k[7:]: v.float() for k, v in load_file(CASE).items() if k.startswith('weight/')}

def small(shapes, **kw):
    return make_config(**{**dict(data='shapes', data_path=str(shapes), model='stan', preset='tiny', sampler='segment', segments='inclusive', max_frames=4, max_words=16, epochs=1, batch_size=8,
                                 eval_batch_size=12, lr=1e-3, coef_lr=.1, workers=0, log_every=1, device='cpu'), **({} if 'task' in kw else dict(directions='sum')), **kw})

def losses(folder): return [r['loss'] for r in folder.metrics() if r['kind'] == 'step']

# ---------------------------------------------------------------------------------------------------- files

def build(path): return create_model('stan', checkpoint=str(path), vision_heads=2, text_heads=2, max_words=12, max_frames=4)

def test_official_file_builds_the_model_it_holds(tmp_path):
    "As the framework saves it: weights inside a container, older code's names, a patch kernel of one frame"
    sd = official()
    torch.save(dict(meta=dict(epoch=3), state_dict=sd, message_hub={}), tmp_path/'a.pth')
    old = {k.replace('STAN_', 'timesFPN_'): v[:, :, None] if k == 'backbone.patch_embedding.weight' else v for k, v in sd.items()}
    torch.save(dict(state_dict={'module.' + k: v for k, v in old.items()} | {'module.backbone.timesFPN_cls_token': torch.zeros(1)}), tmp_path/'b.pth')
    a, b = build(tmp_path/'a.pth').eval(), build(tmp_path/'b.pth').eval()
    assert (a.card.depth, a.blocks, a.card.time) == (2, (1, 2), 'attention') and a.clip.card.quick_gelu
    x = torch.randn(1, 4, 3, 24, 24)
    with torch.no_grad(): assert torch.equal(a.encode_video(x), b.encode_video(x))
    c = create_model('mugstan', checkpoint=str(tmp_path/'a.pth'), vision_heads=2, text_heads=2, max_words=12, max_frames=4)           # another head, same weights
    with torch.no_grad(): assert torch.equal(a.encode_video(x), c.eval().encode_video(x))


@pytest.mark.parametrize('change,message', [
    (lambda d: {**d, 'backbone.what': torch.ones(1)}, 'backbone.what'),
    (lambda d: {k: v for k, v in d.items() if 'STAN_S_layers.0.mlp.fc1.weight' not in k}, 'c_fc.weight'),
    (lambda d: {k: v for k, v in d.items() if 'STAN_T_layers.1.self_attn.q_proj.bias' not in k}, 'in parts only'),
    (lambda d: {**d, 'backbone.STAN_time_embed.weight': torch.ones(64, 7)}, 'another shape')])
def test_damaged_official_files_are_refused_by_name(tmp_path, change, message):
    torch.save(dict(state_dict=official()), tmp_path/'good.pth'); model = build(tmp_path/'good.pth')
    torch.save(dict(state_dict=change(official())), tmp_path/'bad.pth')
    with pytest.raises(WeightsError, match=message): model.load_weights(tmp_path/'bad.pth')


def test_starts_from_any_clip(tmp_path):
    "A plain CLIP, or one inside another fine-tuned model: the branch begins as a copy of that CLIP's blocks"
    other = create_model('clip4clip', preset='tiny', head='seqTransf')
    for name, sd in dict(plain=other.clip.state_dict(), tuned=other.state_dict()).items():
        save_file({k: v.contiguous() for k, v in sd.items()}, tmp_path/f'{name}.safetensors')
        m = create_model('stan', preset='tiny')
        r = m.load_weights(tmp_path/f'{name}.safetensors')
        for j, i in enumerate(m.blocks): assert torch.equal(m.branch.spatial[j].mlp.c_fc.weight, other.clip.visual.transformer.resblocks[i].mlp.c_fc.weight)
        assert 'branch.time_embed.weight' in r.names('new')
        with pytest.raises(WeightsError, match='holds no branch'): create_model('stan', preset='tiny').load_weights(tmp_path/f'{name}.safetensors', exact=True)


def test_every_backbone_keeps_its_own_image_tower():
    "B/16 and L/14 get towers of their own sizes (no weights are made: shapes only)"
    from vidlab.clip import CLIPBackbone, arch_dims
    for name, (width, patch, positions) in {'ViT-B-32': (768, 32, 50), 'ViT-B-16': (768, 16, 197), 'ViT-L-14': (1024, 14, 257)}.items():
        with torch.device('meta'): b = StanBranch(width, width//64, 4)
        d = arch_dims(name)
        assert (d['vision_width'], d['patch'], (d['image_size']//d['patch'])**2 + 1) == (width, patch, positions)
        assert b.spatial[0].mlp.c_fc.weight.shape == (4*width, width)


def test_long_texts_keep_their_end():
    "Cut as published, every long text is pooled at the start token: the same vector for all"
    from vidlab.data.text import tokenize
    texts = ['a red circle moves left over and over and over and over again until it stops', 'three small blue squares wait and wait and wait and wait and wait and wait and go']
    m = create_model('stan', preset='tiny').eval()
    with torch.no_grad(): good, bad = (m.encode_text(*tokenize(texts, 12, cut=c)) for c in ('end', 'official'))
    assert torch.equal(bad[0], bad[1]) and not torch.equal(good[0], good[1])

# ---------------------------------------------------------------------------------------------------- runs

def test_recipes_are_complete():
    published = [f'{s}_{m}_b32' for s in ('msrvtt9k', 'didemo', 'lsmdc', 'webvid10m') for m in ('stan', 'mugstan')] + ['msrvtt9k_stan_b16', 'msrvtt9k_stan_l14', 'msrvtt9k_mugstan_b16', 'msrvtt9k_clipmean_b32',
                                                                                                              'k400_stan_b16', 'ssv2_stan_b16']
    assert set(published) <= set(list_recipes())
    for n in published: config_from(n), config_from(n + '+stan_compat')
    b = config_from('didemo_stan_b32')
    assert b.lr*b.coef_lr == pytest.approx(2e-6) and (b.lr, b.max_frames, b.options['tau'], b.grad_checkpointing) == (2e-5, 64, .05, True)


def test_retrieval_run_and_evaluation_from_its_checkpoint(shapes):
    f = run(small(shapes, model='mugstan', mug_tau=20.))
    first = read_json(f/'eval'/'test.json')
    assert first['metrics']['videos'] == 12 and len(losses(f)) == 4
    again = run_eval(make_config(**{**read_json(f/'config.json'), 'start': str(f.path)}))
    assert read_json(again/'eval'/'test.json')['metrics'] == first['metrics']
    pages = load_config(f.path); assert pages.options['mug_tau'] == 20.


@pytest.mark.long
@pytest.mark.parametrize('model', ['stan', 'mugstan'])
def test_two_processes_train_as_one(shapes, model, warm_ranks):
    cfg = small(shapes, model=model, drop_path=0., test_split='', val_split='')
    one, two = run(cfg), launch(cfg, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    a, b = (load_file(f/'ckpt'/'last'/'weights.safetensors') for f in (one, two))
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])        # Adam turns a rounding difference of a gradient near zero into a whole step
    assert (moved > 1e-4).float().mean() < .01


def test_recognition_run_by_class_names(shapes, tmp_path):
    "Labels against the names of the motions; the text tower stays as it was; a clip that cannot be read counts as wrong"
    cfg = small(shapes, task='recognition', templates=['{}', 'it {}'], smoothing=.1)
    f = run(cfg)
    e = read_json(f/'eval'/'test.json')
    assert set(e['metrics']) == {'top1', 'top5', 'clips', 'unread'} and e['protocol']['task'] == 'recognition' and e['protocol']['templates'] == ['{}', 'it {}']
    rows = load_manifest(cfg, 'test')
    (tmp_path/'names.txt').write_text('\n'.join(MOTIONS[:3]))
    with pytest.raises(ValueError, match='3 class names'): run(small(shapes, task='recognition', classes=str(tmp_path/'names.txt')))
    bad = tmp_path/'rows.csv'; clips = [rows.row(i) for i in range(4)]
    (tmp_path/'broken.mp4').write_bytes(b'no video at all')
    with open(bad, 'w', newline='') as h:
        w = csv.writer(h); w.writerow(['path', 'label', 'split'])
        for r in clips: w.writerow([r['path'], r['label'], 'test'])
        w.writerow([str(tmp_path/'broken.mp4'), 0, 'test'])
    (tmp_path/'all.txt').write_text('\n'.join(MOTIONS))
    m = run_eval(small(shapes, task='recognition', data='manifest', data_path=str(bad), video_root='/', classes=str(tmp_path/'all.txt'), on_bad='miss', start=str(f.path)))
    got = read_json(m/'eval'/'test.json')['metrics']
    assert (got['clips'], got['unread']) == (5, 1) and got['top5'] <= 80


def test_the_text_tower_of_a_recognition_is_frozen(shapes):
    from vidlab.train import build_task
    t = build_task(small(shapes, task='recognition'))
    assert not any(p.requires_grad for n, p in t.model.named_parameters() if n.startswith('clip.') and 'visual' not in n)
    assert any(p.requires_grad for n, p in t.model.named_parameters() if n.startswith('branch.'))


def webvid(shapes, root, n=16):
    "The training clips as WebVid's list"
    rows = Manifest.read(Path(shapes)/'clips'/'train.csv')
    (root/'videos').mkdir(parents=True)
    with open(root/'results_train.csv', 'w', newline='') as h:
        w = csv.writer(h); w.writerow(['videoid', 'contentUrl', 'duration', 'page_dir', 'name'])
        for i in range(n):
            r = rows.row(i)
            (root/'videos'/f'page{i%2}').mkdir(exist_ok=True)
            (root/'videos'/f'page{i%2}'/f'{i}.mp4').write_bytes(Path(r['path']).read_bytes())
            w.writerow([i, 'x', 'PT1S', f'page{i%2}', r['text']])
    return root

def shards(shapes, root, n=16):
    "The same as tar shards"
    rows = Manifest.read(Path(shapes)/'clips'/'train.csv'); root.mkdir(parents=True)
    for s in range(4):
        with tarfile.open(root/f'{s:05d}.tar', 'w') as t:
            for i in range(s, n, 4):
                r = rows.row(i)
                for ext, data in (('mp4', Path(r['path']).read_bytes()), ('txt', r['text'].encode())):
                    m = tarfile.TarInfo(f'{i:08d}.{ext}'); m.size = len(data); t.addfile(m, io.BytesIO(data))
    return root


@pytest.mark.parametrize('kind', ['webvid', 'shards'])
def test_post_pretraining_measured_zero_shot_on_another_set(shapes, tmp_path, kind):
    "Trains on one set, validates after every epoch and ends on another; fewer frames and longer texts in training"
    more = dict(data_path=str(webvid(shapes, tmp_path/'w')/'results_{split}.csv'), video_root=str(tmp_path/'w'/'videos')) if kind == 'webvid' else dict(data_path=str(shards(shapes, tmp_path/'s')))
    cfg = small(shapes, data=kind, **{k: v for k, v in more.items()}, eval_data='shapes', eval_path=str(shapes), max_frames=2, eval_frames=4, max_words=20, eval_words=12, epochs=2)
    f = run(cfg)
    e = read_json(f/'eval'/'test.json')
    assert (e['protocol']['data'], e['protocol']['frames'], e['protocol']['max_words'], e['metrics']['videos']) == ('shapes', 4, 12, 12)
    assert [r['step'] for r in f.metrics() if r['kind'] == 'epoch'] == [2, 4] and all('t2v/R1' in r for r in f.metrics() if r['kind'] == 'epoch')
    half = run(small(shapes, **{**read_json(f/'config.json'), 'options': {}, 'start': str(f.path), 'eval_data': '', 'data': 'shapes', 'data_path': str(shapes), 'epochs': 1}))      # fine-tuned from there
    assert len(losses(half)) == 4


def test_several_training_sets_take_turns(shapes, tmp_path):
    w = webvid(shapes, tmp_path/'w', 8)
    cfg = small(shapes, more=[dict(data='webvid', data_path=str(w/'results_train.csv'), video_root=str(w/'videos'))], test_split='', val_split='')
    assert len(losses(run(cfg))) == 5                # four batches of one, one of the other
    with pytest.raises(ValueError, match=r'more\[0\]'): run(small(shapes, more=[dict(data='webvid', dta_path='x')]))


def test_rate_follows_the_batch(shapes):
    from vidlab.core import RunFolder
    from vidlab.learner import make_engine
    from vidlab.train import build_learner
    rate = lambda **kw: build_learner(small(shapes, test_split='', val_split='', **kw), RunFolder.new('x'), make_engine('fp32', 'cpu')).opt.param_groups[-1]['base_lr']
    assert rate(lr_batch=32, accum=2) == pytest.approx(rate()/2)


@pytest.mark.parametrize('options,message', [(dict(depth=9), 'depth 9'), (dict(time='conf'), "did you mean 'conv'"), (dict(tau=-1.), 'tau'), (dict(head='simpel'), "did you mean 'simple'"),
                                             (dict(max_frames=65), 'positions=65'), (dict(blocks=[0]), 'rising'), (dict(checkpoint='nowhere.pth'), 'no such file')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): create_model('stan', preset='tiny', **options)


def test_more_frames_than_the_branch_knows():
    m = create_model('stan', preset='tiny', positions=8, max_frames=4)
    with pytest.raises(ValueError, match='8 time embeddings'): m.encode_video(torch.zeros(1, 9, 3, 64, 64))


def test_a_frozen_clip_costs_no_gradient():
    m = create_model('stan', preset='tiny', freeze='all').train()
    from vidlab.cost import noise_batch
    task = RetrievalTask(m, directions='sum')
    task(noise_batch(m.card, 3, 4))['loss'].backward()
    assert {n.split('.')[0] for n, p in m.named_parameters() if p.grad is not None} == {'branch'}


def test_classes_of_folders_and_zero_shot(shapes, tmp_path):
    "A folder per class names the classes itself; a trained model recognises them without having seen them"
    rows = Manifest.read(Path(shapes)/'clips'/'test.csv')
    for i in range(6):
        r = rows.row(i); d = tmp_path/'v'/'test'/MOTIONS[int(r['label'])]; d.mkdir(parents=True, exist_ok=True)
        (d/f'{i}.mp4').write_bytes(Path(r['path']).read_bytes())
    f = run_eval(config_from('ucf101_zeroshot_stan_b16', preset='tiny', weights='random', depth=2, video_root=str(tmp_path/'v'), classes='', max_frames=4, max_words=12, device='cpu', precision='fp32', workers=0))
    assert read_json(f/'eval'/'test.json')['metrics']['clips'] == 6
