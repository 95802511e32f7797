"The contract of every model, and two models from outside: one page each in a copy of the tree, nothing else touched."
import os, sys, textwrap
import pytest
import warm
from outside import add_pages
from vidlab.contract import check_model
from vidlab.data.shapes import make_shapes
from vidlab.registry import list_models

VARIANTS = [('clip4clip', dict(head='seqLSTM')), ('clip4clip', dict(head='seqTransf', patch='3d')), ('clip4clip', dict(head='tightTransf')), ('clip4clip', dict(head='mug', mug_mode='drl_wti')),
            ('stan', dict(depth=0)), ('stan', dict(time='3layerST', tau=0.)), ('mugstan', dict(head='drl_wti')), ('tdsclip', dict(pool='transf', plugin='dividedst')), ('probe', dict(norm='none')),
            ('tvts', dict(text='clip:tiny', text_weights='random'))]

@pytest.mark.parametrize('name,options', [(m, {}) for m in list_models()] + VARIANTS, ids=str)
def test_contract(name, options):
    pieces = check_model(name, **options).index
    assert {'card', 'forward', 'backward', 'freeze', 'layer_of', 'no_decay', 'parts', 'token_layout', 'framewise', 'load_weights', 'options'} == set(pieces)


# ---------------------------------------------------------------------------------------------------- two models from outside
GRU = '''
"""CLIP's frame features through a gated recurrent unit; the text meets the last state."""
import torch
from torch import nn
from vidlab.clip import CLIPBackbone, create_clip
from vidlab.contract import Card, VideoModel
from vidlab.registry import register_model
#---
class GRU4CLIP(VideoModel):
    "What the frames say one after the other, beside their mean"
    def __init__(self, towers:CLIPBackbone, keep:float=.5, max_frames:int=4, max_words:int=16):
        super().__init__()
        d = towers.card.embed_dim
        self.towers = towers
        self.into,self.gru,self.out = nn.Linear(d, d),nn.GRU(d, d, batch_first=True),nn.Linear(d, d)
        self.keep = nn.Parameter(torch.tensor(float(keep)))                     # how much of the frame average stays
        self.temperature = nn.Parameter(torch.tensor(.07).log())
        self.card = Card.of_clip(towers, name='gru4clip', frames=max_frames, words=max_words)

    def unused_parameters(self): return {'towers.logit_scale'}                  # it has a temperature of its own

    def frames(self, video): return self.towers.encode_image(video.flatten(0, 1)).float().unflatten(0, video.shape[:2])

    def encode_video(self, video, video_mask=None): # -> (B,D)
        f = self.frames(video)
        mask = f.new_ones(f.shape[:2]) if video_mask is None else video_mask.float()
        h,_ = self.gru(self.into(f))
        last = h[torch.arange(len(h)), mask.sum(1).long().clamp(min=1) - 1]
        mean = (f*mask[..., None]).sum(1)/mask.sum(1, keepdim=True).clamp(min=1)
        return self.keep*mean + (1 - self.keep)*self.out(last)

    def encode_text(self, text, text_mask=None): return self.towers.encode_text(text).float()

    def similarity(self, text, video, video_mask=None, text_mask=None):
        t,v = (a/a.norm(dim=-1, keepdim=True) for a in (text, video))
        return t @ v.T/self.temperature.exp()

    def forward(self, batch):
        return dict(text=self.encode_text(batch['text']), video=self.encode_video(batch['video'], batch.get('video_mask')))

    def pictures(self, task, batch):
        x = self.into(self.frames(batch['video']))
        h,w = torch.zeros_like(x[:, 0]),self.gru
        z = []
        for t in range(x.shape[1]):
            a,b = x[:, t] @ w.weight_ih_l0.T + w.bias_ih_l0,h @ w.weight_hh_l0.T + w.bias_hh_l0
            z.append((a + b).chunk(3, 1)[1].sigmoid().mean(1))
            h = w(x[:, t:t+1], h[None])[1][0]
        return dict(gate=dict(draw='line', lines=dict(update=torch.stack(z, 1)[0]), title='how much of the past each frame keeps'))
#---
@register_model
def gru4clip(preset:str='tiny', # 'tiny' | 'base'
             clip:str=None, weights:str=None, # architecture or file, and its weights; None: the preset's
             keep:float=.5, max_frames:int=4, max_words:int=16
            ) -> GRU4CLIP:
    "CLIP and a gated recurrent unit"
    arch,start = dict(tiny=('tiny', 'random'), base=('ViT-B-32', None))[preset]
    return GRU4CLIP(create_clip(clip or arch, weights or start), keep, max_frames, max_words)
'''

R3D = '''
"""A small 3-D residual network: no tokens, no attention, nothing pretrained, batch norm inside."""
import torch
from torch import nn
from vidlab.contract import Card, VideoModel
from vidlab.registry import register_model
#---
def conv(i, o, k, stride):
    return nn.Sequential(nn.Conv3d(i, o, k, stride, [(a - 1)//2 for a in k], bias=False), nn.BatchNorm3d(o), nn.ReLU())

class Residual(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.a,self.b = conv(i, o, (3, 3, 3), stride),conv(o, o, (3, 3, 3), (1, 1, 1))
        self.skip = nn.Conv3d(i, o, 1, stride) if i != o or max(stride) > 1 else nn.Identity()

    def forward(self, x): return torch.relu(self.b(self.a(x)) + self.skip(x))
#---
class R3D(VideoModel):
    "Convolutions over space and time, then the mean"
    depth_of,head_names = {'stem.*': 0, 'stages.{}.*': 1},('fc.*',)
    def __init__(self, classes:int=6, width:int=8, stages:int=3, size:int=32, frames:int=4):
        super().__init__()
        w = [width*2**i for i in range(stages)]
        self.stem = conv(3, width, (3, 7, 7), (1, 2, 2))
        self.stages = nn.ModuleList([Residual(([width] + w)[i], w[i], (1 if i == 0 else 2,)*3) for i in range(stages)])
        self.fc = nn.Linear(w[-1], classes)
        self.card = Card('r3d', size, frames, classes=classes, mean=(.5,)*3, std=(.25,)*3)

    def each(self, video): # -> the output of every stage
        x = self.stem(video.transpose(1, 2))
        for s in self.stages:
            x = s(x)
            yield x

    def forward(self, batch): return dict(logits=self.fc(list(self.each(batch['video']))[-1].mean((2, 3, 4))))

    def pictures(self, task, batch):
        T = batch['video'].shape[1]
        norms = {f'stage {i}': x[0].pow(2).mean((0, 2, 3)).sqrt() for i,x in enumerate(self.each(batch['video']))}
        return dict(stages=dict(draw='line', lines={k: v.repeat_interleave(-(-T//len(v)))[:T] for k,v in norms.items()}, title='size of the output of each stage'))
#---
@register_model
def r3d(preset:str='tiny', classes:int=6, width:int=None, max_frames:int=4) -> R3D:
    "A small 3-D residual network"
    return R3D(classes, width or dict(tiny=8, base=64)[preset], size=dict(tiny=32, base=112)[preset], frames=max_frames)
'''

@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    "A copy of pages and modules with two pages more, exported"
    root = tmp_path_factory.mktemp('tree')
    pages = {'models/36_gru4clip.ipynb': ('models.gru4clip', GRU), 'models/37_r3d.ipynb': ('models.r3d', R3D)}
    assert add_pages(root, pages) == {'_modidx.py', 'gru4clip.py', 'r3d.py'}
    return root

@pytest.fixture(scope='session')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=16, val=4, test=6)))

HEAD = '''
import json, sys, torch
import vidlab, vidlab.train as T
sys.path.append(sys.argv[3])
import warm
T.subprocess = warm                                         # `launch`
from safetensors.torch import load_file
from vidlab.callbacks import CALLBACKS
from vidlab.contract import check_model
from vidlab.core import read_json, RunFolder
from vidlab.explain import clip_of_run, explain_run, load_run, methods_of, patch_maps
from vidlab.learner import make_engine
from vidlab.registry import create_model, list_models
from vidlab.results import untrained_name
from vidlab.train import build_learner, launch, make_config, run, run_eval, start_folder

def cfg(**kw):
    base = dict(model=MODEL, data_path=sys.argv[1], sampler='segment', max_frames=4, epochs=1, batch_size=4, eval_batch_size=4, workers=0, log_every=1, lr=1e-3, device='cpu', val_split='')
    return make_config(**{**base, **MORE, **kw})
def fails(f, *words):
    try: f()
    except Exception as e:
        assert all(w in str(e) for w in words), e
        return
    raise AssertionError(f'no error with {words}')
def weights(f): return load_file(f/'ckpt'/'last'/'weights.safetensors')
def metrics(f): return read_json(f/'eval'/'test.json')['metrics']
def rates(**kw): return {n: g['base_lr'] for g in build_learner(cfg(**kw), RunFolder.new('x'), make_engine('fp32', 'cpu')).opt.param_groups for n in g['names']}

class Cut:
    def after_step(self, learn):
        if learn.step == 3: raise KeyboardInterrupt
def resumed(**kw): # a run of two epochs, killed at its third step and resumed
    CALLBACKS['cut'] = Cut
    f = start_folder(cfg(epochs=2, save_every=1, test_split='', callbacks=['cut'], **kw))
    try: run(T.load_config(f.path), str(f.path))
    except KeyboardInterrupt: pass
    assert f.status()['state'] != 'done'
    return run(cfg(epochs=2, save_every=1, test_split='', **kw), resume=str(f.path))
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

assert vidlab.__path__[0].startswith(sys.argv[2]), vidlab.__path__
assert {'gru4clip', 'r3d'} <= set(list_models())
check_model(MODEL)
'''

def execute(tree, shapes, tmp_path, script, model, **more):
    code = f'MODEL, MORE = {model!r}, {more!r}\n' + HEAD + textwrap.dedent(script)
    env = {**os.environ, 'PYTHONPATH': str(tree), 'VIDLAB_OUTPUTS': str(tmp_path/'outputs'), 'OMP_NUM_THREADS': '1'}
    (tmp_path/'steps.py').write_text(code)
    r = warm.run([sys.executable, str(tmp_path/'steps.py'), str(shapes), str(tree), str(warm.ROOT/'tests')], capture_output=True, text=True, cwd=tree, env=env)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-5000:]


@pytest.mark.slow
def test_a_retrieval_model_from_outside(tree, shapes, tmp_path):
    execute(tree, shapes, tmp_path, '''
    more = dict(ema=.9, accum=2, coef_lr=.1)
    whole = run(cfg(epochs=2, save_every=1, test_split='', **more))
    cut = resumed(**more)
    assert same(weights(whole), weights(cut)) and whole.status()['state'] == 'done'
    r = rates(coef_lr=.1)
    assert r['gru.weight_ih_l0'] == 1e-3 and abs(r['towers.visual.proj'] - 1e-4) < 1e-12 and 'towers.logit_scale' not in r
    assert run(cfg(grad_checkpointing=True, half_weights=True, optimizer='bertadam', eps=1e-6, coef_lr=1e-3, test_split='')).status()['state'] == 'done'
    fails(lambda: cfg(head='meanP'), 'gru4clip has no option head'); fails(lambda: cfg(options=dict(head='meanP')), 'gru4clip has no option head')
    e = run_eval(cfg(start=str(whole.path)))
    assert metrics(e)['texts'] == 6 and metrics(e) == metrics(run_eval(cfg(start=str(whole.path))))
    assert untrained_name(run_eval(cfg()), 'mine') == 'mine, untrained' and untrained_name(run_eval(cfg(model='clip4clip')), 'mine') == 'CLIP, frames averaged'
    assert set(explain_run(whole, sid=1)) == {'patches', 'gate'}
    assert metrics(run(cfg(task='recognition')))['clips'] == 6
    two = launch(cfg(), 2)
    assert two.status()['state'] == 'done' and metrics(two)['videos'] == 6
    ''', 'gru4clip', weights='random')

@pytest.mark.slow
def test_a_network_without_attention_from_outside(tree, shapes, tmp_path):
    execute(tree, shapes, tmp_path, '''
    whole = run(cfg(epochs=2, save_every=1, test_split='', ema=.9, accum=2))
    assert same(weights(whole), weights(resumed(ema=.9, accum=2)))
    fails(lambda: run(cfg(coef_lr=.1)), 'nothing in R3D is pretrained'); fails(lambda: run(cfg(half_weights=True)), 'R3D has no CLIP')
    fails(lambda: run(cfg(grad_checkpointing=True)), 'R3D has no part'); fails(lambda: run(cfg(task='same_class')), 'encode_video')
    fails(lambda: run(cfg(task='retrieval')), 'compares no captions')
    assert set(rates(layer_decay=.5).values()) == {1e-3*.5**i for i in range(5)}
    done = run(cfg())
    assert metrics(done)['clips'] == 6 and metrics(run_eval(cfg(start=str(done.path)))) == metrics(done)
    figs = explain_run(done, sid=1)
    assert set(figs) == {'patches', 'stages'} and 'no attention' in figs['patches'].get_suptitle()
    task, c = load_run(done); b = clip_of_run(c, task.model.card, sid=1)
    assert methods_of(task, b) == ('integrated', 'occlusion', 'relevance') and patch_maps(task, b).shape == (1, 4, 16, 16) and patch_maps(task, b).max() > 0
    fails(lambda: patch_maps(task, b, 'raw'), 'gradient x input')
    ''', 'r3d', task='recognition')
