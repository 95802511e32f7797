"Narrated samples: K transcripts of a stretch, from sentences or from speech files; what is broken is named; joint training with captions and pictures."
import io, json, tarfile, warnings
import numpy as np
import pytest
import torch
from PIL import Image
from vidlab.core import rng
from vidlab.data import asr
from vidlab.data.annots import Manifest
from vidlab.data.asr import Narration, load_speech, piece_times, draw_stretch
from vidlab.data.clips import Clips, Loader, Mixed, TooManyUnread, Unread
from vidlab.data.files import VideoError
from vidlab.data.sample import SegmentSampler
from vidlab.data.shapes import encode, make_shapes
from vidlab.data.shards import from_shards


pytestmark = pytest.mark.usefixtures('cache')

@pytest.fixture(scope='module')
def narrated(tmp_path_factory):
    root = make_shapes(tmp_path_factory.mktemp('s'), kinds=('narrated', 'clips'), sizes=dict(narrated=dict(train=6, val=1, test=1), clips=dict(train=9, val=1, test=1)))
    return Manifest.read(root/'narrated'/'train.csv'), Manifest.read(root/'clips'/'train.csv')

def said(words, duration=40., **kw):
    "An annotation in which one word is said every second"
    return dict(dict(info=dict(duration=duration), subtitles=[dict(word=w, time=i + .5) for i, w in enumerate(words)], denoised=[dict(cleanasr=' '.join(words).capitalize() + '.')]), **kw)

@pytest.fixture(scope='module')
def yt(tmp_path_factory):
    "Three videos of 40 seconds with speech files"
    root = tmp_path_factory.mktemp('yt')
    words = [a + b for a in 'spoon knife bread water onion garlic salt butter'.split() for b in ('', 'ing', 'er', 'ly', 's')]
    for i in range(3):
        encode(root/f'{i}.mp4', rng(i).integers(0, 255, (160, 32, 32, 3), dtype=np.uint8), fps=4)
        (root/f'{i}.json').write_text(json.dumps(said(list(rng(i).permutation(words)))))
    return Manifest.build(dict(id=list('012'), path=[f'{i}.mp4' for i in range(3)], asr=[f'{i}.json' for i in range(3)]), root)


def clips(m, narration=None, **kw): return Clips(m, SegmentSampler(8), **{**dict(size=16, max_words=20, narration=narration), **kw})

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize('kind', ['sentences', 'speech'])
@pytest.mark.parametrize('shuffle', [False, True])
def test_pure_function_of_seed_epoch_index(narrated, yt, kind, shuffle):
    "Any number of workers, resumed anywhere: the same transcripts, frames and order"
    m = narrated[0] if kind == 'sentences' else yt
    def batches(workers, start=0):
        dl = Loader(clips(m, Narration(3, shuffle), train=True, seed=4), 3, workers=workers, shuffle=True, drop_last=True, seed=4, timeout=60)
        try: return list(dl.epoch(2, start))
        finally: dl.close()
    want = batches(0)
    assert all(equal(a, b) for a, b in zip(want, batches(2), strict=True)) and all(equal(a, b) for a, b in zip(want[1:], batches(0, 1), strict=True))
    b = want[0]
    assert b['text'].shape == b['text_mask'].shape == (3, 3, 20) and b['order'].dtype == torch.int64 and b['text_time'].shape == (3, 3, 2)
    for order, times, frames in zip(b['order'], b['text_time'], b['frame_time']):
        assert sorted(order.tolist()) == [0, 1, 2] and (times[order.argsort(), 0].diff() > 0).all()
        assert times.min() - .3 <= frames.min() and frames.max() <= times.max() + .3
    assert shuffle == any(o.tolist() != [0, 1, 2] for b in want for o in b['order'])


def test_shuffling_changes_nothing_but_the_order(yt):
    plain, mixed = (clips(yt, Narration(shuffle=o), train=True)[(1, 2)] for o in (False, True))
    for k in ('text', 'text_mask', 'text_time'): assert torch.equal(plain[k][mixed['order']], mixed[k])
    assert [plain['caption'][o] for o in mixed['order']] == mixed['caption']


def test_evaluation_is_the_same_every_time_on_every_side(narrated, yt):
    for m in (narrated[0], yt):
        row, video, text = (clips(m, Narration(2), unit=u) for u in ('row', 'clip', 'text'))
        assert equal(row[(0, 1)], row[(7, 1)]) and 'text' not in video[1] and 'video' not in text[1]
        assert torch.equal(row[1]['video'], video[1]['video']) and torch.equal(row[1]['text'], text[1]['text'])
        assert equal(row[1], clips(m, Narration(2), seed=9)[1])
    assert torch.equal(clips(yt, Narration())[0]['text_time'], torch.from_numpy(piece_times(*draw_stretch(40.))).float())


def test_other_tokenizers(narrated):
    s = clips(narrated[0], Narration(), tokenizer='shapes')[0]
    assert s['text'].shape == (4, 20) and s['text'].max() < 1000
    assert not torch.equal(s['text'], clips(narrated[0], Narration())[0]['text'])


def test_short_transcripts_are_drawn_again_or_refused(yt):
    "Silence in most of a video: training finds the stretch where something is said, or says that there is none"
    words = ['hello' if 4 <= i < 24 else '' for i in range(40)]
    o = said([w or 'x' for w in words])
    o['subtitles'] = [s for s, w in zip(o['subtitles'], words) if w]
    (yt.root/'quiet.json').write_text(json.dumps(dict(o, denoised=[dict(cleanasr=' '.join(w for w in words if w))])))
    m = Manifest.build(dict(path=['0.mp4'], asr=['quiet.json']), yt.root)
    got = [clips(m, Narration(tries=20), train=True)[(e, 0)] for e in range(6)]
    assert all(min(map(len, s['caption'])) >= 10 for s in got)
    bad = clips(m, Narration(min_chars=200), train=True)[(0, 0)]
    assert isinstance(bad, Unread) and 'fewer than 200 characters' in bad.reason
    with pytest.raises(VideoError, match='0.mp4.*cannot read transcripts: in 8 stretches'): clips(m, Narration(min_chars=200))[0]


BROKEN = [('{"info"', "Expecting"), (json.dumps(said([])), 'no subtitles'), (json.dumps(said(['a'], duration=None)), 'info.duration is None'),
          (json.dumps(said(['a'], duration=3)), 'too short'), (json.dumps(dict(said(['a']), denoised=[dict(cleanasr='')])), 'cleanasr is empty')]

@pytest.mark.parametrize('text,why', BROKEN, ids=[w for _, w in BROKEN])
def test_a_broken_speech_file(yt, text, why):
    "In training counted and left out, in evaluation an error, both with file and reason"
    root = yt.root
    (root/'bad.json').write_text(text)
    m = Manifest.build(dict(id=list('ab'), path=['0.mp4', '1.mp4'], asr=['bad.json', '1.json']), root)
    ds = clips(m, Narration(), train=True)
    with pytest.warns(UserWarning, match=f'1 of 2 rows cannot be used: bad.json: .*{why}'): ds.check()
    assert len(ds) == 1 and [o['file'] for o in ds.notes] == ['bad.json'] and why in next(iter(ds.unread.values()))
    assert isinstance(clips(m, Narration(), train=True)[0], Unread)                          # also without that check
    with pytest.raises(VideoError, match=f'bad.json: .*{why}'): clips(m, Narration()).check()
    miss = clips(m, Narration(), on_bad='miss')
    with pytest.warns(UserWarning): miss.check()
    assert len(miss) == 2 and isinstance(miss[0], Unread)
    most = Manifest.build(dict(id=list('abc'), path=['0.mp4', '1.mp4', '2.mp4'], asr=['bad.json', 'bad.json', '2.json']), root)
    ds = clips(most, Narration(), train=True)
    with pytest.warns(UserWarning): ds.check()
    with pytest.raises(TooManyUnread, match='read transcripts'): Loader(ds, 1)


def test_a_broken_entry_is_left_out_and_named(yt):
    o = json.loads((yt.root/'2.json').read_text())
    o['subtitles'][5:5] = [dict(time=5), dict(word='x', time=-1), 7, dict(word='y', time='now')]
    (yt.root/'odd.json').write_text(json.dumps(o))
    m = Manifest.build(dict(id=list('ab'), path=['1.mp4', '2.mp4'], asr=['1.json', 'odd.json']), yt.root)
    ds = clips(m, Narration(), train=True)
    with pytest.warns(UserWarning, match='4 entries of transcripts are left out, 0 of 2 rows'): ds.check()
    assert [(n['file'], n['video'], n['part'], n['entry']) for n in ds.notes] == [('odd.json', 'b', 'subtitles', k) for k in (6, 7, 8, 9)]
    assert [n['reason'].split(':')[0] for n in ds.notes] == ["no 'word'", 'time is not a time in seconds', 'not an object', 'time is not a time in seconds']
    assert load_speech(yt.root/'odd.json').words == load_speech(yt.root/'2.json').words
    with warnings.catch_warnings(): warnings.simplefilter('error'); clips(yt, Narration(), train=True).check()


def test_speech_is_aligned_once_for_an_unchanged_file(yt, monkeypatch):
    calls = []
    real = asr.align_words
    monkeypatch.setattr(asr, 'align_words', lambda *a: calls.append(1) or real(*a))
    file, o = yt.root/'same.json', json.loads((yt.root/'0.json').read_text())
    file.write_text(json.dumps(o))
    first, again = load_speech(file), load_speech(file)
    assert len(calls) == 1 and first.words == again.words and np.array_equal(first.times, again.times)
    load_speech(file, cache=False)
    o['denoised'][0]['cleanasr'] += ' More.'
    file.write_text(json.dumps(o))
    assert len(calls) == 2 and load_speech(file).words != first.words and len(calls) == 3


def test_a_speech_file_outside_the_root_is_refused(yt):
    m = Manifest.build(dict(path=['0.mp4'], asr=['../../etc/hostname']), yt.root)
    with pytest.raises(VideoError, match='outside the root'): clips(m, Narration())[0]


def test_captions_pictures_and_narration_take_turns(narrated, tmp_path):
    "Joint training as published: videos and pictures out of tar shards, and narrated videos, one batch of each in turn; resumable anywhere, with workers"
    def shard(name, members):
        with tarfile.open(tmp_path/name, 'w') as f:
            for n, data in members: i = tarfile.TarInfo(n); i.size = len(data); f.addfile(i, io.BytesIO(data))
    def jpg(i): out = io.BytesIO(); Image.fromarray(rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(out, 'JPEG'); return out.getvalue()
    shard('webvid.tar', [(f'{i}.{e}', d) for i in range(9) for e, d in [('mp4', open(narrated[1].row(i)['path'], 'rb').read()), ('txt', narrated[1].row(i)['text'].encode())]])
    shard('cc3m.tar', [(f'{i}.{e}', d) for i in range(6) for e, d in [('jpg', jpg(i)), ('json', json.dumps(dict(caption=f'picture {i}')).encode())]])
    def mixed(workers):
        load = lambda ds, n: Loader(ds, n, workers=workers, shuffle=True, drop_last=True, seed=3, timeout=60)
        make = lambda m, t, **kw: Clips(m, SegmentSampler(t), size=16, max_words=12, train=True, seed=3, **kw)
        return Mixed(dict(web=load(make(from_shards(tmp_path/'webvid.tar'), 4), 2), cc=load(make(from_shards(tmp_path/'cc3m.tar', caption='json.caption'), 2), 3),
                          yt=load(make(narrated[0], 8, narration=Narration()), 3)), seed=3, order='alternate')
    def run(workers, start=0):
        mix = mixed(workers)
        try: return list(mix.epoch(1, start))
        finally: mix.close()
    want = run(0)
    assert len(mixed(0)) == len(want) == 12 and [b['source'] for b in want] == ['web', 'cc', 'yt']*4
    assert [tuple(b['video'].shape[:2]) for b in want[:3]] == [(2, 4), (3, 2), (3, 8)] and [b['text'].ndim for b in want[:3]] == [2, 2, 3]
    pictures = want[1]['video']
    assert torch.equal(pictures[:, 0], pictures[:, 1])                                       # a picture is a video of one frame, shown twice
    for k in (0, 1):                                                                        # each pass of the pictures is whole, in its own order
        assert sorted(torch.cat([b['sid'] for b in want[1::3]][2*k:2*k+2]).tolist()) == list(range(6))
    for start in (1, 5, 7, 11): assert all(equal(a, b) for a, b in zip(want[start:], run(0, start), strict=True)), start
    assert all(equal(a, b) for a, b in zip(want, run(1), strict=True))
