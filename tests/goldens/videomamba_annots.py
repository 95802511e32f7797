"""Checks of VideoMamba's annotation kinds: lists, the order of test views, repeated augmentation, LVU labels."""
import tempfile
from pathlib import Path

from goldens import close, kind, sub


def _rows(c, d):
    "The manifest of the lines of a case; paths as they stand in the file"
    from vidlab.data.annots import read_list
    file = Path(d)/'list.txt'
    file.write_text('\n'.join(c['lines']))
    sep, n = c.get('split', ' '), len(c['lines'][0].split(c.get('split', ' ')))
    frames = 'frames' in c['kind'] or 'total_frames' in c or n == 3 and c['lines'][0].split(sep)[1].isdigit() and '.' not in c['lines'][0].split(sep)[0]
    label = 'label' if all(o.split(sep)[-1 if frames else 1].isdigit() for o in c['lines']) else 'target'
    fields = f'path frames {label}' if frames else ' '.join(['path', label] + ['duration']*(n > 2))
    return read_list(file, Path(d)/c['prefix'] if c.get('prefix') else d, fields, sep, ext='.mp4' if 'pretrain' in c['kind'] else None, missing='keep')


def _name(row, d): return str(Path(row['path']).relative_to(d))


def _views(m, d, clips, crops):
    "(name, clip, crop) of every sample of a test, in the published order: clip by clip, crop by crop, video by video"
    from vidlab.data.clips import Clips, view_number
    from vidlab.data.sample import SegmentSampler
    ds = Clips(m, SegmentSampler(4), views=(clips, crops))
    out, seen = [], set()
    for i in range(len(ds)):
        row, view = divmod(i, ds.n_views)
        seen.add((row, view_number(view, clips, crops)))           # what evaluation tells views apart by
        out.append((*divmod(view, crops), int(ds.rows[row])))
    assert len(seen) == len(ds) == len(m)*clips*crops
    return [[_name(m.row(r), d), clip, crop] for clip, crop, r in sorted(out)]


@kind('videomamba', 'annotations')
def annotations(case, tensors):
    import torch
    from vidlab.data.clips import collate
    assert case['cases']
    for n, c in enumerate(case['cases']):
        with sub(f"{n} {c['kind']}"), tempfile.TemporaryDirectory() as d:
            if c['kind'] == 'collate_repeated_aug':
                k = c['num_sample']
                batch = collate([[dict(x=torch.tensor(10.*v + j), label=v, sid=100 + v) for j in range(k)] for v in range(c['videos'])])
                assert [batch[o].tolist() for o in ('x', 'label', 'sid')] == [c['order'], c['labels'], c['index']], batch
                continue
            m = _rows(c, d)
            rows = [m.row(i) for i in range(len(m))]
            got = [_name(r, d) for r in rows], [float(r['target'] if r.get('target') is not None else r['label']) for r in rows]
            if 'clips' in c:
                whole = [o for o in c['clips']]                     # published lists repeat the line's fields
                assert [[a, b] for a, b in zip(*got)] == [[o[0], float(o[-1])] for o in whole], got
                if all(len(o) == 3 for o in whole): assert [int(r['frames']) for r in rows] == [int(o[1]) for o in whole]
            else: assert got == (c['samples'], c['labels']), got
            if 'total_frames' in c: assert [int(r['frames']) for r in rows] == c['total_frames']
            if 'test_order' in c:
                clips, crops = (1 + max(o[i] for o in c['test_order']) for i in (1, 2))
                assert _views(m, d, clips, crops) == c['test_order']


@kind('videomamba', 'lvu_labels')
def lvu_labels(case, tensors):
    from vidlab.data.annots import LVU, likes_target, lvu_line, target_likes, target_views, views_target
    assert case['cases']
    for c in case['cases']:
        task = dict(relation='relationship', speak='way_speaking', like='like_ratio', view='view_count').get(c['task'], c['task'])
        with sub(c['line']):
            got, numbers = lvu_line(task, c['line']), [float(o) for o in c['line'].split()[:2] if o.isdigit()]
            close(c['line'], got.get('target', got.get('label')), c['label'], case['tolerance'])
            assert got['id'] == c['line'].split()[-2]
            if task == 'view_count': close('views', target_views(views_target(numbers[0])), numbers[0], 1e-9)
            if task == 'like_ratio': close('likes', target_likes(likes_target(*numbers)), numbers[0]/sum(numbers), 1e-9)
            assert ('target' in got) == (LVU[task] is None)
