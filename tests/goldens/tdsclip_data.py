"""Checks of the TDS-CLIP data kinds: frame indices, neighbour windows, lists, transforms, RandAugment, views, mixup."""
import random, tempfile
from pathlib import Path

import numpy as np

from goldens import close, kind, sub


class Python:
    "The published random draws, from Python's and numpy's global generators, in the shape of a numpy Generator"
    def __init__(self, seed): self.py, self.np = random.Random(seed), np.random.RandomState(seed % 2**32)
    def random(self): return self.py.random()
    def uniform(self, a, b): return self.py.uniform(a, b)
    def normal(self, m, s): return self.py.gauss(m, s)
    def beta(self, a, b): return self.np.beta(a, b)
    def integers(self, lo, hi=None, size=None):
        lo, hi = (0, lo) if hi is None else (lo, hi)
        if size is not None: return self.np.choice(np.arange(lo, hi), size)
        one = lambda a, b: self.py.randint(int(a), int(b) - 1)
        return one(lo, hi) if np.ndim(lo) == np.ndim(hi) == 0 else np.array([one(a, b) for a, b in zip(lo, hi)])


class Extreme:
    "Draws the least (False) or the largest (True) value every time"
    def __init__(self, most): self.most = most
    def integers(self, lo, hi=None, size=None):
        lo, hi = (0, lo) if hi is None else (lo, hi)
        v = np.asarray(hi) - 1 if self.most else np.zeros(np.shape(hi), np.int64) + lo
        return np.full(size, v) if size is not None else v


@kind('tdsclip', 'sampling')
def sampling(case, tensors):
    from vidlab.data.sample import DenseSampler, SegmentSampler, dense, segments
    window, base = case['config'].get('sample_range', 128), case['config'].get('index_bias', 1)
    assert case['cases']
    for c in case['cases']:
        c = dict(dense=False, **c) if 'dense' not in c else c
        n, t, clips, rule = c['frames'], c['segments'], c.get('clips', 1), c['family']
        gen = (lambda s: Python(s)) if rule == 'kinetics' and not c['dense'] else np.random.RandomState
        if c['dense']:
            train = c['mode'] != 'test'                       # the published validation draws its window too
            draws = [(gen(c['seed']) if train else None, c['indices'])]
            take = lambda g: dense(n, t, window, train, g, clips=clips)
            one = DenseSampler(t, window)
        else:
            train = c['mode'] == 'train'
            draws = [(gen(d['seed']), d['indices']) for d in c['draws']] if train else [(None, c['indices'])]
            take = lambda g: segments(n, t, train, g, rule, clips)
            one = SegmentSampler(t, rule)
        for g, want in draws:
            got = (take(g) + base).tolist()
            assert got == want, f'{c}: {got}'
        if not train:
            by_clip = [one(n, 25., None, clip=k, clips=clips) + base for k in range(clips)]
            assert np.concatenate(by_clip).tolist() == c['indices'], f'{c}: the sampler gives {by_clip}'
        if 'observed_min' in c:                               # the support of our draws is the published one
            low, high = (take(Extreme(o)) + base for o in (False, True))
            assert (low <= c['observed_min']).all() and (high >= c['observed_max']).all(), f'{c}: {low} to {high}'
            if 'allowed_min' in c: assert (low.tolist(), high.tolist()) == (c['allowed_min'], c['allowed_max']), f'{c}: {low} to {high}'
            ours = np.stack([take(np.random.default_rng(i)) for i in range(100)]) + base
            assert (ours >= low).all() and (ours <= high).all(), f'{c}: a draw outside its segment'


@kind('tdsclip', 'neighbour_window')
def neighbour_window(case, tensors):
    from vidlab.data.sample import neighbours
    assert case['cases']
    for c in case['cases']:
        n, i, m = c['frames'], c['index'] - 1, c['num_diff']
        got = (neighbours([i], n, m) + 1).tolist()
        assert got == c['frame_files'], f'{c}: {got}'
        if c['decord_frames'] is not None:                    # the published order at the start of a video file
            got = neighbours([i], n, m, wrap=True).tolist()
            assert got == c['decord_frames'], f'{c}: {got}'
            continue
        try: got = neighbours([i], n, m, wrap=True)
        except ValueError: continue
        raise AssertionError(f'{c}: {got}, expected an error')


@kind('tdsclip', 'annotation_lists')
def annotation_lists(case, tensors):
    from vidlab.data.annots import read_list
    assert case['cases']
    for c in case['cases']:
        with tempfile.TemporaryDirectory() as d:
            file = Path(d)/'list.txt'
            file.write_text(c['text'])
            counts = [len(o.split(' ')) for o in c['text'].split('\n') if o.strip()]
            three = counts[:1] == [3]
            root = None if c['text'].startswith('/') else d
            least = case['config'].get('min_frames', 8) if three and not c['test_mode'] else 0
            try: m = read_list(file, root, 'path frames label' if three else 'path label', sep=' ', ext=None, missing='keep', min_frames=least)
            except ValueError as e:
                if len(set(counts)) > 1:
                    with sub('lines with different numbers of fields'): raise
                    continue
                assert not c['records'] and 'no row' in str(e), e  # a list without rows is an error here
                continue
            got = [dict(path=str(Path(r['path']).relative_to(root)) if root else r['path'], num_frames=int(r['frames']) if three else r['label'], label=r['label'])
                   for r in map(m.row, range(len(m)))]            # without a count the published record repeats the label
            assert got == c['records'], f'{c}: {got}'


def _family(family, size, **kw):
    "The transform of a data set family, before any crop"
    from vidlab.data.transforms import ClipTransform
    how = dict(stretch=(256, 320)) if family == 'something' else dict(short=256 if size == 224 else size)
    return ClipTransform(size, **how, **kw)


def _names(pairs, n=400):
    "Class names with the left-right pairs of Something-Something at their places"
    names = [f'class {i}' for i in range(n)]
    said = {86: 'Pulling something from left to right', 87: 'Pulling something from right to left',
            93: 'Pushing something from left to right', 94: 'Pushing something from right to left',
            166: 'Turning the camera left while filming something', 167: 'Turning the camera right while filming something'}
    for i, s in said.items(): names[i] = s
    return names


@kind('tdsclip', 'transforms')
def transforms(case, tensors):
    from vidlab.data.annots import mirrored_classes
    from vidlab.data.transforms import Erase, Flip, grey, normalise
    cfg, frames = case['config'], tensors['input/frames'].numpy()
    size, seen = cfg['input_size'], set()
    for name, want in tensors.items():
        op, _, what = name.removeprefix('output/').partition('.')
        if name.startswith('input/'): continue
        if op in ('val', 'test3'):
            tfm = _family(what, size)
            got = tfm(frames)[None] if op == 'val' else [tfm(frames[:1], crop=i, crops=3) for i in range(3)]
            close(name, np.concatenate([normalise(o).reshape(-1, size, size) for g in got for o in ([g] if g.ndim == 4 else g)]), want, case['tolerance'])
        elif op == 'grayscale': assert np.array_equal(grey(frames)[0], want.numpy()), name
        else: assert op == 'random_sized_crop', f'unknown output {name}'
        seen.add(op)
    assert seen or case['cases'], 'nothing to check'
    for c in case['cases']:
        if c['op'] == 'random_sized_crop':
            from vidlab.data.transforms import ClipTransform
            tfm = ClipTransform(size, 'sized', resize='official')
            draw = tfm.draw(*frames.shape[1:3], Python(c['seed']))
            if draw[0]['hw'] == frames.shape[1:3]:                # else the fallback, whose box lies in a resized frame
                assert list(draw[0]['box']) == c['box_left_top_right_bottom'], f"{c}: {draw}"
            want = tensors[f"output/random_sized_crop.{c['seed']}"].numpy()
            got = tfm.apply(frames, draw).permute(0, 2, 3, 1).numpy()
            assert np.abs(got[0].astype(int) - want).max() == 0, f'{c}: pixels differ'
            assert c['all_frames_same']                             # one box: the other frames are what it cuts from them
            for k in range(len(frames)): assert np.array_equal(got[k], tfm.apply(frames[k:k+1], draw)[0].permute(1, 2, 0).numpy())
        elif c['op'] == 'flip_with_label_swap':
            swap = mirrored_classes(_names(c['rows']))
            for r in c['rows']:
                class Said:
                    def random(self): return r['draw']
                on = Flip().draw(8, 8, None, Said())['mirrored']
                assert on == r['flipped'], f'{r}: {on}'
                assert (swap[r['label']] if on else r['label']) == r['label_out'], r
        elif c['op'] == 'random_erasing':
            h, w = c['shape'][-2:]
            box = Erase(c.get('prob', .25)).draw(h, w, None, Python(c['seed']))['box']
            got = None if box is None else [box[1], box[0], box[3], box[2]]
            assert got == c['erased_top_left_bottom_right'], f'{c}: {got}'
        else: raise AssertionError(f'unknown op {c["op"]}')


@kind('tdsclip', 'randaugment')
def randaugment(case, tensors):
    from vidlab.data.transforms import ClipTransform, make_steps, rand_args
    cfg, image = case['config'], tensors['input/image'].numpy()
    step, = make_steps(cfg['policy'])

    def same(ops, name):
        "Both frames of a clip, to the bit (allowed: the case's tolerance, in levels)"
        got = step.apply(np.stack([image, image]), None, ops=ops)
        off = np.abs(got.astype(int) - tensors[name].numpy()[None]).max()
        assert off <= case['tolerance'], f'{name}: {ops} is {off} levels off'

    for c in case['cases']:
        if c['kind'] == 'policy':
            from timm.data.auto_augment import rand_augment_choices
            rule, = make_steps(c['policy'])
            assert (rule.n, rule.p, rule.m, rule.mstd) == (c['num_layers'], c['prob_each'], c['magnitude'], c['magnitude_std'])
            assert rand_augment_choices('rand', increasing=bool(rule.inc)) == c['op_names']
            assert c['interpolation'] == 'bicubic' and c['fill'] == [128]*3
        elif c['kind'] == 'op':
            args = rand_args(c['op'], c['magnitude'], Python(c['sign_seed']))
            close(str(c), list(args), c['args'], 1e-6)
            same([(c['op'], *args)], c['tensor'])
        elif c['kind'] == 'sequence':
            ops = step.draw(*image.shape[:2], None, Python(c['seed']))['ops']
            assert [o[0] for o in ops] == [o[0] for o in c['applied']], f'{c}: {ops}'
            for a, b in zip(ops, c['applied']): close(str(c), list(a[1:]), b[1:], 1e-6)
            same(ops, c['tensor'])
        else: raise AssertionError(f'unknown kind {c["kind"]}')


@kind('tdsclip', 'mixup')
def mixup(case, tensors):
    import torch
    from vidlab.data.transforms import draw_mix, mix_clips
    cfg, x, y = case['config'], tensors['input/x'], tensors['input/labels']
    opts = dict(mixup=cfg.get('mixup_alpha', .8), cutmix=cfg.get('cutmix_alpha', 1.), prob=cfg.get('prob', 1.), switch=cfg.get('switch_prob', .5))
    assert case['cases']
    for c in case['cases']:
        lam, box = draw_mix(*x.shape[-2:], np.random.RandomState(c['seed']), **opts)
        close('lam', lam, c['lam_used'], 1e-7)
        assert (box is not None) == bool(c['use_cutmix'])
        if box: assert [box[1], box[3], box[0], box[2]] == c['box_yl_yh_xl_xh'], f'{c}: {box}'
        v, t = mix_clips(x, y, cfg['classes'], np.random.RandomState(c['seed']), **opts, smoothing=cfg.get('smoothing', .1))
        close(f"x.{c['seed']}", v, tensors[f"output/x.{c['seed']}"], case['tolerance'])
        close(f"target.{c['seed']}", t, tensors[f"output/target.{c['seed']}"], case['tolerance'])
        assert t.dtype == torch.float32


@kind('tdsclip', 'multi_view')
def multi_view(case, tensors):
    import torch
    from vidlab.data.transforms import view_boxes
    from vidlab.tasks import merge_views
    for c in case['cases']:
        if c['kind'] == 'crops':
            boxes = view_boxes(c['image_h'], c['image_w'], c['crop'], c['crops'])
            frames = sorted({o['frame'] for o in c['order']})
            got = [dict(left=b[0], top=b[1], flipped=b[4], frame=f) for b in boxes for f in frames]
            assert got == c['order'], f'{c}: {got}'
        elif c['kind'] == 'merge':
            from vidlab.data.clips import view_number
            logits, labels = torch.tensor(c['logits']), torch.tensor(c['labels'])
            n, views, classes = logits.shape
            assert views == c['clips']*c['crops']
            # samples as the loader gives them, clip after clip; the published order of a video's views is that of `view`
            keys = [(s, view_number(i, c['clips'], c['crops'])) for s in range(n) for i in range(views)]
            assert sorted(keys) == [(s, v) for s in range(n) for v in range(views)]
            rows = torch.stack([logits[s, v] for s, v in keys])
            sids, prob, y = merge_views(dict(sid=torch.tensor([s for s, _ in keys]), logits=rows, label=torch.tensor([labels[s] for s, _ in keys])))
            assert sids.tolist() == list(range(n)) and y.tolist() == labels.tolist()
            close('probabilities', prob, c['probabilities'], case['tolerance'])
            for k in (1, 5):
                if f'top{k}' not in c: continue
                hit = 100*(prob.topk(min(k, classes)).indices == y[:, None]).any(1).float().mean()
                close(f'top{k}', hit, c[f'top{k}'], 1e-4)
            m, t = case['config'].get('num_diff', 5), c['segments']        # row (video, view, segment) begins at its own 3*M channels
            assert c['first_channel_of_each_model_row'] == [3*m*i for i in range(n*views*t)]
        else: raise AssertionError(f'unknown kind {c["kind"]}')
