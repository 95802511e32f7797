"Runs of TVTS: pretraining from speech files and from sentences, joint training with captions and pictures, two processes, what is left out, the published recipes."
import json
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vidlab.core import read_json, rng
from vidlab.data.shapes import encode, make_shapes
from vidlab.train import build_task, config_from, launch, list_recipes, run


@pytest.fixture(scope='session')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips', 'narrated'), sizes=dict(clips=dict(train=24, val=8, test=8), narrated=dict(train=16, val=8, test=8)))

pytestmark = pytest.mark.usefixtures('outputs')

def small(shapes, recipe='shapes_tvts', **kw):
    base = dict(data_path=str(shapes), epochs=1, more=[], batch_size=8, eval_batch_size=8, workers=0, log_every=1, precision='fp32', device='cpu')
    return config_from(recipe, **{**base, **kw})

# the text tower of the tiny preset, for recipes that ask for DistilBERT
TEXT = dict(preset='tiny', text=dict(model_type='distilbert', vocab_size=128, dim=128, n_layers=2, n_heads=2, hidden_dim=256, max_position_embeddings=64), tokenizer='shapes', projection_dim=64)

def steps(folder, key='loss'): return [r[key] for r in folder.metrics() if r['kind'] == 'step' and key in r]


def test_published_recipes():
    want = {'yttemporal_tvts', 'cc3m_webvid_tvts', 'ssv2_v2v_tvts', 'ssv2_tvts_ft', 'ssv2_tvts_probe', *(f'{d}_tvts_ft' for d in ('k400', 'ucf101', 'hmdb51', 'msrvtt', 'msvd', 'lsmdc', 'didemo'))}
    assert want <= set(list_recipes())
    for r in want: config_from(r)
    a, b, c = config_from('yttemporal_tvts+tvts_compat'), config_from('cc3m_webvid_tvts'), config_from('ssv2_tvts_ft')
    assert (a.pieces, a.max_frames, a.drop_tokens, a.optimizer, a.gather, [round(m*a.epochs) for m in a.milestones]) == (4, 16, .75, 'hf_adamw', 'official', [12, 16])
    assert b.mixing == 'alternate' and b.more[0]['max_frames'] == 1 and b.task == 'retrieval'
    assert c.lr*c.batch_size/c.lr_batch == pytest.approx(1.5e-3) and (c.eval_clips, c.eval_crops, c.average, c.layer_decay, 'flip' in c.augment) == (2, 3, 'logits', .75, False)
    assert (p := config_from('ssv2_tvts_probe')).options['probe'] and p.lr*p.batch_size/p.lr_batch == pytest.approx(.15)


@pytest.mark.long
def test_two_processes_contrast_the_joined_batch(shapes, warm_ranks):
    still = dict(TEXT['text'], dropout=0., attention_dropout=0.)
    cfg = small(shapes, **dict(TEXT, text=still), text_weights='random', more=[], drop_tokens=0., lr=1e-4, val_split='', test_split='')
    one, two = run(cfg), launch(cfg, 2)
    assert steps(two, 'align') == pytest.approx(steps(one, 'align'), rel=1e-3) and len(steps(one)) == 2
    a, b = (load_file(f/'ckpt'/'last'/'weights.safetensors') for f in (one, two))
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert (moved > 1e-4).float().mean() < .02


def test_run_and_its_numbers(shapes):
    f = run(small(shapes, epochs=2, **TEXT, text_weights='random'))
    e = read_json(f/'eval'/'test.json')
    assert e['metrics']['videos'] == 8 and 0 <= e['metrics']['sorted'] <= e['metrics']['places'] <= 100 and {'t2v/R1', 'v2t/R1'} <= set(e['metrics'])
    best = read_json(f/'ckpt'/'best'/'card.json')['metrics']['sorted']
    assert best == max(r['sorted'] for r in f.metrics() if r['kind'] == 'epoch')          # more sorted clips are better


@pytest.mark.slow
def test_captions_and_narration_take_turns(shapes, tmp_path, warm_ranks):
    "Caption batches leave the sort head without a gradient, in two processes too"
    cfg = small(shapes, **TEXT, text_weights='random', more=[dict(kind='clips', data='shapes', data_path=str(shapes), pieces=0, max_frames=4, batch_size=8)], mixing='alternate', val_split='', test_split='', drop_tokens=.5)
    for f in (run(cfg), launch(cfg, 2)):
        kinds = [('sort' in r) for r in f.metrics() if r['kind'] == 'step']
        assert len(kinds) == 6 and kinds == [True, False]*3


def test_pictures_are_clips(shapes, tmp_path):
    "The second stage: captions of videos and pictures, contrast only, from a first stage"
    first = run(small(shapes, **TEXT, text_weights='random', val_split='', test_split=''))
    rows = ['caption\turl']
    for i in range(8):
        Image.fromarray(rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path/f'{i}.jpg'); rows.append(f'a red circle {i}\t{i}.jpg')
    (tmp_path/'cc_train.tsv').write_text('\n'.join(rows))
    cfg = small(shapes, 'cc3m_webvid_tvts', **TEXT, mixing='alternate', start=str(first.path), data='shapes', kind='clips', resize='fast', short_side=72, more=[dict(data='pairs', data_path=str(tmp_path/'cc_{split}.tsv'), video_root=str(tmp_path), max_frames=1, augment='rrc-s0-a0.5', short_side=0)],
                test_split='', val_split='')
    f = run(cfg)
    assert len(steps(f)) == 6 and all(np.isfinite(steps(f)))


def test_speech_files_report_what_is_broken(tmp_path):
    "YT-Temporal: an empty and a broken entry are named by file and number, and training goes on"
    words = [a + b for a in 'spoon knife bread water onion garlic salt butter'.split() for b in ('', 'ing', 'er', 'ly', 's')]
    (tmp_path/'subset_1'/'data').mkdir(parents=True); (tmp_path/'subset_1'/'annotations').mkdir()
    for i in range(8):
        encode(tmp_path/'subset_1'/'data'/f'v{i}.mp4', rng(i).integers(0, 255, (160, 64, 64, 3), dtype=np.uint8), fps=4)
        said = list(rng(i).permutation(words))
        a = dict(info=dict(duration=40.), subtitles=[dict(word=w, time=j + .5) for j, w in enumerate(said)], denoised=[dict(cleanasr=' '.join(said))])
        if i == 1: a['subtitles'][3] = dict(word='half'); a['denoised'].append(dict(other=1))
        (tmp_path/'subset_1'/'annotations'/f'v{i}.json').write_text(json.dumps(a) if i != 2 else '{"info":')
    (tmp_path/'yttemporal_train.csv').write_text('Name\n' + '\n'.join(f'subset_1/data/v{i}.mp4' for i in range(8)) + '\n')
    cfg = small(tmp_path, 'yttemporal_tvts', **TEXT, weights='random', data_path=str(tmp_path/'yttemporal_{split}.csv'), video_root=str(tmp_path), max_words=16, batch_size=4, short_side=72, val_split='', test_split='', bad_limit=.5)
    with pytest.warns(UserWarning, match='v1.json'): f = run(cfg)
    notes = read_json(f/'left_out.json')
    assert [(n['file'].rsplit('/')[-1], n['part'], n['entry']) for n in notes] == [('v1.json', 'subtitles', 4), ('v1.json', 'denoised', 2), ('v2.json', None, None)] and len(steps(f)) == 1


def test_bad_settings_say_what_to_do(shapes):
    with pytest.raises(ValueError, match='transcripts=3'): run(small(shapes, **TEXT, text_weights='random', pieces=3, val_split='', test_split=''))
    with pytest.raises(ValueError, match='no sort head'): build_task(config_from('shapes_videomamba', task='sorting', sampler='segment'))
