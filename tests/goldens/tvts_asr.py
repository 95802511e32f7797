"""Checks of TVTS's annotation kinds: transcripts and their alignment, split files, taking turns, retrieval numbers."""
import tempfile
from pathlib import Path

import numpy as np

from goldens import close, kind, sub
from goldens.tdsclip_data import Python


@kind('tvts', 'asr_alignment')
def asr_alignment(case, tensors):
    from vidlab.data.asr import align_words, clean_words
    assert case['cases']
    for n, c in enumerate(case['cases']):
        with sub(f'{n}'):
            if c.get('kind') == 'clean_subtitles': got, want = [[w, i] for i, w in clean_words(c['words'])], c['kept']
            else: got, want = align_words(c['asr_words'], c['clean_words'], c.get('radius_perc', .1), c.get('radius_abs', 32)), c['aligned']
            assert got == want, f'{got}, expected {want}'


@kind('tvts', 'transcript_segments')
def transcript_segments(case, tensors):
    from vidlab.data.asr import align_words, draw_stretch, piece_times, read_speech, words_within
    assert case['cases']
    speech = None
    for n, c in enumerate(case['cases']):
        with sub(f'{n}'):
            if isinstance(c['annotation'], dict):                   # else "same as previous"
                speech = read_speech(c['annotation'])
                speech.words = align_words(*speech.words)
            k = len(c['texts'])
            times = piece_times(*draw_stretch(speech.duration, k, gen=Python(c['python_seed'])), k)
            close('starts', times[:, 0], c['starts_s'], case['tolerance'])
            close('ends', times[:, 1], c['ends_s'], case['tolerance'])
            got = [''.join(w + ' ' for w in words_within(speech, *o)) for o in times]       # published: each word and a space
            assert got == c['texts'], f"{got}, expected {c['texts']}"
            assert int(speech.duration) == c['video_len_s'] and list(range(k)) == c['label']


@kind('tvts', 'split_rows')
def split_rows(case, tensors):
    from vidlab.data.annots import read_pairs
    from vidlab.data.asr import read_yttemporal
    assert case['cases']
    folder = dict(WebVid=lambda s: f'data/WebVid/{s}', CC3M=lambda s: f"data/CC3M/{'training' if s == 'train' else 'validation'}", YTTemporal=lambda s: 'data/YTTemporal/videos')
    for n, c in enumerate(case['cases']):
        assert c['dataset'] in folder, f"unknown data set {c['dataset']}; known: {', '.join(folder)}"
        with sub(f"{n} {c['dataset']}"), tempfile.TemporaryDirectory() as d:
            file, root = Path(d)/'rows.tsv', Path(d)/folder[c['dataset']](c.get('split'))
            def name(p): return str(Path(p).relative_to(d))
            if c['dataset'] == 'YTTemporal':
                file.write_text(f"other\tName\nx\t{c['row']}\n", encoding='utf-8')
                row = read_yttemporal(file, root, missing='keep').row(0)
                assert [name(row['path']), name(root/row['asr'])] == [c['video_path'], c['annotation_path']], row
                continue
            file.write_text('\n'.join('\t'.join(o) for o in [[f'h{i}' for i in range(len(c['row']))], c['row']]) + '\n', encoding='utf-8')
            ext = '.mp4' if c['dataset'] == 'WebVid' else 'none'           # pictures stand there as they are called
            row = read_pairs(file, root, c.get('split'), ext, missing='keep').row(0)
            assert [name(row['path']), [row['text']]] == [c.get('video_path', c.get('image_path')), c['captions']], row


class _Turns:
    "A loader that says which batch of which pass it gives"
    def __init__(self, name, n): self.name, self.n, self.unread = name, n, {}
    def __len__(self): return self.n
    def epoch(self, epoch=0, start=0):
        for b in range(start, self.n): yield dict(loader=self.name, batch=b, epoch=epoch)


@kind('tvts', 'loader_interleave')
def loader_interleave(case, tensors):
    from vidlab.data.clips import Mixed
    assert case['cases']
    for c in case['cases']:
        sizes = c['batches_per_loader']
        with sub(str(sizes)):
            mix = Mixed({str(i): _Turns(i, n) for i, n in enumerate(sizes)}, order='alternate')
            for e in (0, 3):
                got = list(mix.epoch(e))
                each = [-(-max(sizes)//n) for n in sizes]
                said = [dict(loader=b['loader'], batch=b['batch'], pass_=b['epoch'] - e*each[b['loader']] + 1) for b in got]
                want = c['sequence']
                if c.get('error'):                                  # loaders of one length: published, an error; here every one restarts
                    want = [dict(loader=i, batch=k % n, pass_=k//n + 1) for k in range(max(sizes)) for i, n in enumerate(sizes)]
                else: assert len(mix) == c['optimizer_steps']
                assert said == want, f'{said}, expected {want}'
                assert len(got) == len(mix)
                for start in range(len(mix) + 1): assert list(mix.epoch(e, start)) == got[start:], f'resumed at {start}'


@kind('tvts', 'v2v_retrieval')
def v2v_retrieval(case, tensors):
    from vidlab.metrics import same_class_ranks, same_class_retrieval
    assert case['cases']
    for n, c in enumerate(case['cases']):
        with sub(f'{n}'):
            ranks = same_class_ranks(c['features'], c['labels'])
            top = max(int(k[1:]) for k in c if k[0] == 'R' and k[1:].isdigit())
            got = [int(r) - 1 if r <= top else None for r in ranks]       # published: looked up among the first ten only
            assert got == c['first_hit_rank'], f"{got}, expected {c['first_hit_rank']}"
            m = same_class_retrieval(c['features'], c['labels'], ks=[int(k[1:]) for k in c if k[0] == 'R' and k[1:].isdigit()])
            for k in c:
                if k[0] == 'R' and k[1:].isdigit(): close(k, m[k], c[k], case['tolerance'])


@kind('tvts', 'retrieval_metrics')
def retrieval_metrics(case, tensors):
    from vidlab.metrics import geometric_mean, retrieval_ranks
    assert case['cases']
    for n, c in enumerate(case['cases']):
        sim = np.array(c['sims'])
        video = np.arange(len(sim))//c['queries_per_video']
        if c.get('query_masks') is not None:                        # a masked caption does not exist
            there = np.array(c['query_masks']).reshape(-1) > 0
            sim, video = sim[there], video[there]
        for way, ties in dict(t2v='best', v2t='mean').items():
            with sub(f'{n} {way}'):
                want = c[way]
                ks = [int(k[1:]) for k in want if k[0] == 'R' and k[1:].isdigit()]
                found = retrieval_ranks(sim, video, ties, ks, captions='single')[way]
                m = found.metrics | dict(MedR=found.metrics['MdR'], MeanR=found.metrics['MnR'])
                if found.ties: m |= {f'R{k}': 100*np.mean(found.ranks - 1 < k) for k in ks}    # published: place 4.5 of a tie is among the first five
                for k, v in want.items(): close(k, geometric_mean(m, [int(o[1:]) for o in k.split('_')[-1].split('-')]) if k.startswith('geometric') else m[k], v, case['tolerance'])
