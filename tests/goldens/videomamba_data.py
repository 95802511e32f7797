"""Checks of the VideoMamba data kinds: frame indices, windows of long videos, test views, draws of the augmentation, mixup."""
import numpy as np

from goldens import close, kind, sub
from goldens.tdsclip_data import Python

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


@kind('videomamba', 'sampling_sparse')
def sampling_sparse(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, t, train = c['num_video_frames'], c['num_frames'], c['mode'] == 'train'
        clip, clips = (c['chunk'], c['test_num_segment']) if c['mode'] == 'test' else (0, 1)
        gen = lambda: Python(c['seed']) if train else None
        got = segments(n, t, train, gen(), 'inclusive', clips).reshape(clips, t)[clip].tolist()
        assert got == c['indices'], f'{c}: {got}'
        assert got == SegmentSampler(t, 'inclusive')(n, 25., None, train=train, gen=gen(), clip=clip, clips=clips).tolist()


@kind('videomamba', 'sampling_lvu_trim')
def sampling_lvu_trim(case, tensors):
    from vidlab.data.sample import SegmentSampler, windows
    assert case['cases']
    for c in case['cases']:
        if c['kind'] == 'windows':
            rows = [r.split(',') for r in c['rows']]
            got = [[path, float(label), *w] for path, label, d in rows for w in windows(float(d), c['trimmed'], c['time_stride'])]
            assert got == c['windows'], f'{c}: {got}'
            assert c['test_len'] % len(got) == 0                 # every window in each of the views
        elif c['kind'] == 'indices':
            n, t, train = c['num_video_frames'], c['num_frames'], c['mode'] == 'train'
            clip, clips = (c['chunk'], c['test_num_segment']) if c['mode'] == 'test' else (0, 1)
            times = np.arange(n)/c['fps']
            with sub('a window behind the end') if int(c['start_s']*c['fps']) >= n else sub('window'):
                got = SegmentSampler(t, 'inclusive')(n, c['fps'], times, c['start_s'], c['end_s'], train, Python(c['seed']) if train else None, clip=clip, clips=clips).tolist()
                assert got == c['indices'], f'{c}: {got}'
        else: raise AssertionError(f'unknown kind {c["kind"]}')


@kind('videomamba', 'sampling_kinetics_dense')
def sampling_kinetics_dense(case, tensors):
    from vidlab.data.sample import DenseSampler, dense
    assert case['cases']
    for c in case['cases']:
        n, t, train, window = c['num_video_frames'], c['clip_len'], c['mode'] == 'train', c['clip_len']*c['frame_sample_rate']
        clip, clips = (c['chunk'], c['test_num_segment']) if c['mode'] == 'test' else (0, 1)
        gen = lambda: np.random.RandomState(c['seed']) if train else None
        got = dense(n, t, window, train, gen(), clips=clips, rule='ends').reshape(clips, t)[clip].tolist()
        assert got == DenseSampler(t, window, rule='ends')(n, 25., None, train=train, gen=gen(), clip=clip, clips=clips).tolist()
        if c['mode'] == 'validation' and n > window:
            early = (n - window)//2                          # the published window ends where it should begin
            assert np.abs(np.array(got) - window - np.array(c['indices'])).max() <= 1 and got[0] == early, f'{c}: {got}'
            with sub('validation window'): assert got == c['indices'], f'{c}: {got}'
        elif c['mode'] == 'test' and clips == 1:
            with sub('one test clip'): assert got == c.get('indices'), f'{c}: {got}'
        else: assert got == c['indices'], f'{c}: {got}'


@kind('videomamba', 'sampling_pretrain')
def sampling_pretrain(case, tensors):
    from vidlab.data.sample import dense, segments

    class AnyStart(np.random.RandomState):
        "The published draw of a dense window includes the last possible start"
        def randint(self, more): return super().randint(more + 1)

    assert case['cases']
    for c in case['cases']:
        n, t, step = c['num_video_frames'], c['num_frames'], c['sampling_rate']
        if c['num_segments'] == 1:
            got, want = dense(n, t, t*step, True, AnyStart(c['seed']), 'hold'), np.array(c['frame_ids'])
            # the published walk never takes a step onto the last frame: it waits on the one before
            with sub('a walk onto the last frame') if (got == n - 1).any() and t > 1 else sub('dense'): assert got.tolist() == want.tolist(), f'{c}: {got}'
            assert (got[got < n - 1] == want[got < n - 1]).all() and (want[got == n - 1] == max(n - 1 - step, want[0])).all(), f'{c}: {got}'
            continue
        t = c['num_segments']                                # a frame of each
        if step > 1: assert not c['frame_ids'], f'{c}: the published reader finds no frames'
        else:
            got = segments(n, t, True, np.random.RandomState(c['seed']), 'floor_zero')
            if n >= t: assert got.tolist() == segments(n, t, True, np.random.RandomState(c['seed']), 'floor').tolist()
            assert got.tolist() == c['frame_ids'], f'{c}: {got}'


@kind('videomamba', 'sampling_ssv2')
def sampling_ssv2(case, tensors):
    from vidlab.data.sample import SegmentSampler, segments
    assert case['cases']
    for c in case['cases']:
        n, t, clips, train = c['num_video_frames'], c['num_segment'], c['test_num_segment'], c['mode'] == 'train'
        video = c['source'] == 'decord'
        assert video or c['source'] == 'raw_frames', f'unknown source {c["source"]}'
        name, base, rule = ('indices', 0, 'floor_zero') if video else ('file_numbers', 1, 'floor_folder')
        gen = np.random.RandomState(c['seed']) if train else None
        if c['mode'] != 'test':
            got = (segments(n, t, train, gen, rule) + base).tolist()
            assert got == c[f'{name}_all'], f'{c}: {got}'
            continue
        assert c['mode'] == 'test'
        # one clip of a test is the first of two (ours: the middle, as in validation); the published reader of videos knows two clips
        by = segments(n, t, rule=rule, clips=max(clips, 2)).reshape(-1, t)[:clips] + base
        with sub('videos with another number of clips than two') if video and clips != 2 else sub('test'):
            assert by.tolist() == c[f'{name}_by_chunk'], f'{c}: {by.tolist()}'
            assert sorted(by.ravel().tolist()) == c[f'{name}_all'], c
            if clips > 1: assert by.tolist() == [(SegmentSampler(t, rule)(n, 25., None, clip=k, clips=clips) + base).tolist() for k in range(clips)]


@kind('videomamba', 'views')
def views(case, tensors):
    from vidlab.data.sample import DenseSampler, SegmentSampler
    from vidlab.data.transforms import ClipTransform, normalise
    cfg, frames = case['config'], tensors['input/frames'].numpy()
    n, clips, crops = len(frames), cfg['test_num_segment'], cfg['test_num_crop']
    t, short, seen = cfg['num_frames'], cfg['short_side_size'], set()
    rules = dict(kinetics_sparse='inclusive', ssv2='floor')
    dense = cfg['dataset'] in ('kinetics', 'kinetics_dense')     # a window of so many frames, as in `sampling_kinetics_dense`
    assert dense or cfg['dataset'] in rules, f'unknown data set {cfg["dataset"]}; known: kinetics, {", ".join(rules)}'
    rate = cfg.get('frame_sample_rate', cfg.get('sampling_rate', 2))
    sampler = DenseSampler(t, t*rate, rule='ends') if dense else SegmentSampler(t, rules[cfg['dataset']])
    for name, want in tensors.items():
        if name.startswith('input/'): continue
        mode, i = name.removeprefix('output/').split('.')
        if mode == 'test':                                   # the crop is as wide as the short side
            clip, crop = divmod(int(i), crops)
            tfm, picks = ClipTransform(short, short=short, resize='opencv'), sampler(n, 25., None, clip=clip, clips=clips)
            got, ids = tfm(frames[picks], crop=crop, crops=crops), [clip, crop]
        else:
            assert mode == 'validation'
            got, ids = ClipTransform(cfg['crop_size'], short=short, resize='opencv')(frames[sampler(n, 25., None)]), []
        odd = 'one crop of a test' if mode == 'test' and crops == 1 else 'one test clip' if dense and mode == 'test' and clips == 1 else \
            'validation window' if dense and mode == 'validation' and n > t*rate else name
        with sub(odd):
            close(name, normalise(got, MEAN, STD).transpose(0, 1), want, case['tolerance'])
        if said := cfg.get('derived', {}).get('label_id_chunk_crop'): assert said[f'{mode}.{i}'][2:] == ids
        seen.add(mode)
    assert seen == set(cfg.get('modes', seen)) and seen


class Crops(Python):
    "The published crops take their largest aspect as 1.3333; a case may say other bounds of area and aspect"
    ratio, scale = (.75, 1.3333), (.08, 1.)
    def uniform(self, a, b):
        return super().uniform(*(self.scale if b == 1 else np.log(self.ratio) if np.isclose(b, np.log(4/3)) else (a, b)))


@kind('videomamba', 'augment_params')
def augment_params(case, tensors):
    from vidlab.data.transforms import ClipTransform, make_steps
    assert case['cases']
    for c in case['cases']:
        gen = Python(c['seed'])
        if c['what'] == 'random_resized_crop':
            gen, tfm = Crops(c['seed']), ClipTransform(8, 'rrc-s0', resize='opencv')
            draws = [tfm.draw(c['height'], c['width'], gen)[0]['box'] for _ in c['i_j_h_w']]
            got, want = [[t, l, b - t, r - l] for l, t, r, b in draws], c['i_j_h_w']
        elif c['what'] == 'multiscale_crop':
            tfm = ClipTransform(c['input_size'], 'msc')
            draws = [tfm.draw(c['image_h'], c['image_w'], gen)[0]['box'] for _ in c['cropw_croph_offw_offh']]
            got, want = [[r - l, b - t, l, t] for l, t, r, b in draws], c['cropw_croph_offw_offh']
        elif c['what'] == 'random_erasing_box':
            step, = make_steps(f"erase-p{c['prob']}")
            draw = step.draw(c['h'], c['w'], None, gen)
            got, want = draw['box'] and [draw['box'][i] for i in (1, 0, 3, 2)], c['top_left_bottom_right']
            frames = step.apply(np.zeros((c['frames'], c['h'], c['w'], 3), np.uint8), ClipTransform(8), **draw)
            assert bool((frames != frames[:1]).any()) == c['frames_differ'], c
        elif c['what'] == 'rand_augment':
            step, = make_steps(c['config'])
            want = c['applied_ops_with_args_per_call']
            got = [[[o[0], list(o[1:])] for o in step.draw(c['size'], c['size'], None, gen)['ops']] for _ in want]
            assert [[o[0] for o in call] for call in got] == [[o[0] for o in call] for call in want], f'{c}: {got}'
            for a, b in zip(sum(got, []), sum(want, [])): close(str(c), a[1], b[1], 1e-9)
            continue
        else: raise AssertionError(f'unknown {c["what"]}')
        assert got == want, f'{c}: {got}'


@kind('videomamba', 'mixup')
def mixup(case, tensors):
    from vidlab.data.transforms import mix_clips
    cfg, x, y = case['config'], tensors['input/x'].transpose(1, 2), tensors['input/target']
    known = {'mode', 'mixup', 'cutmix', 'smoothing', 'prob', 'switch_prob', 'np_seed'}
    assert cfg['runs']
    for i, run in enumerate(cfg['runs']):
        assert set(run) <= known, f'unknown option in {run}'
        opts = dict(mixup=run['mixup'], cutmix=run['cutmix'], prob=run.get('prob', 1.), switch=run.get('switch_prob', .5), smoothing=run.get('smoothing', .1), mode=run['mode'])
        v, t = mix_clips(x, y, cfg['num_classes'], np.random.RandomState(run['np_seed']), **opts)
        # the published box of pairs lies in frames and rows instead of rows and columns
        with sub('pairs with cutmix') if run['mode'] == 'pair' and run['cutmix'] else sub(f'run {i}'):
            close(f'x.{i}', v.transpose(1, 2), tensors[f'output/x.{i}'], case['tolerance'])
            close(f'target.{i}', t, tensors[f'output/target.{i}'], case['tolerance'])
