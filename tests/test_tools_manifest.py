"""data_tools/make_manifest.py on the command line."""
import contextlib, io, json, pickle, subprocess, sys, tarfile
from pathlib import Path

import pytest

from data_tools import make_manifest as T
from vidlab.data.manifest import Manifest
from vidlab.data.sets.retrieval import LSMDC
from vidlab.data.tables import FORMATS
from vidlab.registry import options

FORMATS_HERE = [f for f in T.formats() if f not in ('shapes', 'manifest', 'class_folders')]     # the last two are read by the tool's own words, the first needs no files

ROOT = Path(__file__).parents[1]


def cli(args):
    "The tool in this process; what it complains of becomes an exception"
    said = io.StringIO()
    with contextlib.redirect_stderr(said): code = T.main(args)
    sys.stderr.write(text := said.getvalue())
    if code: raise SystemExit(text[text.index('make_manifest: '):].rstrip())


def call(*args): return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                                       timeout=60)


def speech(v, **kw): return dict(dict(info=dict(display_id=v, duration=30.), subtitles=[dict(word='hello', time=float(t)) for t in range(29)], denoised=[dict(cleanasr='Hello ' * 29)]), **kw)


@pytest.fixture
def data(tmp_path):
    "Every format in small: <format>/ holds annotation files and videos/"
    def js(p, o): p.write_text(json.dumps(o))
    for f in FORMATS_HERE: (tmp_path/f/'videos').mkdir(parents=True)
    def videos(f, *names):
        for n in names:
            (tmp_path/f/'videos'/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f/'videos'/n).touch()
    d = tmp_path/'msrvtt'; videos('msrvtt', 'video0.mp4', 'video1.webm', 'video9.mp4')
    (d/'MSRVTT_train.9k.csv').write_text('video_id\nvideo1\nvideo0\n')
    (d/'MSRVTT_JSFUSION_test.csv').write_text('key,vid_key,video_id,sentence\nret0,msr9,video9,a test\n')
    js(d/'MSRVTT_data.json', {'sentences': [dict(video_id=v, caption=c) for v,
                                            c in [('video0', 'a'), ('video1', 'b'), ('video0', 'c')]]})
    d = tmp_path/'msvd'; videos('msvd', 'x.avi', 'sub/y.mp4')
    for s, ids in dict(train=['x'], val=['y'], test=['y']).items(): (d/f'{s}_list.txt').write_text('\n'.join(ids))
    (d/'raw-captions.pkl').write_bytes(pickle.dumps({'x': [['a', 'dog'], ['dogs']], 'y': [['cat']]}))
    d = tmp_path/'lsmdc'; videos('lsmdc', 'A/c1.avi')
    for s in LSMDC.values(): (d/s).write_text('c1\t0\t1\t0\t1\tHe sits.\n')
    d = tmp_path/'activitynet'; videos('activitynet', 'abc.mp4')
    for n, o in dict(train_ids=['v_abc'], val_ids=['v_abc'], train={'v_abc': dict(duration=9.5,
            sentences=['a', 'b'])}, val_1={'v_abc': dict(duration=9.5, sentences=['a', 'b'])}).items():
        js(d/f'{n}.json', o)
    d = tmp_path/'didemo'; videos('didemo', 'a.mov')
    for s in ('train', 'val', 'test'):
        (d/f'{s}_list.txt').write_text('a.mov'); js(d/f'{s}_data.json', [dict(video='a.mov', description='x')])
    videos('table', '0.mp4', '1.mp4'); (tmp_path/'table'/'mine.csv').write_text('video;caption\n0.mp4;a dog\n1.mp4;a '
                                                                                'cat\n')
    videos('folder', 'a.mp4', 'b.mp4')
    (tmp_path/'folder'/'videos'/'a.txt').write_text('one\ntwo\n')
    (tmp_path/'folder'/'videos'/'b.txt').write_text('three\n')
    videos('classes', 'run/1.mp4', 'jump/1.mp4')
    videos('captions', 'a.mp4', 'b.mp4'); js(tmp_path/'captions'/'mine.csv', {'a.mp4': ['one', 'two'], 'b': 'three'})
    videos('list', 'a b.mp4', 'c.mp4'); (tmp_path/'list'/'mine.csv').write_text('a b.mp4 2\nc.mp4 1\n')
    (tmp_path/'list'/'names.txt').write_text('run\njump\n')
    videos('frame_folders', 'v/000001.jpg', 'v/000002.jpg'); (tmp_path/'frame_folders'/'mine.csv').write_text('v,2\n')
    videos('webvid', '00/7.mp4')
    (tmp_path/'webvid'/'mine.csv').write_text('videoid,contentUrl,duration,page_dir,name\n7,u,PT1S,00,"a, b"\n')
    videos('kinetics', 'run/abc_000001_000011.mp4'); (tmp_path/'kinetics'/'mine.csv').write_text('label,youtube_id,time_start,time_end,split\nrun,abc,1,11,val\n')
    videos('something', '7.webm'); js(tmp_path/'something'/'labels.json', {'Holding something': '0'})
    for s in ('train', 'validation'): js(tmp_path/'something'/f'{s}.json', [dict(id='7', template='Holding [something]', label='holding a cup')] if s == 'train' else [])
    videos('ucf101', 'Run/a.avi', 'Run/b.avi'); (tmp_path/'ucf101'/'classInd.txt').write_text('1 Run\n')
    (tmp_path/'ucf101'/'trainlist01.txt').write_text('Run/a.avi 1\n'); (tmp_path/'ucf101'/'testlist01.txt').write_text('Run/b.avi\n')
    videos('hmdb51', 'run/a.avi', 'run/b.avi'); (tmp_path/'hmdb51'/'run_test_split1.txt').write_text('a.avi 1 \nb.avi 2 \n')
    videos('pairs', 'a.mp4', 'b/c.mp4'); (tmp_path/'pairs'/'mine.csv').write_text('caption\tpath\na dog\ta\na cat\tb/c\n')
    videos('lvu', 'x.mp4', 'y.mp4'); (tmp_path/'lvu'/'like_ratio').mkdir(); (tmp_path/'lvu'/'lvu_durations.csv').write_text('videoid,duration\nx,90\ny,80\n')
    for s, v in dict(train='x', val='y', test='y').items(): (tmp_path/'lvu'/'like_ratio'/f'{s}.csv').write_text(f'like_count dislike_count youtube_id imdb_id\n9 1 {v} tt1\n')
    videos('breakfast', 'P03/cam01/P03_tea.avi', 'P47/stereo/P47_tea_ch0.avi')
    for s, v in dict(train='P03-cam01-P03_tea', test='P47-stereo-P47_tea_ch0').items(): (tmp_path/'breakfast'/f'{s}.csv').write_text(f'file_name,duration,action,class_id\n{v},33,tea,2\n')
    videos('coin', '0/x.mp4', '0/y.mp4'); js(tmp_path/'coin'/'mine.csv', dict(database={v: {'class': 'UseAnalyticalBalance', 'recipe_type': 0, 'subset': s} for v, s in dict(x='training', y='testing').items()}))
    videos('yttemporal', 'subset_7/data/v1.mp4', 'subset_7/data/v2.mp4'); (tmp_path/'yttemporal'/'mine.csv').write_text('Name\nsubset_7/data/v1.mp4\nsubset_7/data/v2.mp4\n')
    (tmp_path/'yttemporal'/'videos'/'subset_7'/'annotations').mkdir()
    for v in ('v1', 'v2'): js(tmp_path/'yttemporal'/'videos'/'subset_7'/'annotations'/f'{v}.json', speech(v))
    (tmp_path/'shards'/'x.mp4').write_bytes(b'x')
    with tarfile.open(tmp_path/'shards'/'videos'/'00000.tar', 'w') as f:
        for k in ('0.mp4', '0.txt'): f.add(tmp_path/'shards'/'x.mp4', k)
    return tmp_path


EXTRA = dict(table=['--columns', 'video=path', 'caption=text', '--sep', ';'],
             folder=['--sidecar', 'txt', '--split', 'test'], list=['--label_offset', '-1'], shards=['--split', 'train'],
             lvu=['--topic', 'like_ratio'])
ROWS = dict(msrvtt=4, msvd=4, lsmdc=3, activitynet=2, didemo=3, table=2, folder=3, classes=2, captions=3, list=2, frame_folders=1,
            webvid=1, shards=1, kinetics=1, something=1, ucf101=2, hmdb51=2, pairs=2, lvu=3, yttemporal=2, breakfast=2, coin=2)


@pytest.mark.parametrize('format', FORMATS_HERE)
def test_every_format(data, format, capsys):
    "Written once, unchanged the second time, read back without naming the root"
    out, d = data/format/'m.csv', data/format
    args = [format, '--root', str(d/'videos'), '--out', str(out)] + EXTRA.get(format, [])
    where = T.places(format)
    if len(where) == 2: args += ['--annots', str(d if T.in_folder(where['path']) else d/'mine.csv')]
    if format == 'list': args += ['--classes', str(d/'names.txt')]
    cli(args)
    said, stamp = capsys.readouterr(), out.stat().st_mtime_ns
    for w in (f'{ROWS[format]} rows', 'clips', 'missing: 0', 'written'): assert w in said.out
    assert f'make_manifest {format}' in said.err
    m = Manifest.read(out)
    report = json.loads((d/'m.report.json').read_text())
    assert len(m) == ROWS[format] == report['rows'] and m.hash() == report['hash'] and report['splits'] == m.splits()
    cli(args)
    assert 'unchanged' in capsys.readouterr().out and out.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in d.glob('.*')) == [], 'a temporary file stayed'


@pytest.mark.parametrize('ext', FORMATS)
def test_endings(data, ext):
    cli(['msvd', '--root', str(data/'msvd'/'videos'), '--annots', str(data/'msvd'), '--out', str(data/f'm{ext}')])
    assert len(Manifest.read(data/f'm{ext}')) == 4


def test_other_folder(data, tmp_path, capsys):
    "A manifest kept apart from the videos says that it needs the root"
    (tmp_path/'elsewhere').mkdir()
    cli(['classes', '--root', str(data/'classes'/'videos'), '--out', str(tmp_path/'elsewhere'/'m.csv')])
    assert 'read it with root=' in capsys.readouterr().out
    assert len(Manifest.read(tmp_path/'elsewhere'/'m.csv', root=data/'classes'/'videos')) == 2


def test_missing(data, capsys):
    args = ['msvd', '--root', str(data/'msvd'/'videos'), '--annots', str(data/'msvd'), '--out', str(data/'m.csv')]
    (data/'msvd'/'videos'/'x.avi').unlink()
    with pytest.raises(SystemExit, match="make_manifest: .*1 of 2 videos are missing.*'x'"): cli(args)
    assert not (data/'m.csv').exists()
    cli(args + ['--missing', 'drop'])
    assert "missing: 'x'" in capsys.readouterr().out
    assert json.loads((data/'m.report.json').read_text())['missing'] == ['x']


BAD = [(['msrvt', '--root', '.'], "did you mean 'msrvtt'"), (['folder'], '--root is needed'),
       (['folder', '--root', 'nowhere'], 'no such folder'),
       (['folder', '--root', '.', '--sep', ';'], '--sep has no meaning for format folder'),
       (['table', '--root', '.'], '--annots'),
       (['folder', '--root', '.', '--out', 'm.xls'], 'ending of --out'),
       (['table', '--root', '.', '--annots', 'x.csv', '--columns', 'video'], 'name_in_file=name'),
       (['msvd', '--root', '.', '--missing', 'perhaps', '--annots', 'nowhere'], 'no such annotation file')]


@pytest.mark.parametrize('args,words', BAD, ids=[w for _, w in BAD])
def test_bad_calls(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: cli(args)
    assert str(e.value).startswith('make_manifest: ') and words in str(e.value)
    assert not any(tmp_path.iterdir())


def test_shard_options(data, capsys):
    "A pattern, other fields, no captions"
    args = ['shards', '--root', str(data/'shards'/'videos'), '--out', str(data/'s.csv')]
    cli(args + ['--pattern', '{00000..00000}.tar', '--caption', 'none', '--columns', 'txt=note'])
    row = Manifest.read(data/'s.csv').row(0)
    assert (row['text'], row['note'], Path(row['path']).name) == (None, 'x', '00000.tar::0.mp4')
    with pytest.raises(SystemExit, match="no caption|no 'cap'"): cli(args + ['--caption', 'cap'])
    with pytest.raises(SystemExit, match='--annots, the CSV'): cli(['webvid', '--root', str(data)])


def test_row_number(data):
    (data/'table'/'mine.csv').write_text('path,text\n0.mp4,a\n1.mp4,\n')
    with pytest.raises(SystemExit, match='mine.csv: row 2'):
        cli(['table', '--root', str(data/'table'/'videos'), '--annots', str(data/'table'/'mine.csv'), '--out',
               str(data/'m.csv')])


@pytest.mark.slow
def test_as_script_and_module(data):
    for how in (['data_tools/make_manifest.py'], ['-m', 'data_tools.make_manifest']):
        r = call(*how, 'classes', '--root', data/'classes'/'videos', '--out', data/'classes'/'m.csv')
        assert r.returncode == 0 and '2 rows' in r.stdout, r.stderr
    r = call('data_tools/make_manifest.py', '--help')
    assert r.returncode == 0 and all(f'\n  {f} ' in r.stdout for f in T.formats())
    r = call('data_tools/make_manifest.py', 'classes', '--root', data/'nowhere')
    assert r.returncode == 1 and r.stderr.startswith('make_manifest: ') and 'Traceback' not in r.stderr


def test_speech_files_are_reported_entry_by_entry(data, capsys):
    "A broken entry is left out by name; a broken file stops, or goes with `--missing drop`, and is named too"
    d = data/'yttemporal'; asr = d/'videos'/'subset_7'/'annotations'
    args = ['yttemporal', '--root', str(d/'videos'), '--annots', str(d/'mine.csv'), '--out', str(d/'m.csv')]
    o = speech('v1'); o['subtitles'][3] = dict(word='lost'); o['denoised'].append(dict(cleanasr=' '))
    (asr/'v1.json').write_text(json.dumps(o))
    cli(args)
    want = ["subset_7/annotations/v1.json, subtitles 4: no 'time'", 'subset_7/annotations/v1.json, denoised 2: cleanasr is empty']
    assert json.loads((d/'m.report.json').read_text())['transcripts_left_out'] == want and 'subtitles 4' in capsys.readouterr().out
    assert Path(Manifest.read(d/'m.csv').root, Manifest.read(d/'m.csv').row(0)['asr']) == asr/'v1.json'      # also relative to the manifest
    (asr/'v2.json').write_text('{"info": ')
    with pytest.raises(SystemExit, match='1 of 2 videos have no usable annotation.*v2.json: Expecting value'): cli(args)
    cli(args + ['--missing', 'drop'])
    assert Manifest.read(d/'m.csv').column('id').to_pylist() == ['subset_7/data/v1.mp4']
    assert [o for o in json.loads((d/'m.report.json').read_text())['transcripts_left_out'] if 'v2' in o]


def test_speech_shards(data):
    "The public shards: an annotation per video, the list of names, the manifest of the videos that are there"
    import gzip
    root = data/'yttemporal'/'videos'
    with gzip.open(data/'yttemporal180m_007of100.jsonl.gz', 'wt') as f:
        f.write('\n'.join([json.dumps(speech('v1')), 'torn', json.dumps(speech('v9')), json.dumps(speech('v2', denoised=[]))]))
    cli(['yttemporal', '--root', str(root), '--annots', str(data/'*.jsonl.gz'), '--missing', 'drop', '--missing_limit', '.7', '--out', str(data/'m.csv')])
    r = json.loads((data/'m.report.json').read_text())
    assert (root/'yttemporal.csv').read_text().split() == ['Name', 'subset_7/data/v1.mp4', 'subset_7/data/v9.mp4']
    assert r['missing'] == ['subset_7/data/v9.mp4'] and r['rows'] == 1 and (root/'subset_7'/'annotations'/'v9.json').exists()
    assert [o.split(', ', 1)[1][:13] for o in r['transcripts_left_out']] == ['line 2: Expec', 'line 4: no de']
