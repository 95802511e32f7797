"""Check of STAN's annotation formats: the same samples in the same order, as a manifest."""
import json, os, tempfile
from contextlib import nullcontext
from pathlib import Path

from goldens import kind, sub


def _frame_folders(case, file, root, opts, A):
    "Folders with as many pictures as listed, named as the official template says: the reader finds them all, in order"
    from vidlab.data.files import _natural
    for o in case['items']:
        d = root/o['frame_dir'].removeprefix('DATA/')
        d.mkdir(parents=True, exist_ok=True)
        names = [o['filename_tmpl'].format(i + o['offset']) for i in range(o['total_frames'])]
        for n in names: (d/n).touch()
        assert sorted(os.listdir(d), key=_natural) == names
    m = A.read_frame_folders(file, root)
    return [dict(filename=r['path'], total_frames=int(r['frames'])) for r in map(m.row, range(len(m)))]


def _labels(case, file, root, opts, A):
    several = opts.get('multi_class', False)
    m = A.read_list(file, root, 'path labels' if several else 'path label', sep=opts.get('delimiter', ' ').strip() or None,
                    label_offset=0 if several else opts.get('label_offset', 0),     # several labels are never shifted
                    ext=None, missing='keep')
    return [dict(filename=r['path'], label=r['label']) for r in map(m.row, range(len(m)))]


def _captions(case, file, root, opts, A):
    whole = case['dataset'] == 'LsmdcDataset'
    m = A.read_captions(file, None if whole else root, paragraph=case['dataset'] == 'DidemoDataset', ext=None,
                        missing='keep')
    return [dict(filename=r['path'], text=r['text']) for r in map(m.row, range(len(m)))]


def _tabs(case, file, root, opts, A):
    m = A.read_pairs(file, root, header=False, ext='none', missing='keep')
    return [dict(filename=r['path'], text=r['text']) for r in map(m.row, range(len(m)))]


ROOT_ALONE = ('WeividDataset_filtered', 'ActivityNetVideoDataset', 'CC_Dataset', 'CoCo_Dataset', 'VG_Dataset')     # loaders that know no prefix
READ = dict(CC_Dataset=_tabs, ActivityNetVideoDataset=_frame_folders, ZeroShotClfDataset=_labels, VideoDataset=_labels,
            **dict.fromkeys(['MsrvttDataset', 'DidemoDataset', 'LsmdcDataset', 'WeividDataset_filtered', 'CoCo_Dataset', 'VG_Dataset'], _captions))


def _agrees(key, got, want, classes):
    "Equal, or the multi-hot vector of the classes"
    hot = key == 'label' and isinstance(want, list) and len(want) == classes
    return got == want or hot and want == [float(i in got) for i in range(classes)]


@kind('stan', 'annotations')
def annotations(case, tensors):
    from vidlab.data import annots as A
    for n, c in enumerate(case['cases']):
        name, opts = c['dataset'], c['options']
        with sub(f'{n} {name}'), tempfile.TemporaryDirectory() as d:
            data, file = Path(d)/'DATA', Path(d)/'ann'
            data.mkdir()
            said = c['annotation']
            file.write_text(said if isinstance(said, str) else json.dumps(said), encoding='utf-8')
            prefix = '' if name in ROOT_ALONE else (opts.get('data_prefix') or {}).get('video') or ''
            assert name in READ, f'unknown loader {name}; known: {", ".join(READ)}'
            got = READ[name](c, file, data/prefix, opts, A)
            assert len(got) == len(c['items']), f'{len(got)} samples, expected {len(c["items"])}'
            for g, o in zip(got, c['items']):
                want = next(o[k] for k in ('filename', 'img_path', 'frame_dir') if k in o)
                want = Path(d)/want if want.startswith('DATA/') else Path(want).absolute()
                assert Path(g.pop('filename')) == Path(os.path.normpath(want)), f'{g} is not {o}'
                for k, v in g.items():
                    commas = name == 'CC_Dataset' and k == 'text' and ',' in v and v.replace(',', '') == o[k].replace(',', '')
                    with sub('a comma in a caption') if commas else nullcontext():
                        assert _agrees(k, v, o[k], opts.get('num_classes')), f'{k}: {v}, expected {o[k]}'
