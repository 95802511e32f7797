"""Checks of the CLIP4Clip data kinds: frame grids, the image transform, tokens."""
import json, tempfile
from pathlib import Path

import numpy as np
import torch

from goldens import close, kind, only


@kind('clip4clip', 'frame_index')
def frame_index(case, tensors):
    from vidlab.data.sample import clip_times, frames_per_second, order_frames, slice_frames
    only(case, 'extract', 'slice', 'clip_times')
    for r in case.get('extract', []):
        args = r['frame_count'], r['fps'], r['feature_framerate'], r['start'], r['end']
        try: got = frames_per_second(*args).tolist()
        except ValueError: got = 'ValueError'
        if isinstance(r['frames'], str):
            assert got == 'ValueError', f"{args}: the official code raises {r['frames']}, got {got}"
        else: assert got == r['frames'], f'{args}: {got}, expected {r["frames"]}'
    for r in case.get('slice', []):
        pos = slice_frames(r['n_extracted'], r['max_frames'], r['slice_framepos'])
        gen = np.random.RandomState(r['numpy_seed_before']) if 'numpy_seed_before' in r else None
        got = order_frames(pos, r['frame_order'], gen).tolist()
        assert got == r['indices'] and len(got) == r['n_valid'], f'{r}: got {got}'
    for r in case.get('clip_times', []):
        got = list(clip_times(r['start'], r['end']))
        assert got == r['clip'], f'{r}: got {got}'


@kind('clip4clip', 'preprocess')
def preprocess(case, tensors):
    from vidlab.data.transforms import normalise, square
    cfg, n = case['config'], 0
    for k, frame in tensors.items():
        if not k.startswith('input/'): continue
        got = normalise(square(frame.numpy()[None], cfg['n_px']), cfg['mean'], cfg['std'])[0]
        close(k, got, tensors[k.replace('input/', 'output/')], case['tolerance']); n += 1
    assert n, 'the case holds no frames'


@kind('clip4clip', 'tokenize')
def tokenize_rows(case, tensors):
    from vidlab.data.text import END, START, piece_ids, pieces, tokenize
    assert (START, END) == (case['sot'], case['eot'])
    assert case['rows']
    for r in case['rows']:
        got = piece_ids(r['caption'])
        assert got == r['token_ids'], f"{r['caption']!r}: {got}"
        if 'tokens' in r: assert pieces(got) == r['tokens'], f"{r['caption']!r}: {pieces(got)}"
        for k, want in r.items():
            if not k.startswith('max_words_'): continue
            words = int(k.rsplit('_', 1)[1])
            ids, mask = tokenize([r['caption']], words)
            n = want['n_valid']
            assert ids.shape == mask.shape == (1, words)
            assert ids[0].tolist() == want['ids'] + [0]*(words - n), f"{r['caption']!r}, {words}: {ids[0].tolist()}"
            assert mask[0].tolist() == [1]*n + [0]*(words - n)
            assert int(ids[0].argmax()) == want['argmax_position']


def _touch(root, files):
    for f in files:
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        (root/f).touch()
    return root


def _samples(m): return [[o['id'], o['text']] for o in map(m.row, range(len(m)))]
def _paragraphs(m): return [[o['id'], o['text'], o['start'], o['end']] for o in map(m.row, range(len(m)))]


def _split(m, name): return m.split(name) if name in m.splits() else m.select([])


def _annotation_files(data, said, root):
    "Write the files of one data set under their official names"
    import pickle
    def js(name, o): (root/name).write_text(json.dumps(o), encoding='utf-8')
    if data == 'msrvtt':
        (root/'MSRVTT_train.9k.csv').write_text(said['train_csv'], encoding='utf-8')
        (root/'MSRVTT_JSFUSION_test.csv').write_text(said['test_csv'], encoding='utf-8')
        js('MSRVTT_data.json', said['data'])
    elif data == 'msvd':
        for s in ('train', 'val', 'test'):
            (root/f'{s}_list.txt').write_text('\n'.join(said.get(s, [])) + '\n', encoding='utf-8')
        (root/'raw-captions.pkl').write_bytes(pickle.dumps(said['captions']))
    elif data == 'lsmdc':
        from vidlab.data.annots import LSMDC
        for s, name in LSMDC.items(): (root/name).write_text(said.get(s, ''), encoding='utf-8')
    elif data == 'activity':
        for name, k in [('train_ids', 'train_ids'), ('val_ids', 'val_ids'), ('train', 'train'), ('val_1', 'val')]:
            js(f'{name}.json', said.get(k, []))
    elif data == 'didemo':
        for s in ('train', 'val', 'test'):
            (root/f'{s}_list.txt').write_text('\n'.join(said.get(f'{s}_list', [])) + '\n', encoding='utf-8')
            js(f'{s}_data.json', said.get(s, []))


def _read(data, root, videos):
    from vidlab.data import annots as A
    how = dict(missing='drop', missing_limit=1.)                     # what the official loaders do, silently
    if data == 'msrvtt': return {c: A.read_msrvtt(root, videos, captions=c, missing='keep') for c in ('all', 'one')}
    return getattr(A, dict(msvd='read_msvd', lsmdc='read_lsmdc', activity='read_activitynet',
                           didemo='read_didemo')[data])(root, videos, **how)


@kind('clip4clip', 'annotations')
def annotations(case, tensors):
    made = {}
    for data, said in case['inputs'].items():
        with tempfile.TemporaryDirectory() as d:
            root, videos = Path(d)/'annotations', Path(d)/'videos'
            root.mkdir(); videos.mkdir()
            _touch(videos, said.get('files', []))
            _annotation_files(data, said, root)
            made[data] = _read(data, root, videos)
    for key, want in case['expected'].items():
        data, split, *mode = key.split('/')
        m = made[data]
        if data == 'msrvtt':
            m = _split(m['one' if mode == ['no_expand'] else 'all'], split)
            if mode == ['no_expand']:
                g = m.groups()
                got = [[m.row(g.rows(i)[0])['id'], [m.row(j)['text'] for j in g.rows(i)]] for i in range(len(g))]
            else: got = _samples(m)
        elif data in ('activity', 'didemo'): got = _paragraphs(_split(m, split))
        else:
            m = _split(m, split)
            g, got, want = m.groups(), _samples(m), dict(want)
            if 'cut_off_points' in want: assert g.counts.cumsum().tolist() == want['cut_off_points'], key
            if want.get('sentence_num') is not None: assert len(m) == want['sentence_num'], key
            if want.get('video_num') is not None: assert len(g) == want['video_num'], key
            if 'files' in want:
                path = m.column('path').to_pylist()
                assert {m.row(i)['id']: path[i] for i in g.first} == want['files'], key
            want = want['samples']
        assert got == want, f'{key}: {got}, expected {want}'


@kind('clip4clip', 'loader_msvd')
def loader_msvd(case, tensors):
    "Files -> manifest -> sampled frames -> tensors, and every caption of every video in order"
    import pickle
    from vidlab.data.annots import read_msvd
    from vidlab.data.decode import index_video, read_frames
    from vidlab.data.sample import GridSampler
    from vidlab.data.text import tokenize
    from vidlab.data.transforms import normalise, square
    cfg, tol = case['config'], case['tolerance']
    size = cfg['image_resolution']
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for v in cfg['test_list']: (d/f'{v}.mp4').write_bytes(tensors[f'input/{v}.mp4'].numpy().tobytes())
        (d/'test_list.txt').write_text('\n'.join(cfg['test_list']))
        (d/'raw-captions.pkl').write_bytes(pickle.dumps(cfg['captions']))
        m = read_msvd(d, d, splits=['test'])
        ids, mask = tokenize(m.column('text').to_pylist(), cfg['max_words'])
        assert torch.equal(ids[:, None], tensors['output/input_ids'].long())
        assert torch.equal(mask[:, None], tensors['output/input_mask'].long())
        sampler = GridSampler(cfg['max_frames'], cfg['feature_framerate'], cfg['slice_framepos'], cfg['frame_order'])
        g, videos, valid = m.groups(), [], []
        for n, meta in enumerate(cfg['video_meta']):
            index = index_video(m.row(g.first[n])['path'], cache=False)
            assert index.n == meta['frames'], (index.n, meta)
            assert abs(index.fps - meta['fps']) < .01, (index.fps, meta)
            idx = sampler(index.n, index.fps, index.times)
            assert idx.tolist() == meta['frame_indices'], (idx, meta)
            clip = torch.zeros(cfg['max_frames'], 3, size, size, dtype=torch.uint8)
            clip[:len(idx)] = square(read_frames(index, idx), size)
            valid.append(torch.arange(cfg['max_frames']) < len(idx))
            videos.append(normalise(clip, mask=valid[-1]))
        for v in range(len(m)): assert torch.equal(valid[g.code[v]].long(), tensors['output/video_mask'][v, 0].long())
        close('video', torch.stack(videos)[:, None, :, None], tensors['output/video_per_clip'], tol)
