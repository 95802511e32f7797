"An index of videos: plain files that others read, new work only for new bytes, the same bytes after any kill, exact answers."
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from vidlab import store
from vidlab.core import file_hash
from vidlab.data.files import ReaderError, VideoError
from vidlab.store import Index, asked_of, best_scores, export_index, quick_report, read_subtitles, read_vectors, top_rows, toy_make, toy_read, update, videos_below, write_vectors

FACTS = dict(model='toy', dim=8, root='../videos', settings_hash='0')

@pytest.fixture
def home(tmp_path):
    for i in range(7):
        p = tmp_path/'videos'/f'{i % 3}'/f'{i} é "<b>".mp4'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(bytes([i])*(i + 1))
    (tmp_path/'videos'/'hurt.mp4').touch()
    (tmp_path/'videos'/'notes.txt').write_text('no video')
    return tmp_path

def run(home, where='index', read=toy_read, make=toy_make, **more): return update(home/where, FACTS, home/'videos', read, make, **more)
def held(folder): return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(Path(folder).rglob('*')) if p.is_file() and not p.name.endswith('.lock')}
def never(*a): raise AssertionError('this file is known')

# ---------------------------------------------------------------------------------------------------------------- files
def test_others_can_read_it(home):
    import pandas as pd
    from safetensors.numpy import load_file
    ix = run(home).index
    said = json.loads((home/'index'/'index.json').read_text())
    v, rows = load_file(home/'index'/said['vectors'])['vectors'], pd.read_parquet(home/'index'/said['rows'])
    assert v.dtype == np.float16 and v.shape == (28, 8) and np.array_equal(v, ix.vectors)
    assert rows['vector'].max() == 27 and (rows['vector'] < 0).sum() == 1 and set(store.COLUMNS) == set(rows)
    r = rows[rows['path'] == '2/5 é "<b>".mp4']
    assert np.array_equal(v[r['vector']], toy_make('', bytes([5])*6).vectors) and r['start'].tolist() == [0, 1, 2, 3, 4, 5] and r['times'].iloc[2].tolist() == [2.5]
    assert (r['size'].iloc[0], r['hash'].iloc[0]) == (6, file_hash(home/'videos'/'2'/'5 é "<b>".mp4')) and set(r['verdict']) == {'ok'}

def test_a_damaged_file_is_a_row_and_is_not_tried_again(home):
    first = run(home)
    assert first.bad == {'hurt.mp4': 'empty file'} and 'hurt.mp4' in list(first.index.files()['path'])
    again = run(home, read=never)
    assert (again.new, again.unchanged, again.bad) == (0, 8, first.bad)
    (home/'videos'/'hurt.mp4').write_bytes(b'mended')
    mended = run(home)
    assert (mended.new, mended.bad) == (1, {}) and len(mended.index) == 28 + 6

def test_a_reader_that_failed_is_tried_again(home):
    def fails(file):
        if '5' in Path(file).name: raise ReaderError('the reader broke')
        return toy_read(file)
    first = run(home, read=fails)
    assert len(first.bad) == 2 and len(first.index) == 22
    again = run(home)
    assert (again.new, len(again.bad), len(again.index)) == (1, 1, 28)

def test_a_file_that_changes_while_it_is_read(home):
    target = home/'videos'/'2'/'5 é "<b>".mp4'
    def read(file):
        data = toy_read(file)
        if file == str(target) and len(data) == 6: target.write_bytes(b'longer than it was')
        return data
    first = run(home, read=read)
    assert first.bad['2/5 é "<b>".mp4'] == 'changed while it was read'
    assert len(run(home).index) == 22 + 18

def test_moved_changed_deleted(home):
    run(home)
    v = home/'videos'
    (v/'0'/'0 é "<b>".mp4').rename(v/'elsewhere.mp4')
    os.utime(v/'0'/'3 é "<b>".mp4', (1, 1))
    (v/'1'/'1 é "<b>".mp4').write_bytes(b'other bytes')
    (v/'1'/'4 é "<b>".mp4').unlink()
    (v/'copy.mp4').write_bytes(bytes([5])*6)
    seen = []
    r = run(home, read=lambda f: seen.append(Path(f).name) or toy_read(f))
    assert (r.new, r.moved, r.deleted, r.unchanged) == (1, 3, 2, 4) and seen == ['1 é "<b>".mp4']
    assert held(home/'index') == held(run(home, 'fresh').index.folder)

# ---------------------------------------------------------------------------------------------------------------- kill -9
def killed_at(home, moment, before):
    "A run that dies at its n-th renaming; False: it came to its end"
    pid = os.fork()
    if pid == 0:
        n, real = [0], os.replace
        def replace(a, b):
            n[0] += 1
            if n[0] == moment and before: os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
            if n[0] == moment: os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        try: run(home)
        finally: os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

@pytest.mark.parametrize('before', [True, False])
def test_killed_at_any_moment_the_index_has_the_same_bytes(home, before):
    for p in (home/'videos'/'1', home/'videos'/'2'): shutil.rmtree(p)
    fresh = held(run(home, 'fresh').index.folder)
    moments = 0
    for moment in range(1, 40):
        if not killed_at(home, moment, before): break
        moments += 1
        if (home/'index'/'index.json').exists(): assert len(Index(home/'index').vectors) == 12       # whoever reads finds a whole index
        run(home)
        assert held(home/'index') == fresh
        for p in sorted((home/'index').rglob('*'), reverse=True): p.unlink() if p.is_file() else p.rmdir()
    assert moments == 4 + 3                                                                          # a part for each file; vectors, rows, index.json

def test_killed_again_and_again(home):
    "Each run dies after one more file"
    fresh = held(run(home, 'fresh').index.folder)
    for _ in range(5):
        if not killed_at(home, 2, True): break
    run(home)
    assert held(home/'index') == fresh

def test_killed_while_it_takes_in_changes(home):
    run(home)
    (home/'videos'/'new.mp4').write_bytes(b'new')
    (home/'videos'/'1'/'1 é "<b>".mp4').unlink()
    old = held(home/'index')
    fresh = held(run(home, 'fresh').index.folder)
    for moment in (1, 2, 3):                                        # the part, the vectors, index.json: the part is there by then
        killed_at(home, moment, True)
        ix = Index(home/'index')
        assert len(ix.vectors) == ix.facts['n'] and len(ix.rows('path')) == ix.facts['n']
        assert {k: h for k, h in held(home/'index').items() if k in old} == old                      # the old index stands until the new one is whole
    run(home)
    assert held(home/'index') == fresh

def test_ctrl_c_keeps_what_is_done(home):
    def read(file):
        if file.endswith('4 é "<b>".mp4'): raise KeyboardInterrupt
        return toy_read(file)
    with pytest.raises(KeyboardInterrupt): run(home, read=read)
    ix = Index(home/'index')
    assert 0 < len(ix) < 28
    r = run(home)
    assert len(r.index) == 28 and r.unchanged and held(home/'index') == held(run(home, 'fresh').index.folder)

# ---------------------------------------------------------------------------------------------------------------- search
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_answers_are_those_of_a_plain_product(n, k, seed, some):
    g = np.random.default_rng(seed)
    v, q = (g.integers(-3, 4, (m, 8)).astype(np.float16) for m in (n, 2))                            # many equal scores
    keep = g.random(n) < .5 if some else None
    full = (q.astype(np.float64) @ v.T.astype(np.float64))
    rows = np.arange(n) if keep is None else np.flatnonzero(keep)
    want = [sorted(rows, key=lambda i: (-s[i], i))[:k] for s in full]
    score, row = top_rows(v, q, k, keep)
    assert row.tolist() == want and np.allclose(score, np.take_along_axis(full, row, 1))
    assert np.allclose(best_scores(v, q), full.max(1))

def test_a_large_map_leaves_the_memory(tmp_path):
    code = ('import sys, numpy as np, resource; from vidlab.store import *; import torch\n'
            'v = read_vectors(sys.argv[1]); q = np.ones((1, 256), np.float32); top_rows(v[:5000], q)\n'
            'now = lambda: int(open("/proc/self/statm").read().split()[1])*4096/2**20\n'
            'before, most = now(), 0\n'
            'for a, s in each_score(v, q): most = max(most, now())\n'
            'print(most - before)')
    with open('/dev/urandom', 'rb') as f: blocks = [(np.frombuffer(f.read(20_000*256), np.int8).reshape(-1, 256)/64).astype(np.float16) for _ in range(2)]
    write_vectors(tmp_path/'v', (blocks[i % 2] for i in range(8)), 160_000, 256)                     # 78 MiB
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'v')], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert float(r.stdout) < 50

@pytest.mark.parametrize('kind', ['faiss', 'usearch', 'lancedb'])
def test_exports(home, kind):
    ix = run(home).index
    try: __import__(kind)
    except ImportError:
        with pytest.raises(ImportError, match='pip install'): export_index(ix, kind, home/'out')
        return
    path = export_index(ix, kind, home/'out')
    q = np.asarray(ix.vectors[3:4], np.float32)
    if kind == 'faiss': found = __import__('faiss').read_index(str(path)).search(q, 1)[1][0, 0]
    elif kind == 'usearch': found = __import__('usearch.index').index.Index.restore(str(path)).search(q[0], 1).keys[0]
    else: found = __import__('lancedb').connect(str(path)).open_table('windows').search(q[0]).metric('dot').limit(1).to_pandas()['start'][0] + 3 - ix.rows('start')['start'][3]
    assert found == 3

# ---------------------------------------------------------------------------------------------------------------- up to date
def test_up_to_date_without_a_model(home):
    asked = asked_of('some_run', dict(device='cuda', x=1))
    assert quick_report(home/'videos', asked) is None
    update(home/'videos'/'.vidlab'/'a', dict(FACTS, root='../..', asked=asked), home/'videos', toy_read, toy_make)
    r = quick_report(home/'videos', asked_of('some_run', dict(x=1)))
    assert (r.unchanged, r.bad) == (8, {'hurt.mp4': 'empty file'})
    assert quick_report(home/'videos', asked_of('some_run', dict(x=2))) is None and quick_report(home/'videos', asked_of('some_run', dict(x=1), window=3.)) is None
    assert '.vidlab' not in ''.join(videos_below(home/'videos'))
    (home/'videos'/'1'/'1 é "<b>".srt').write_text('1\n00:00:00,000 --> 00:00:01,000\nhello\n')
    assert quick_report(home/'videos', asked) is None

def test_the_page_of_the_store_needs_no_torch():
    r = subprocess.run([sys.executable, '-c', 'import sys, vidlab.store; sys.exit("torch" in sys.modules)'])
    assert r.returncode == 0

@pytest.mark.parametrize('name,text,want', [
    ('a.srt', '\ufeff1\r\n00:00:01,000 --> 00:00:02,000\r\n<b>Hi</b> &lt;you&gt;\r\n\r\n2\r\n00:00:02,000 --> 00:00:03,000\r\n1984\r\n', [(1, 2, 'Hi <you>'), (2, 3, '1984')]),
    ('a.vtt', 'WEBVTT\n\nNOTE x\n\n01:00:00.000 --> 01:00:01.500 line:0\n- Yes.\n', [(3600, 3601.5, '- Yes.')]),
    ('a.srt', 'no times at all', []), ('a.srt', '', []),
    ('a.srt', '1\n00:00:05,000 --> 00:00:04,000\nbackwards\n', [])])
def test_subtitles(tmp_path, name, text, want):
    (tmp_path/name).write_text(text, encoding='utf-8')
    assert read_subtitles(tmp_path/name) == want
