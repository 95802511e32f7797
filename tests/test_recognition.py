"Recognition runs: TDS-CLIP and the probe on rendered clips, from video files and from folders of pictures; several views, mixing, few shots, resume."
import subprocess, sys
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from vidlab.core import read_json
from vidlab.data.annots import Manifest
from vidlab.data.shapes import MOTIONS, make_shapes
from vidlab.explain import explain_run, load_run
from vidlab.results import class_table, comparison, show_eval, worst
from vidlab.train import config_from, list_recipes, load_manifest, make_config, run, run_eval

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=36, val=12, test=12)))

pytestmark = pytest.mark.usefixtures('outputs')

def small(shapes, **kw):
    return config_from('shapes_tdsclip', **{**dict(data_path=str(shapes), weights='random', max_frames=3, epochs=1, batch_size=12, eval_batch_size=12, workers=0, log_every=1, precision='fp32', device='cpu'), **kw})

def losses(folder): return [r['loss'] for r in folder.metrics() if r['kind'] == 'step']


def test_published_recipes():
    want = {f'{d}_tdsclip_{b}' for d in ('ssv1', 'ssv2', 'k400') for b in ('b16', 'l14')}
    assert want <= set(list_recipes())
    for r in want:
        c = config_from(r + '+tdsclip_compat')
        assert config_from(r).groups == 'all'
        assert (c.max_frames, c.weight_decay, c.smoothing, c.lr_every, c.groups, c.repeats) == (8, .15, .1, 10, 'tdsclip', 2) and c.warmup*c.epochs == pytest.approx(4)
        assert (c.swap_sides, tuple(c.stretch)) == ((False, ()) if 'k400' in r else (True, (256, 320)))


def test_classifier_run_measures_every_view_once(shapes):
    f = run(small(shapes, eval_clips=2, eval_crops=3, short_side=72))
    e = read_json(f/'eval'/'test.json')
    assert (e['metrics']['clips'], e['protocol']['clips'], e['protocol']['crops'], e['protocol']['before_crop']) == (12, 2, 3, 72)
    cfg = small(shapes)
    assert class_table(f, list(MOTIONS))['clips'].sum() == 12 and len(worst(f, cfg, n=3)) == 3 and show_eval(f, cfg)
    assert float(comparison({'tds': f}, load_manifest(cfg, 'test'))['top1']['tds']) == pytest.approx(e['metrics']['top1'], abs=.05)
    again = run_eval(make_config(**{**read_json(f/'config.json'), 'start': str(f.path)}))
    assert read_json(again/'eval'/'test.json')['metrics'] == e['metrics']
    figs = explain_run(f, sid=2)
    assert set(figs) == {'patches'}
    task, _ = load_run(f)
    assert not any(p.requires_grad for n, p in task.model.named_parameters() if n.startswith('clip.'))


def test_the_frozen_tower_never_changes(shapes):
    f = run(small(shapes, val_split='', test_split=''))
    sd = load_file(f/'ckpt'/'last'/'weights.safetensors')
    own = [k for k in sd if k.startswith('clip.')]
    g = run(small(shapes, epochs=2, val_split='', test_split=''))
    later = load_file(g/'ckpt'/'last'/'weights.safetensors')
    assert own and all(torch.equal(sd[k], later[k]) for k in own) and not torch.equal(sd['fc.weight'], later['fc.weight'])


@pytest.mark.slow
def test_folders_of_pictures_train_like_the_videos(shapes, tmp_path):
    "The same recipe on extracted JPEG folders: the same frames, so nearly the same losses"
    rows = Manifest.read(Path(shapes)/'clips'/'train.csv')
    done = subprocess.run([sys.executable, str(ROOT/'data_tools'/'extract_frames.py'), str(Path(shapes)/'clips'/'train.csv'), str(tmp_path/'frames'), '--quality', '98', '--workers', '1'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path/'names.txt').write_text('\n'.join(MOTIONS))
    same = dict(val_split='', test_split='', classes=str(tmp_path/'names.txt'))
    a = run(small(shapes, **same))
    b = run(small(shapes, data='manifest', **{**same, 'data_path': str(tmp_path/'frames'/'manifest.csv'), 'train_split': rows.row(0).get('split') or 'train'}))
    assert losses(a) == pytest.approx(losses(b), rel=.02)
    with pytest.raises(AssertionError): assert losses(a) == pytest.approx(losses(run(small(shapes, seed=1, **same))), rel=.02)


@pytest.mark.parametrize('options', [dict(mixup=.8, cutmix=1.), dict(augment='rrc flip', repeats=2), dict(few_shot=3, batch_size=9), dict(augment='rand-m7-n2 flip'), dict(head='text', templates=['{}', 'it {}'])])
def test_training_options(shapes, options):
    f = run(small(shapes, val_split='', test_split='', **options))
    assert f.status()['state'] == 'done' and all(l == l for l in losses(f))
    if 'few_shot' in options: assert len(losses(f)) == 2


def test_resume_in_the_middle_of_an_epoch(shapes):
    "Batch statistics and mixing go on as if nothing had happened"
    cfg = small(shapes, epochs=2, mixup=.8, val_split='', test_split='')
    whole = run(cfg)
    from vidlab.learner import Learner
    real, n = Learner.one_step, [0]
    def stop(self, batches):
        n[0] += 1
        if n[0] == 5: raise KeyboardInterrupt
        return real(self, batches)
    cfg2 = small(shapes, epochs=2, mixup=.8, val_split='', test_split='', save_every=1)
    from vidlab.train import start_folder
    folder = start_folder(cfg2)
    Learner.one_step = stop
    try:
        with pytest.raises(KeyboardInterrupt): run(cfg2, str(folder.path))
    finally: Learner.one_step = real
    run(cfg2, resume=str(folder.path))
    a, b = (load_file(f/'ckpt'/'last'/'weights.safetensors') for f in (whole, folder))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_neighbours_need_a_sampler_that_has_them(shapes):
    with pytest.raises(ValueError, match='neighbours'): run(small(shapes, sampler='grid', rate=4))


def test_names_go_to_the_text_tower_as_words(monkeypatch):
    import vidlab.tasks.recognition as R
    from vidlab.registry import create_model
    said = []
    kept = R.tokenize
    monkeypatch.setattr(R, 'tokenize', lambda texts, *a, **k: said.extend(texts) or kept(texts, *a, **k))
    R.RecognitionTask(create_model('clip4clip', preset='tiny', weights='random'), ['brush_hair', 'ApplyEyeMakeup', 'air drumming'], templates=['a video of {}'])
    assert said == ['a video of brush hair', 'a video of Apply Eye Makeup', 'a video of air drumming']


# ---------------------------------------------------------------------------------------------------- one list of classes, whole rows

def _tables(folder, shapes, train, test, **more):
    "Two tables of the clips of a split, labelled by name"
    m = load_manifest(make_config(data_path=str(shapes)), 'train')
    paths = [Path(m.row(i)['path']).relative_to(shapes) for i in range(len(m))]
    for split, labels in (('train', train), ('test', test)):
        (folder/f'{split}.csv').write_text('path,label\n' + ''.join(f'{p},{l}\n' for p, l in zip(paths, labels)))
    return make_config(data='manifest', data_path=str(folder/'{split}.csv'), video_root=str(shapes), model='videomamba', preset='tiny', dim=32, depth=1, state=4, max_frames=2, sampler='segment', task='recognition',
                       epochs=1, batch_size=2, eval_batch_size=4, workers=0, val_split='', device='cpu', **more)

def test_a_class_has_one_number_in_all_splits(shapes, tmp_path, outputs):
    cfg = _tables(tmp_path, shapes, ['bird', 'cat', 'dog', 'cat'], ['cat', 'dog'])
    assert load_manifest(cfg, 'test').column('label').tolist() == [1, 2] and load_manifest(cfg, 'test').classes == ['bird', 'cat', 'dog']
    folder = run(cfg)
    from safetensors.torch import load_file
    assert load_file(folder/'eval'/'test.safetensors')['label'].tolist() == [1, 2]
    with pytest.raises(ValueError, match='bull'): load_manifest(_tables(tmp_path, shapes, ['bird', 'cat'], ['cat', 'bull']), 'test')

def test_a_row_without_a_label_is_told_before_training(shapes, tmp_path, outputs):
    with pytest.raises(ValueError, match=r"split 'train': 1 of 4 rows have no label, which task 'recognition' needs \(id .*\): give every row one"):
        run(_tables(tmp_path, shapes, ['bird', 'cat', '', 'cat'], ['cat', 'bird']))
    with pytest.raises(ValueError, match=r"split 'test': no row has label.*test_split='' does without"): run(_tables(tmp_path, shapes, ['bird', 'cat'], ['', '']))

def test_several_labels_a_clip(shapes, tmp_path, outputs):
    "Train, and are measured by mean average precision; without the names of the classes it is said what is missing"
    (tmp_path/'names.txt').write_text('sit\nstand\neat\n')
    cfg = _tables(tmp_path, shapes, ['0 2', '1', '0 1 2', '2'], ['0 2', '1', '0 1', '2'], classes=str(tmp_path/'names.txt'))
    folder = run(cfg)
    m = read_json(folder/'eval'/'test.json')['metrics']
    assert 0 < m['mAP'] <= 100 and load_file(folder/'eval'/'test.safetensors')['label'].tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match='names of all classes'): run(_tables(tmp_path, shapes, ['0 2', '1'], ['0 2', '1']))

def test_a_run_does_not_go_on_with_other_rows(shapes, tmp_path, outputs):
    import dataclasses
    cfg = _tables(tmp_path, shapes, ['a', 'b', 'a', 'b'], ['a', 'b'])
    folder = run(cfg)
    more = dataclasses.replace(cfg, epochs=2)
    _tables(tmp_path, shapes, ['a', 'b'], ['a', 'b'])
    with pytest.raises(ValueError, match=r"rows of 'train' have changed .* take .*data.json away"): run(more, str(folder.path))
    (folder/'data.json').unlink()
    assert run(more, str(folder.path)).status()['epoch'] == 2
