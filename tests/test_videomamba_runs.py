"Runs of VideoMamba: masked pretraining and fine-tuning from it, long videos in windows, regression, schedules, resume, two processes."
import dataclasses
import pytest
import torch
from safetensors.torch import load_file
from vidlab.core import read_json, seed_everything
from vidlab.ssm import scan_path
from vidlab.train import build_learner, build_task, config_from, latest_run, launch, list_recipes, make_clips, make_config, run, run_eval, start_folder
from vidlab.learner import make_engine


@pytest.fixture(scope='session')
def shapes(rendered): return rendered(clips=dict(train=24, val=8, test=10), long=dict(train=8, val=4, test=4))      # as in test_ready.py

pytestmark = pytest.mark.usefixtures('outputs')

def small(shapes, recipe='shapes_videomamba', **kw):
    base = dict(data_path=str(shapes), dim=32, depth=2, state=4, max_frames=4, epochs=1, batch_size=8, eval_batch_size=8, workers=0, log_every=1, precision='fp32', device='cpu')
    if 'pretrain' in recipe: base.update(teacher_weights='random')
    if 'long' in recipe: base.update(start='')
    return config_from(recipe, **{**base, **kw})

def losses(folder): return [r['loss'] for r in folder.metrics() if r['kind'] == 'step']


SIZES = ('ti', 's', 'm', 'm_mask')
PUBLISHED = ([f'k400_videomamba_{s}_{f}' for s in SIZES for f in ('f8', 'f16', 'f32', 'f64', 'f64_384')] + [f'ssv2_videomamba_{s}_{f}' for s in SIZES for f in ('f8', 'f16', 'f16_288')]
             + [f'{d}_videomamba_{s}_{f}' for d in ('breakfast', 'coin') for s in SIZES for f in ('f32', 'f64')] + [f'{d}_videomamba_m_pretrain' for d in ('k400', 'ssv2')]
             + [f'lvu_videomamba_{t}' for t in ('relationship', 'way_speaking', 'scene', 'director', 'genre', 'writer', 'year', 'like_ratio', 'view_count')])

def rate(c): return c.lr*c.batch_size*c.repeats*c.accum/c.lr_batch

def test_published_recipes():
    assert set(PUBLISHED) <= set(list_recipes())
    for r in PUBLISHED:
        c = config_from(r)
        if 'pretrain' not in r: config_from(r + '+videomamba_compat')
    want = dict(k400_videomamba_ti_f8=8e-4, k400_videomamba_ti_f32=4e-4, k400_videomamba_m_f8=8e-4, k400_videomamba_m_f16=2e-4, k400_videomamba_m_f64=5e-5, k400_videomamba_m_mask_f8=4e-4,
                k400_videomamba_ti_f64_384=3.75e-6, k400_videomamba_s_f64_384=5e-6, k400_videomamba_m_f64_384=1.25e-6, ssv2_videomamba_ti_f8=1.6e-3, ssv2_videomamba_m_f16=8e-4, ssv2_videomamba_m_mask_f8=4e-4,
                breakfast_videomamba_s_f64=2e-4, breakfast_videomamba_m_f32=1e-4, coin_videomamba_m_f64=5e-5, lvu_videomamba_scene=2e-4, k400_videomamba_m_pretrain=1.2e-3)
    assert {r: rate(config_from(r)) for r in want} == pytest.approx(want)
    c = config_from('ssv2_videomamba_s_f16_288')
    assert (c.options['image_size'], c.max_frames, c.segments, c.eval_clips, c.eval_crops, 'flip' in c.augment) == (288, 16, 'floor', 2, 3, False)
    assert (number := config_from('lvu_videomamba_view_count')).task == 'regression' and 'mixup' not in number.options


@pytest.mark.slow
def test_pretraining_then_finetuning(shapes):
    "The student learns, no checkpoint holds the teacher, fine-tuning finds the newest run by its recipe"
    pre = run(small(shapes, 'shapes_videomamba_pretrain', epochs=6, lr=3e-3, drop_path=0.))
    seen = [r['align'] for r in pre.metrics() if 'align' in r]
    assert seen[-1] < seen[0] and losses(pre)[-1] < losses(pre)[0]
    sd = load_file(pre/'ckpt'/'best'/'weights.safetensors')
    assert not any('teacher' in k or 'resblocks' in k for k in sd) and read_json(pre/'env.json')['scan'] == scan_path('cpu')
    assert latest_run('shapes_videomamba_pretrain') == pre.path
    cfg = small(shapes, 'shapes_videomamba_ft')
    task = build_task(dataclasses.replace(cfg, start=str(pre.path)))
    w = task.model.state_dict()
    assert torch.equal(w['layers.0.mixer.A_log'], sd['layers.0.mixer.A_log']) and torch.equal(w['norm_f.weight'], sd['norm.weight'])
    f = run(cfg)
    assert read_json(f/'config.json')['start'] == str(pre.path) and read_json(f/'eval'/'test.json')['metrics']['clips'] == 10


@pytest.mark.long
def test_two_processes_pretrain_as_one(shapes, warm_ranks):
    "The published tap leaves the last block without a gradient; masks are drawn clip by clip, the same for one process and for two"
    cfg = small(shapes, 'shapes_videomamba_pretrain', tap='official', mask='tube', val_split='', drop_path=0.)
    one, two = run(cfg), launch(cfg, 2)
    assert len(losses(two)) == 3 and losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_no_student_no_teacher_no_grid(shapes):
    with pytest.raises(ValueError, match='no student'): build_task(small(shapes, task='masked', teacher='tiny', teacher_weights='random'))
    with pytest.raises(ValueError, match='out_dim=64'): build_task(small(shapes, 'shapes_videomamba_pretrain', out_dim=32))
    with pytest.raises(ValueError, match='grid'): build_task(small(shapes, 'shapes_videomamba_pretrain', patch=8))


def test_regression_run(shapes):
    f = run(small(shapes, 'shapes_long_regression', epochs=2))
    m = read_json(f/'eval'/'test.json')['metrics']
    assert m['clips'] == 4 and m['mse'] > 0 and m['mae']**2 <= m['mse'] + 1e-6
    kept = [r for r in f.metrics() if 'mse' in r]
    best = read_json(f/'ckpt'/'best'/'card.json')['metrics']['mse']
    assert best == pytest.approx(min(r['mse'] for r in kept))               # less is better
    with pytest.raises(ValueError, match='target'): run(small(shapes, task='regression'))


def test_windows_of_long_videos(shapes):
    "A video counts by the mean over all of its windows, or as published by its first"
    cfg = small(shapes, 'shapes_long', cut_windows=60., window_stride=30.)
    ds = make_clips(cfg, 'test', 64)
    per = [len(ds.groups.rows(i)) for i in range(ds.n_clips)]
    assert ds.n_clips == 4 and min(per) > 1 and len(ds) == sum(per)
    assert len({(s['sid'], s['view']) for s in (ds[i] for i in range(len(ds)))}) == len(ds)
    f = run(cfg)
    all_, first = (read_json(run_eval(make_config(**{**read_json(f/'config.json'), 'start': str(f.path), 'first_window': o}))/'eval'/'test.json')['metrics'] for o in (False, True))
    assert all_['clips'] == first['clips'] == 4
    one = make_clips(dataclasses.replace(cfg, first_window=True), 'test', 64)
    assert len(one) == 4 and len(make_clips(dataclasses.replace(cfg, first_window=True), 'train', 64, unit='row', train=True)) > 8


def test_weight_decay_moves_and_ema_is_measured(shapes):
    cfg = small(shapes, weight_decay=.1, weight_decay_end=.3, ema=.5, epochs=2, optimizer='timm:adamw', layer_decay=.75, groups='ends')
    learn = build_learner(cfg, start_folder(cfg), make_engine('fp32', 'cpu'))
    rates = {round(g['lr']/cfg.lr, 4) for g in learn.opt.param_groups}
    assert rates == {1., round(.75**3, 4)}                                    # of two blocks: the embeddings alone are slower
    assert [round(learn.decay(s), 3) for s in (0, 3)] == [.1, .2]
    learn.train.close()
    f = run(cfg)
    ema, w = (load_file(f/'ckpt'/'last'/f'{n}.safetensors') for n in ('ema', 'weights'))
    assert any(not torch.equal(ema[k], w[k]) for k in w)
    assert read_json(f/'eval'/'test.json')['protocol']['weights']['file'].startswith('ckpt/best')


def test_automatic_resume(shapes):
    "The newest unfinished run of the same settings goes on; other settings start anew"
    class Stop:
        def after_step(self, learn):
            if learn.step == 2: raise KeyboardInterrupt
    cfg = small(shapes, epochs=2, save_every=1)
    folder = start_folder(cfg)
    seed_everything(cfg.seed)
    learn = build_learner(cfg, folder, make_engine('fp32', 'cpu')); learn.cbs.append(Stop())
    with pytest.raises(KeyboardInterrupt): learn.fit()
    learn.train.close()
    assert start_folder(dataclasses.replace(cfg, lr=1e-5), 'auto').path != folder.path
    f = run(cfg, resume='auto')
    assert f.path == folder.path and f.status()['state'] == 'done'
    whole = run(cfg)
    a, b = (load_file(o/'ckpt'/'last'/'weights.safetensors') for o in (f, whole))
    assert whole.path != f.path and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(FileNotFoundError, match='no finished run'): run(small(shapes, start='latest:nothing'))


def test_val_views_are_few(shapes, monkeypatch):
    "During training one view of each video, whatever the final evaluation takes"
    from vidlab import build
    seen = []
    kept = build.evaluate
    monkeypatch.setattr(build, 'evaluate', lambda task, loaders, engine=None: seen.append((loaders['video'].ds.clips, loaders['video'].ds.crops)) or kept(task, loaders, engine))
    folder = run(small(shapes, eval_clips=2, eval_crops=3))
    assert seen == [(1, 1)] and (p := read_json(folder/'eval'/'test.json')['protocol'])['clips'] == 2 and p['crops'] == 3
    run(small(shapes, eval_clips=2, val_clips=2, val_crops=3, test_split=''))
    assert seen[1:] == [(2, 3)]


def test_the_teacher_has_its_own_interval_and_the_loss_a_factor(shapes):
    "Two layers of a student of three blocks; those of the teacher (four blocks) are as far apart, or as told"
    make = lambda **kw: build_task(small(shapes, 'shapes_videomamba_pretrain', depth=3, aligned=2, interval=2., **kw))
    same, apart, heavy = make(), make(teacher_interval=1.), make(loss_ratio=3.)
    n = len(same.teacher.clip.state_dict()) and same.teacher.clip.card.vision_layers
    assert (same.teacher.blocks, apart.teacher.blocks, same.model.aligned, apart.model.aligned) == ([n-3, n-1], [n-2, n-1], [0, 2], [0, 2])
    assert apart.protocol()['teacher_interval'] == 1.
    heavy.load_state_dict(same.state_dict())
    c = same.model.card
    b = dict(video=torch.randint(0, 256, (2, c.frames, 3, c.size, c.size), dtype=torch.uint8), video_mask=torch.ones(2, c.frames).bool(), sid=torch.arange(2), view=torch.zeros(2).long())
    heavy.teacher = same.teacher
    losses = [float(t.eval()(b)['loss'].detach()) for t in (same, heavy)]
    assert losses[1] == pytest.approx(3*losses[0]) and losses[0] > 0
    assert torch.equal(same.eval_step(b)['align'], heavy.eval_step(b)['align'])


def test_what_is_erased_has_the_pixels_of_the_model(shapes):
    "VideoMamba's pixels are ImageNet's: the mean of a training clip whose box is filled with the mean is zero there"
    cfg = small(shapes, augment='centre erase-p1-l0.3-fill=const')
    task = build_task(cfg)
    ds = make_clips(cfg, 'train', task.model.card, train=True)
    s = ds[0, 0]
    x = task.prep({k: s[k][None] for k in ('video', 'video_mask')})['video'].abs().amax((0, 1, 2))
    assert (x < .5/255/.2).float().mean() > .25
