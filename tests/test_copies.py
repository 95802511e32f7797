"""Copies among videos: every kind is found, and clips that resemble each other are none"""
import csv, os
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from vidlab.core import rng
from vidlab.data import copies as C
from vidlab.data.copies import Copy, find_copies, groups_of, plant, print_of, prints_of, trial
from vidlab.data.decode import read_frames
from vidlab.data.files import example_clip
from vidlab.data.index import index_video
from vidlab.data.shapes import CLIP_CAPTIONS, clip_item, encode

MEDIA = Path(__file__).resolve().parents[2]/'shared'/'media'

@pytest.fixture(autouse=True)
def _places(outputs, cache): pass

def pairs(paths): return {frozenset((Path(paths[c.a]).name, Path(paths[c.b]).name)): c for c in find_copies(paths)}

def films(folder, n=6):
    "Moving pictures with more in them than one shape"
    out = []
    for k in range(n):
        g = np.random.default_rng(k)
        base = np.asarray(Image.fromarray(g.integers(0, 255, (8, 20, 3), np.uint8)).resize((480, 168), Image.Resampling.BICUBIC))
        frames = np.stack([base[t//2:t//2+120, 2*t:2*t+160] for t in range(40)])
        out.append(str(folder/f'film {k}.mp4'))
        encode(out[-1], np.ascontiguousarray(frames), 10)
    return out

@pytest.mark.parametrize('kind', C.COPIES)
def test_every_kind_among_films(tmp_path, kind):
    paths = films(tmp_path)
    x = read_frames(paths[2], range(40))
    plant(tmp_path/'copy.mp4', x, 10, kind, np.random.default_rng(3))
    found = pairs([*paths, str(tmp_path/'copy.mp4')])
    assert set(found) == {frozenset(('copy.mp4', 'film 2.mp4'))}, found
    how = next(iter(found.values())).how
    want = {'resized': 'newly encoded'}.get(kind, kind).split() if kind not in ('newly encoded', 'other speed') else [kind]
    assert all(w in how for w in want) or how == ['newly encoded'], how

@pytest.mark.parametrize('crf, threads', [(26, 1), (20, 2), (20, 4)])
def test_where_it_lies(tmp_path, crf, threads):
    "The last two begin far from the place: it takes more steps to get there; x264 writes other files with other numbers of threads"
    a = example_clip(tmp_path/'a.mp4', n=120, threads=threads)
    x = read_frames(a, range(45, 90))[:, 24:204, 32:272]
    encode(tmp_path/'b.mp4', np.ascontiguousarray(x), 30, crf=crf)
    (c,) = find_copies([*films(tmp_path, 3), a, str(tmp_path/'b.mp4')])
    assert {'cropped', 'piece'} <= set(c.how) and (c.a, c.b) == (4, 3)
    assert c.begin == pytest.approx(1.5, abs=.07) and c.end == pytest.approx(3., abs=.1)
    assert c.window == pytest.approx((240/320, 180/240, .1, .1), abs=.01) and c.off < 4 and c.chance < C.LIMIT/4

def test_many_copies_of_one(tmp_path):
    "All neighbours of a film are copies of it: strangers are farther away than any of them"
    paths = films(tmp_path)
    x = read_frames(paths[2], range(40))
    for k in range(12):
        paths.append(str(tmp_path/f'copy {k}.mp4'))
        plant(paths[-1], x, 10, 'cropped' if k % 2 else 'newly encoded', np.random.default_rng(k))
    groups = groups_of(len(paths), find_copies(paths))                   # each has its nearest neighbours as pairs, not all of them
    assert all(groups[6:] == groups[2]) and len(set(groups)) == 6

def test_chance_among_many_copies_is_that_among_strangers():
    "Four copies of one film and a crop: its chance is as if there were one copy, for the others are no strangers"
    place = lambda a, b, off: C.Place(a, b, 1., .5, .5, 0., 1., False, True, False, off, .1)
    g, n = np.random.default_rng(0), 40
    far = [place(a, int(b), g.uniform(30, 45)) for a in range(n) for b in g.choice(np.arange(n//2, n), 5, replace=False) if a != b]
    copies = [place(a, b, .5) for a in range(4) for b in range(4) if a != b]
    crop = [place(4, b, 4.) for b in range(4)]
    C.by_chance(far + copies + crop, n)
    alone = place(4, 0, 4.)
    C.by_chance([*far, alone], n)
    assert crop[0].chance == pytest.approx(alone.chance, rel=.05) and max(p.chance for p in copies) < C.LIMIT < min(p.chance for p in far)

@pytest.mark.parametrize('n', [14, 24])
def test_clips_of_one_caption_are_no_copies(n, tmp_path):
    "Clips of two captions, drawn with other numbers, too few to say how near strangers come or enough: nothing is found; one of them again is"
    paths = [str(tmp_path/f'{i}.mp4') for i in range(n)]
    for i, p in enumerate(paths): encode(p, clip_item(i % 2, rng(8, i))[0], 8)
    assert find_copies(paths) == []
    encode(tmp_path/'again.mp4', clip_item(0, rng(8, 4))[0], 8, crf=24)
    assert set(pairs([*paths, str(tmp_path/'again.mp4')])) == {frozenset(('again.mp4', '4.mp4'))}

def test_nothing_but_copies_of_a_clip_without_noise(tmp_path):
    "No stranger to measure by, and no grain to look at"
    x = read_frames(example_clip(tmp_path/'0.mp4', n=60), range(60))
    paths = [str(tmp_path/f'{i}.mp4') for i in range(4)]
    for p, crf in zip(paths[1:], (20, 24, 28)): encode(p, x, 30, crf=crf)
    assert groups_of(4, find_copies(paths)).max() == 0

def test_noise_beside_an_edge_between_colours():
    "An edge that brightness does not show is no even ground; noise is found again where it is the same, and nowhere else"
    g, n = torch.Generator().manual_seed(0), C.LARGE
    x = torch.full((4, 3, n, n), 120.)
    x[:, :, 20:40, 20:40] = torch.tensor([200., 60., 219.])[:, None, None]        # as bright
    noise = lambda: 3*torch.randn(4, 1, n, n, generator=g)
    one, two = noise(), noise()
    even = C._even(x + one)
    assert not even[:, 18:42, 20].any() and even[:, 6:12, 6:-6].mean() > .9
    rows = np.arange(4)[None]
    z = lambda a, b: C._agree(C._noise(x + a), torch.nn.functional.pad(C._noise(x + b), (1,)*4), rows, np.zeros((1, 4), bool))[0]
    assert z(one, one + noise())[0] > 20 and z(one, two)[0] < 4
    assert z(one, (one + noise()).flip(-1))[1]                                  # its mirror image as well

def test_noise_that_key_frames_alone_have_kept():
    g, rows, key = torch.Generator().manual_seed(0), np.arange(16)[None], np.zeros((1, 16), bool)
    one = torch.randn(16, 40, 40, generator=g)
    other = 2*torch.randn(16, 42, 42, generator=g)
    other[0, 1:-1, 1:-1] += .3*one[0]
    assert C._agree(one, other, rows, key)[0][0] < 4.5
    key[0, 0] = True
    (z, *where), tries = C._agree(one, other, rows, key)
    assert z > 4.5 and where == [False, 0, 1, 1] and tries == 4*9

def test_the_noise_says_where_it_lies(tmp_path):
    "A circle that moves evenly looks the same a little later and a little aside, and is its own mirror image"
    i = next(k for k, c in enumerate(CLIP_CAPTIONS) if c == 'a small red circle moves right')
    paths = [str(tmp_path/f'{k}.mp4') for k in range(24)]
    for k, p in enumerate(paths): encode(p, clip_item(i, rng(8, k))[0], 8)
    x = read_frames(paths[3], range(3, 12))[:, 4:56, 6:58][:, :, ::-1]
    encode(tmp_path/'b.mp4', np.ascontiguousarray(x), 8, crf=23)
    (c,) = find_copies([*paths, str(tmp_path/'b.mp4')])
    assert (c.a, c.b) == (24, 3) and {'cropped', 'mirrored', 'piece'} <= set(c.how)
    assert c.begin == pytest.approx(3/8, abs=.02) and c.window == pytest.approx((52/64, 52/64, 6/64, 4/64), abs=.02)
    assert c.chance < C.LIMIT

def test_the_right_neighbours(tmp_path):
    "The place of a copy is among the first three of its kind, crop, mirror image and piece at once"
    paths = [str(tmp_path/f'{i}.mp4') for i in range(36)]
    for i, p in enumerate(paths): encode(p, clip_item(i % 6, rng(9, i))[0], 8)
    for k in range(6): plant(tmp_path/f'copy {k}.mp4', read_frames(paths[5*k], range(15)), 8, 'cropped mirrored piece', np.random.default_rng(k))
    ps = prints_of([*paths, *(str(tmp_path/f'copy {k}.mp4') for k in range(6))])
    found = C.candidates(ps, 3, 3)
    assert sum(any(o[:2] == (36 + k, 5*k) for o in found) for k in range(6)) >= 5

def test_no_noise_in_common_makes_a_place_no_rarer():
    "A place that is likelier than any that is looked at stays a coincidence"
    place = lambda chance, grain: C.Place(0, 1, 1., .5, .5, 0., 1., False, True, False, 5., .3, chance, grain, 36)
    assert C.in_all(place(4., 1.3)) == 1. and not C.certain([place(4., 1.3)])
    assert C.in_all(place(4., 9.)) < C.LIMIT < C.in_all(place(.3, 2.)) < .31

def test_same_scene_other_movement_is_no_copy(tmp_path):
    "A camera that stands: the room is the same, what moves in it is not"
    g = np.random.default_rng(0)
    room = np.kron(g.integers(0, 255, (12, 16, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
    for k in range(4):
        frames = np.repeat(room[None], 30, 0)
        for t in range(30):
            y, x = (20 + 20*k, 4*t) if k % 2 else (3*t, 20 + 30*k)
            frames[t, y:y+25, x:x+25] = 255*(k % 3 > 0)
        encode(tmp_path/f'{k}.mp4', frames, 10)
    assert find_copies([str(tmp_path/f'{k}.mp4') for k in range(4)] + films(tmp_path)) == []

def test_bytes_odd_files_and_nothing(tmp_path):
    "Equal bytes; black videos say nothing; what cannot be read is left out; one frame; a name of all signs"
    paths = films(tmp_path, 2)
    odd = tmp_path/'a "b" <i>ü日.mp4'
    odd.write_bytes(Path(paths[0]).read_bytes())
    for n in ('dark.mp4', 'night.mp4'): encode(tmp_path/n, np.full((12, 48, 64, 3), 3 + len(n), np.uint8), 8)
    encode(tmp_path/'one.mp4', read_frames(paths[1], [0]), 8)
    (tmp_path/'broken.mp4').write_bytes(b'x'*500)
    files = [*paths, str(odd), *(str(tmp_path/n) for n in ('dark.mp4', 'night.mp4', 'one.mp4', 'broken.mp4'))]
    found = pairs(files)
    assert found[frozenset(('film 0.mp4', odd.name))].how == ['same file'] and len(found) <= 2
    assert find_copies([]) == [] and find_copies(files[-1:]) == [] and prints_of(files[-1:]) == [None]

def test_a_print_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    (p,) = films(tmp_path, 1)
    first = print_of(p)
    monkeypatch.setattr(C, '_make_print', lambda path: pytest.fail('it was made again'))
    assert np.array_equal(print_of(p).thumbs, first.thumbs)
    os.utime(p, (1, 1))
    with pytest.raises(pytest.fail.Exception): print_of(p)

def test_groups():
    g = groups_of(6, [Copy(0, 2, []), Copy(4, 2, []), Copy(1, 5, [])])
    assert g[0] == g[2] == g[4] != g[1] == g[5] and len(set(g)) == 3 and len(set(groups_of(3, []))) == 3

@pytest.mark.skipif(not MEDIA.is_dir(), reason='no real videos here')
@pytest.mark.long
def test_real_videos(tmp_path):
    "Fifteen films with 56 copies, so that most neighbours of a film are its own copies: nearly all found, none invented"
    with open(MEDIA/'real'/'index.csv') as f: names = [next(iter(r.values())) for r in csv.DictReader(f)]
    files = [str(MEDIA/'real'/n) for n in names if (MEDIA/'real'/n).is_file()]
    assert len(files) > 8 and find_copies(files) == []
    short = []
    for k, f in enumerate(files):                                       # small ones, so that planting is quick
        ix = index_video(f)
        at = np.arange(0, min(ix.n, 240), 2)
        h = 120
        w = round(h*ix.width/ix.height)//2*2
        short.append(str(tmp_path/f'{k}.mp4'))
        encode(short[-1], read_frames(f, at, size=(h, w)), max(2, round(ix.fps/2)))
    seen = trial(tmp_path, short, 8)
    assert seen['false'] == 0, seen
    single = [k for k in C.COPIES if k != 'cropped mirrored piece']
    assert sum(seen[k][0] for k in single) >= .95*8*len(single), seen
    assert seen['cropped mirrored piece'][0] >= 4, seen                  # where a crop moves in time as well, the search does not always bring the place

@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_clips():
    from vidlab.data.shapes import make_shapes
    import tempfile
    sources = sorted((make_shapes(kinds=('clips',))/'clips'/'train').glob('*.mp4'))[:1720]
    with tempfile.TemporaryDirectory() as d: seen = trial(d, sources)
    single = [k for k in C.COPIES if k != 'cropped mirrored piece']
    assert sum(seen[k][0] for k in single) >= .98*40*len(single) and seen['false'] <= 2, seen
