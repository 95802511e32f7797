"""From clips to a model: what is given, splits that share no source, recipes that run, clear errors before work is spent"""
import csv
from pathlib import Path
import numpy as np
import pytest
import yaml
from pages import execute
from vidlab.audit import audit
from vidlab.begin import begin, caption_of, dealt, example_clips, next_words, settings, source_in, train_both
from vidlab.config import config_from
from vidlab.core import read_json, rng
from vidlab.data.copies import Copy
from vidlab.data.shapes import clip_item, encode
from vidlab.train import load_manifest

CPU = dict(workers=0, epochs=1, max_frames=2, batch_size=8, eval_batch_size=8, device='cpu', precision='fp32')

@pytest.fixture(autouse=True)
def _places(outputs): pass            # the tiny CLIP is that of all tests

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp('clips'), []
    for i in range(30):
        encode(folder/f'{i}.mp4', clip_item(i, rng(2, i))[0])
        out.append((folder/f'{i}.mp4').read_bytes())
    return out

def per_class(root, clips, n, names=('jump high', 'Tür & "x"', '<b>')):
    for i in range(n):
        d = root/names[i % len(names)]
        d.mkdir(parents=True, exist_ok=True)
        (d/f"it's {i}.mp4").write_bytes(clips[i])
    return root

def no_source_in_two(m):
    by = {}
    for s, part in zip(m.column('source').to_pylist(), m.column('split').to_pylist()): by.setdefault(s, set()).add(part)
    return all(len(v) == 1 for v in by.values())

@pytest.mark.slow
def test_a_folder_per_class_to_two_runs(tmp_path, clips, capsys):
    root = per_class(tmp_path/'my clips', clips, 24)
    for i in range(4): encode(root/'<b>'/f'again {i}.mp4', clip_item(3*i + 2, rng(2, 3*i + 2))[0], crf=24)
    (root/'<b>'/'broken.mp4').write_bytes(b'x'*900)
    b = begin(root, weights='tiny', folder=str(tmp_path/'out'), **CPU)
    assert b.kind == 'classes' and len(b.manifest) == 28 and no_source_in_two(b.manifest) and len(b.audit.copies) == 4
    assert len(set(b.manifest.column('source').to_pylist())) == 24
    said = capsys.readouterr().out
    assert 'broken.mp4' in said and 'tiny CLIP' in said and 'MiB for a step' in said
    assert len(load_manifest(config_from(str(b.recipes[0])), 'train')) == b.manifest.splits()['train']
    runs = train_both(b)
    assert all(r.status()['state'] == 'done' for r in runs) and 'top1' in read_json(runs[-1]/'eval'/'test.json')['metrics']
    assert [r.path for r in train_both(b)] == [r.path for r in runs]                # not again
    text = next_words(b, runs)
    assert all(w in text for w in ('audit.html', 'manifest.csv', 'vidlab evaluate', 'vidlab attention'))

def test_the_page(tmp_path, clips):
    "What `vidlab start` runs, with fewer clips and epochs than its own example"
    names = execute('start.ipynb', source=str(per_class(tmp_path/'my clips', clips, 18)), weights='tiny', folder=str(tmp_path/'out'), epochs=1, batch_size=8)
    assert [r.status()['state'] for r in names['runs']] == ['done', 'done'] and len(names['begun'].recipes) == 2

def test_a_table_of_captions(tmp_path, clips):
    for i in range(20): (tmp_path/f'ü {i}.mp4').write_bytes(clips[i])
    with open(tmp_path/'said.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('video', 'caption'), *((f'ü {i}.mp4', f'a thing, number {i}') for i in range(20)), ('gone.mp4', 'it was here')])
    b = begin(tmp_path, weights='tiny', folder=str(tmp_path/'out'), **CPU)
    assert b.kind == 'captions' and len(b.manifest) == 20 and [r.stem.rsplit('_', 1)[1] for r in b.recipes] == ['meanP', 'seqTransf']
    assert any('gone.mp4: is not there' in f.said for f in b.audit.bad)
    assert 'start' not in b.manifest.cols or np.isnan(b.manifest.column('start')).all()

def test_only_a_folder(tmp_path, clips):
    for i in range(9): (tmp_path/f'A_dog-runs {i} to {"abcdefghi"[i]}.mp4').write_bytes(clips[i])
    with pytest.raises(ValueError, match='nothing says what the videos show.*captions=names'): begin(tmp_path, weights='tiny')
    b = begin(tmp_path, 'names', 'tiny', str(tmp_path/'out'), **CPU)
    assert 'a dog runs to c' in b.manifest.column('text').to_pylist() and caption_of('a/IMG_0001.MP4') == 'img'

def test_splits_that_are_given_stay_and_copies_leave_the_test(tmp_path, clips):
    rows = [(f'{i}.mp4', 'ab'[i % 2], 'training' if i < 12 else 'Test') for i in range(18)]
    for i in range(18): (tmp_path/f'{i}.mp4').write_bytes(clips[i])
    (tmp_path/'17.mp4').write_bytes(clips[3])
    with open(tmp_path/'m.csv', 'w', newline='') as f: csv.writer(f).writerows([('path', 'label', 'split'), *rows])
    b = begin(tmp_path, weights='tiny', folder=str(tmp_path/'out'), **CPU)
    assert b.manifest.splits() == dict(train=12, test=5) and b.manifest.report['copies_left_out'] == ['17.mp4']
    assert yaml.safe_load(b.recipes[0].read_text())['val_split'] == ''

def test_what_shows_the_same_stays_in_one_split(tmp_path, clips):
    "Whatever the seed; and where only two things are left, it is said which"
    a = audit(per_class(tmp_path/'v', clips, 24), copies=False)
    a.copies = [Copy(i, i + 6, []) for i in range(18)]                              # six things, four times each
    for seed in range(4):
        m = dealt(a, 'classes', seed=seed)
        assert no_source_in_two(m) and len(set(m.column('source').to_pylist())) == 6 and set(m.splits()) == {'train', 'val', 'test'}
    a.copies = [Copy(i, i + 2, []) for i in range(22)]
    with pytest.raises(ValueError, match='24 usable videos show 2 different things, the rest are copies'): dealt(a, 'classes')

@pytest.mark.parametrize('what, match', [('one class', 'one class alone'), ('one clip each', 'every class has one video alone'), ('empty', 'no video files below it'),
                                         ('all broken', 'usable videos'), ('two tables', '2 tables in it'), ('no such', 'no such file')])
def test_errors_before_work(tmp_path, clips, what, match):
    root = tmp_path/'v'
    root.mkdir()
    if what == 'one class': per_class(root, clips, 5, ('a',))
    if what == 'one clip each': per_class(root, clips, 3)
    if what == 'all broken':
        for i in range(6): (d := root/'ab'[i % 2]).mkdir(exist_ok=True); (d/f'{i}.mp4').write_bytes(b'x'*99)
    if what == 'two tables':
        for n in 'xy': (root/f'{n}.csv').write_text('path,text\n')
    if what == 'no such': root = root/'gone'
    with pytest.raises(ValueError, match=match): begin(root, weights='tiny', folder=str(tmp_path/'out'))
    assert not list(tmp_path.glob('out/*.yaml')) and not list(tmp_path.glob('out/manifest.csv'))

def test_settings_follow_size_and_machine():
    cpu, gpu = dict(device='cpu', cores=2, bf16=False), dict(device='cuda', cores=16, bf16=True)
    small, large = settings(40, 3, cpu), settings(20000, 60, gpu)
    assert (small['batch_size'], small['epochs'], small['precision']) == (8, 40, 'fp32')
    assert (large['batch_size'], large['epochs'], large['precision'], large['max_frames'], large['workers']) == (32, 5, 'bf16', 12, 4)
    assert settings(4, 3, cpu)['batch_size'] == 2

def test_a_wrong_word_is_told(tmp_path, clips):
    root = per_class(tmp_path/'v', clips, 12)
    with pytest.raises(ValueError, match='caption'): begin(root, captions='name', weights='tiny')
    with pytest.raises(ValueError, match='epochs'): begin(root, weights='tiny', folder=str(tmp_path/'out'), epoch=3)

def test_source_in(tmp_path):
    assert source_in(tmp_path) == tmp_path and source_in(tmp_path/'x.csv') == tmp_path/'x.csv'
    (tmp_path/'t.jsonl').write_text('{}')
    assert source_in(tmp_path) == tmp_path/'t.jsonl'
