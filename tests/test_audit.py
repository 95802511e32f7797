"""`vidlab audit`: what is planted is said, in the table, on the page and by the exit code; hostile names; bad sources"""
import csv, os, subprocess, sys
from pathlib import Path
import pytest
from vidlab.audit import alike_names, audit, example_set, page_of, rows_of, summary, write_audit
from vidlab.core import rng
from vidlab.data.shapes import clip_item, encode

@pytest.fixture(autouse=True)
def _places(outputs, cache): pass

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp('clips'), []
    for i in range(8):
        encode(folder/f'{i}.mp4', clip_item(i, rng(2, i))[0])
        out.append((folder/f'{i}.mp4').read_bytes())
    return out

def table(path, rows, head=('path', 'text', 'label', 'split')):
    with open(path, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([head, *rows])
    return path

def said(a, kind): return [f.said for f in a.findings if f.kind == kind]

def test_the_example_has_something_of_everything(tmp_path):
    a = audit(example_set(tmp_path))
    assert {f.kind for f in a.findings} >= {'files', 'labels', 'captions', 'balance', 'copies', 'motion'}
    (copy,) = said(a, 'copies')
    assert 'mirrored' in copy and 'in two splits' in copy and 'under two labels' in copy
    assert a.findings[0].level == 'bad' and [f.level for f in a.findings] == sorted((f.level for f in a.findings))

def test_names_of_all_signs_are_escaped(tmp_path, clips):
    names = ['<script>alert(1)</script>.mp4', 'a "b" & \'c\'.mp4', 'Küche 日本.mp4', '$x$ 100%.mp4']
    for n, data in zip(names, clips):
        (tmp_path/n.replace('/', '⁄')).write_bytes(data)
        (tmp_path/('again ' + n.replace('/', '⁄'))).write_bytes(data)
    a = audit(tmp_path)
    page = write_audit(a, tmp_path/'out')
    text = page.read_text(encoding='utf-8')
    assert '<script' not in text and '&lt;script&gt;' in text and 'http:' not in text and 'https:' not in text and 'src="data:image' in text
    with open(tmp_path/'out'/'copies.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert len(rows) == 4 and {r['how'] for r in rows} == {'same file'} and any('日本' in r['of'] for r in rows)
    with open(tmp_path/'out'/'findings.csv', encoding='utf-8') as f: assert len(list(csv.DictReader(f))) == len(a.findings)

def test_times_captions_labels_balance(tmp_path, clips):
    for i, data in enumerate(clips): (tmp_path/f'{i}.mp4').write_bytes(data)
    rows = [('0.mp4', 'a cat', 'jump', 'train', 0, 1), ('1.mp4', 'A  cat', 'jumps', 'train', 1, .5), ('2.mp4', '', 'jump', 'train', 0, 99),
            ('3.mp4', 'word '*100, 'run', 'test', 'x', 1), ('4.mp4', 'a cat', '', 'test', '', ''), *((f'{i}.mp4', f'text {i}', 'sit', 'train', '', '') for i in (5, 6, 7))]
    a = audit(table(tmp_path/'m.csv', rows, ('path', 'text', 'label', 'split', 'start', 'end')), copies=False)
    assert len(said(a, 'times')) == 3 and any('ends before it begins' in s for s in said(a, 'times')) and any('lasts' in s for s in said(a, 'times'))
    assert any('have no caption' in s for s in said(a, 'captions')) and any('said of several videos, 3 in all' in s for s in said(a, 'captions'))
    assert any('longer than 77 tokens' in s for s in said(a, 'captions')) and any('in training and in another split' in s for s in said(a, 'captions'))
    assert any("'jump' and 'jumps'" in s for s in said(a, 'labels')) and any('1 rows have no label' in s for s in said(a, 'labels'))
    assert any("split 'train' has no video of 1 of 4 classes: 'run'" in s for s in said(a, 'balance'))

def test_one_file_in_two_splits(tmp_path, clips):
    for i in range(3): (tmp_path/f'{i}.mp4').write_bytes(clips[i])
    a = audit(table(tmp_path/'m.csv', [('0.mp4', 'a', '', 'train'), ('1.mp4', 'b', '', 'train'), ('0.mp4', 'c', '', 'test')]), copies=False)
    assert any('0.mp4 is in 2 splits: test, train' in f.said for f in a.bad)

def test_alike_names():
    assert alike_names(['opening', 'closing', 'class 1', 'class 2', 'left', 'right', 'moves left', 'moves right']) == []
    assert alike_names(['Tür', 'TÜR', 'open_door', 'opening door', 'open-doors']) == [('TÜR', 'Tür'), ('open-doors', 'open_door')]

def test_a_clean_set_is_clean(tmp_path, clips):
    for i, data in enumerate(clips):
        (d := tmp_path/('ab'[i % 2])).mkdir(exist_ok=True)
        (d/f'{i}.mp4').write_bytes(data)
    a = audit(tmp_path)
    assert [f for f in a.findings if f.kind != 'motion'] == [] and not a.bad and '2 classes' in summary(a) and 'Copies' not in page_of(a)

def test_bad_sources(tmp_path, clips):
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no video files below it'): audit(tmp_path/'empty')
    with pytest.raises(ValueError, match='no such file or folder'): audit(tmp_path/'gone')
    (tmp_path/'x.docx').write_bytes(b'x')
    with pytest.raises(ValueError, match='neither a folder nor a table'): audit(tmp_path/'x.docx')
    with pytest.raises(ValueError, match='a header, but no rows'): audit(table(tmp_path/'h.csv', []))
    a = audit(table(tmp_path/'m.csv', [('gone 1.mp4', 'a', 'x', ''), ('gone 2.mp4', 'b', 'y', '')]))
    assert [f.said for f in a.bad] == ['gone 1.mp4: is not there', 'gone 2.mp4: is not there'] and page_of(a)

@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_closed_folders(tmp_path, clips):
    (tmp_path/'v'/'closed').mkdir(parents=True)
    (tmp_path/'v'/'0.mp4').write_bytes(clips[0])
    (tmp_path/'v'/'closed').chmod(0)
    try: assert any('is left out' in f.said for f in audit(tmp_path/'v').bad)
    finally: (tmp_path/'v'/'closed').chmod(0o755)

@pytest.mark.long
def test_the_command(tmp_path, clips):
    "It ends with 1 where something bad was found, with 0 where not, with 2 where there is nothing to look at"
    for i, data in enumerate(clips): (tmp_path/'v'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True); (tmp_path/'v'/'ab'[i % 2]/f'{i}.mp4').write_bytes(data)
    run = lambda *a: subprocess.run([sys.executable, '-m', 'vidlab.cli', 'audit', *map(str, a)], capture_output=True, text=True, env=dict(os.environ, VIDLAB_OUTPUTS=str(tmp_path/'o')))
    good = run(tmp_path/'v')
    assert good.returncode == 0 and '0 bad findings' in good.stdout, good.stdout + good.stderr
    (tmp_path/'v'/'a'/'bad.mp4').write_bytes(b'no video')
    bad = run(tmp_path/'v')
    assert bad.returncode == 1 and 'bad.mp4' in bad.stdout and list(tmp_path.glob('o/audit/*/audit.html'))
    assert run(tmp_path/'v', 'cpies=False').returncode == 2
