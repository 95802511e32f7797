"""The way from videos of one's own to a trained and evaluated run, at the first try: a folder per class, a table `path,text`, only a folder;
a hundred files with names and contents as they lie on people's disks"""
import csv
import pytest
from vidlab.config import config_from
from vidlab.core import read_json, rng
from vidlab.data.shapes import clip_item, encode
from vidlab.results import eval_table, show_curves
from vidlab.train import evaluation_config, load_config, load_manifest, run, run_eval

NAMES = ['clip {}.mp4', "it's {}.mp4", 'say "{}".mp4', '100% {}.MP4', 'Küche {}.mp4', 'deep/er/{}.Mp4', '#{} & co;.mp4', '日本 {}.mp4', 'a,b {}.mp4', '[{}].mp4']
BROKEN = ['empty.mp4', 'half 1.mp4', 'half 2.MP4', 'no video.mp4']
BESIDE = ['notes.txt', '.DS_Store', 'Thumbs.db', '._clip 0.mp4', 'cover.jpg']
SMALL = dict(workers=0, epochs=1, batch_size=16, eval_batch_size=16, max_frames=2, device='cpu', precision='fp32')
# what stands in for CLIP's public weights here
TINY = dict(own_classes=dict(preset='tiny', weights='random'), own_classes_probe=dict(preset='tiny', weights='random'),
            own_captions=dict(preset='tiny', clip='tiny', weights='random', max_words=16),
            own_videos=dict(preset='tiny', image_size=64, out_dim=64, dim=32, depth=2, state=4, teacher='tiny', teacher_weights='random', mask_ratio=.5))

@pytest.fixture(autouse=True)
def _places(outputs, cache): pass

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Six little videos; copies of them are the files"
    folder, out = tmp_path_factory.mktemp('clips'), []
    for i in range(6):
        encode(folder/f'{i}.mp4', clip_item(i, rng(0, i))[0])
        out.append((folder/f'{i}.mp4').read_bytes())
    return out

def fill(folder, clips, n, names=NAMES):
    "n whole videos with odd names, four broken ones, and what lies beside; the names of the whole ones"
    whole = [names[i % len(names)].format(i) for i in range(n)]
    for i,name in enumerate(whole):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(clips[i % len(clips)])
    broken = [b'', clips[0][:len(clips[0])//2], clips[1][:400], b'<html>not here</html>'*50]
    for name,data in zip(BROKEN, broken): (folder/name).write_bytes(data)
    for name in BESIDE: (folder/name).write_bytes(b'nothing')
    return whole

def trained(recipe, capsys, n_broken, **where):
    "The recipe's run, which must have said what it did; its number of the test"
    cfg = config_from(recipe, **SMALL, **TINY[recipe], **where)
    folder = run(cfg)
    said = capsys.readouterr().out
    assert folder.status()['state'] == 'done'
    assert 'videos are dealt out: train' in said.split('epoch')[0] and f'{n_broken} videos cannot be read and are left out:' in said and 'empty.mp4' in said, said
    test = read_json(folder/'eval'/'test.json')
    assert len(test['protocol']['unreadable']) == n_broken and test['protocol']['shared_out']['test'] == test['protocol']['videos']
    again = run_eval(config_from(recipe, **SMALL, **TINY[recipe], **where, start=str(folder.path)))
    assert read_json(again/'eval'/'test.json')['metrics'] == pytest.approx(test['metrics'], abs=1e-4)
    return folder, test

@pytest.mark.parametrize('recipe', ['own_classes', 'own_classes_probe'])
def test_folder_per_class(tmp_path, clips, capsys, recipe):
    for c in ('run', 'jump high', 'Tür %'): fill(tmp_path/'v'/c, clips, 33)
    folder, test = trained(recipe, capsys, 12, video_root=str(tmp_path/'v'))
    parts = test['protocol']['shared_out']
    assert sum(parts.values()) == 99 and 3 <= parts['val'] < 25 and 3 <= parts['test'] < 25 and 'top1' in test['metrics']

@pytest.mark.parametrize('kind', ['plain', 'excel'])
def test_table_of_captions(tmp_path, clips, capsys, kind):
    names = [n for n in NAMES if kind == 'plain' or '日' not in n]
    whole = fill(tmp_path/'videos', clips, 96, names)
    rows = [(n, f'a {"red" if i % 2 else "grüner"} "thing" number {i},\nin two lines') for i,n in enumerate(whole)] + [(n, 'broken') for n in BROKEN] + [('gone.mp4', 'it was here')]
    sep, code, head = (',', 'utf-8', ('path', 'text')) if kind == 'plain' else (';', 'cp1252', ('Path', 'Text'))
    table = tmp_path/('videos/my.csv' if kind == 'plain' else 'my list.csv')
    with open(table, 'w', newline='', encoding=code) as f: csv.writer(f, delimiter=sep).writerows([head, *rows])
    where = dict(data_path=str(table)) | ({} if kind == 'plain' else dict(video_root=str(tmp_path/'videos')))
    _, test = trained('own_captions', capsys, 4, **where)
    assert sum(test['protocol']['shared_out'].values()) == 96 and 't2v/R1' in test['metrics']

def test_only_a_folder(tmp_path, clips, capsys):
    fill(tmp_path/'v', clips, 96)
    folder, test = trained('own_videos', capsys, 4, video_root=str(tmp_path/'v'))
    assert test['metrics']['clips'] == test['protocol']['shared_out']['test'] and test['metrics']['unread'] == 0

def test_a_file_more_moves_nothing(tmp_path, clips):
    fill(tmp_path/'v', clips, 40)
    cfg = config_from('own_videos', **TINY['own_videos'], video_root=str(tmp_path/'v'))
    def parts(): return {p: s for s in ('train', 'val', 'test') for p in load_manifest(cfg, s).column('path').to_pylist()}
    before = parts()
    (tmp_path/'v'/'one more.mp4').write_bytes(clips[0])
    after = parts()
    assert len(before) == 40 and len(after) == 41 and {p: after[p] for p in before} == before

def test_too_few_and_nothing_left(tmp_path, clips):
    fill(tmp_path/'v', clips, 2)
    where = dict(video_root=str(tmp_path/'v'))
    with pytest.raises(ValueError, match='4 of 6 files cannot be read'): load_manifest(config_from('own_videos', **where), 'train')
    for n in BROKEN: (tmp_path/'v'/n).unlink()
    with pytest.raises(ValueError, match='2 videos cannot be dealt out to train, val, test'): load_manifest(config_from('own_videos', **where), 'train')
    with pytest.raises(FileNotFoundError, match="needs video_root"): load_manifest(config_from('own_videos'), 'train')

def test_named_from_where_one_stands(tmp_path, clips, capsys, monkeypatch):
    "A relative folder is that of the current folder; the run is found and evaluated from elsewhere; few videos make small batches, which is said"
    for c in ('run', 'jump'): fill(tmp_path/'here'/'v'/c, clips, 7, ['clip {}.mp4'])
    monkeypatch.chdir(tmp_path/'here')
    assert len(load_manifest(config_from('own_classes_probe', video_root='v'), 'train')) > 5
    folder = run(config_from('own_classes_probe', **SMALL, **TINY['own_classes_probe'], video_root='v'))
    assert 'training samples do not fill a batch of 16: batches of' in capsys.readouterr().out
    assert folder.status()['state'] == 'done' and load_config(folder.path).video_root == str(tmp_path/'here'/'v')
    monkeypatch.chdir(tmp_path)
    again = run_eval(evaluation_config({}, run=str(folder.path)))
    assert read_json(again/'eval'/'test.json')['metrics'] == pytest.approx(read_json(folder/'eval'/'test.json')['metrics'], abs=1e-4)
    with pytest.raises(FileNotFoundError, match=r"video_root 'v' is not there \(looked in .* and "): run(config_from('own_classes_probe', **SMALL, **TINY['own_classes_probe'], video_root='v'))
    second = run(load_config(folder.path))
    table = eval_table([folder, second])
    assert len(table) == 2 and len(set(table.index)) == 2 and len({t.get_text() for t in show_curves([folder, second]).axes[0].get_legend().get_texts()}) == 2

def test_names_in_another_spelling(tmp_path, clips, capsys):
    "A table with composed accents and backslashes finds files whose accents are two signs, and says so; what is in neither spelling is missing"
    for i, name in enumerate(['Ku\u0308che 1.mp4', 'Tu\u0308r/a\u0300 2.mp4', 'plain/3.mp4', *(f'{i}.mp4' for i in range(4, 30))]):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(clips[i % 6])
    said = ['K\u00fcche 1.mp4', 'T\u00fcr\\\u00e0 2.mp4', 'plain\\3.mp4', *(f'{i}.mp4' for i in range(4, 30)), 'gone\\4.mp4']
    with open(tmp_path/'my.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('path', 'text'), *((p, f'text {i}') for i, p in enumerate(said))])
    cfg = config_from('own_captions', **SMALL, **TINY['own_captions'], data_path=str(tmp_path/'my.csv'))
    m = load_manifest(cfg, 'train')
    assert len(m.report['other_spelling']) == 3 and m.report['missing'] == ['gone\\4.mp4']
    assert all((tmp_path/p).exists() for p in m.column('path').to_pylist())
    run(cfg)
    out = capsys.readouterr().out
    assert '3 paths are spelled in another way' in out and '1 video is not there and is left out:' in out
