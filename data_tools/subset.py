"""A smaller data set from a manifest: some clips of each split with all their captions, their files copied or linked under the
same names, so that what expects the large set reads the small one. The same words give the same clips, on any machine."""
import json, os, shutil, sys
from collections import defaultdict
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, parser_of

EPILOG = """examples:
  subset.py msrvtt.csv small --n 100                        100 clips of each split, by chance
  subset.py k400.csv small --per_class 5 --splits train val
  subset.py msrvtt.csv small --first 20 --splits test       as the table has them
  subset.py mine.csv small --ids wanted.txt --files link    no more room than the table: hard links

Beside manifest.csv there is a list for each split as published code reads them: lists/train.txt with "path label", or
lists/train.json with {path: [captions]}; and classes.txt. Numbers of classes stay those of the large set.

exit code: 0 all there; 1 some files are missing; 2 wrong arguments"""
FILES = ('copy', 'link', 'none')
BESIDE = ('.txt', '.srt', '.vtt', '.json')      # captions and subtitles that go with a file of the same name


def wanted(ids: list  # ids, or one file with an id a line
           ) -> list:
    "The ids that are asked for"
    from vidlab.data.tables import lines_of
    return lines_of(ids[0]) if len(ids) == 1 and Path(ids[0]).is_file() else list(ids)


def _by_ids(m, ids):
    import numpy as np
    from vidlab.core import unknown
    known = set(m.cols['id'].to_pylist())
    for i in ids:
        if i not in known: raise unknown('id', i, sorted(known))
    return np.isin(np.array(m.cols['id'].to_pylist(), object), ids)


def _chosen(m, per_class, n, first, seed):
    "Some clips of one split, with all rows of each"
    import numpy as np
    from vidlab.core import rng
    if per_class: return m.few_shot(per_class, seed)
    g = m.groups()
    if first: keep = np.argsort(g.first)[:first]
    else: keep = rng(seed, len(g)).permutation(len(g))[:n]
    return m.select(np.isin(g.code, keep))


def choose(m,  # Manifest
           per_class=0, n=0, first=0, ids=(), splits=(), seed=0):  # -> Manifest, its rows in their old order
    "The rows of the small set"
    import numpy as np
    from vidlab.core import unknown
    asked = [k for k, v in dict(per_class=per_class, n=n, first=first, ids=ids).items() if v]
    if len(asked) > 1: raise ValueError(f'--{asked[0]} and --{asked[1]}: one way to choose')
    if min(per_class, n, first) < 0: raise ValueError(f'--{asked[0]}: a number of clips, above 0')
    if not asked and not splits: raise ValueError('what is wanted? --per_class, --n, --first, --ids or --splits')
    there = m.cols['split'].to_pylist() if 'split' in m.cols else [None]*len(m)
    for s in splits:
        if s not in there: raise unknown('split', s, [t for t in dict.fromkeys(there) if t])
    at = np.array([s if s is not None else '' for s in there], object)
    rows = np.zeros(len(m), bool)
    for s in dict.fromkeys(at.tolist()):
        if splits and s not in splits: continue
        part = np.flatnonzero(at == s)
        few = m.select(part)
        if ids: keep = _by_ids(m, ids)[part]
        elif asked: keep = _kept(few, _chosen(few, per_class, n, first, seed))
        else: keep = np.ones(len(part), bool)
        rows[part[keep]] = True
    if not rows.any(): raise ValueError('no clips are left')
    return m.select(rows)


def _kept(m, part):  # (rows,) bool
    import numpy as np
    return np.isin(np.array(m.cols['id'].to_pylist(), object), part.cols['id'].to_pylist())


def places(m  # Manifest
           ) -> tuple:  # the manifest with paths of files below its folder; of each file: from, to
    "Where files come from and go; a member of a tar becomes a file"
    import pyarrow as pa
    from vidlab.data.files import split_member
    moved, inside = {}, m.cols['path'].to_pylist()
    for p in dict.fromkeys(inside):
        member = split_member(p)
        moved[p] = os.path.join(os.path.splitext(member[0])[0], member[1]) if member else p
    if len(set(moved.values())) < len(moved): raise ValueError('two files would get one name: a member of a tar and a file beside it')
    new = m.with_columns(m.cols | dict(path=pa.array([moved[p] for p in inside], pa.large_string())))
    return new, [(os.path.join(m.root, p), to) for p, to in moved.items()]


def _beside(path, to):
    "Captions and subtitles of a file, and transcripts in a folder of its name"
    (stem, _), (new, _) = os.path.splitext(path), os.path.splitext(to)
    return [(stem + e, new + e) for e in BESIDE if os.path.isfile(stem + e)]


def _put(path, to, how):
    "One file; what is there with the same size and time stays"
    from vidlab.data.files import read_member, split_member
    if split_member(path):
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            _whole(to, lambda tmp: tmp.write_bytes(read_member(path)))
        return
    if os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            if os.path.isfile(os.path.join(path, name)): _put(os.path.join(path, name), to/name, how)
        return
    s = os.stat(path)
    if to.exists() and (to.stat().st_size, to.stat().st_mtime_ns) == (s.st_size, s.st_mtime_ns): return
    to.parent.mkdir(parents=True, exist_ok=True)
    _whole(to, lambda tmp: _linked(path, tmp) if how == 'link' else shutil.copy2(path, tmp))


def _linked(path, tmp):
    try: os.link(os.path.realpath(path), tmp)
    except OSError: shutil.copy2(path, tmp)       # another disk


def _whole(to, write):
    tmp = to.with_name(f'.{to.name}.{os.getpid()}.tmp')
    try:
        write(tmp)
        os.replace(tmp, to)
    finally: tmp.unlink(missing_ok=True)


def write_lists(m, out):
    "What published code reads: a list for each split"
    from vidlab.core import atomic_write
    rows = [m.row(i) for i in range(len(m))]
    parts = defaultdict(list)
    for r in rows: parts[r['split'] or 'all'].append(r)
    for split, part in parts.items():
        rel = lambda r: os.path.relpath(r['path'], m.root)
        if m.label_kind == 'class':
            with atomic_write(out/'lists'/f'{split}.txt') as f: f.writelines(f'{rel(r)} {r["label"]}\n' for r in part if r['label'] is not None)
        said = defaultdict(list)
        for r in part:
            if r['text'] is not None: said[rel(r)].append(r['text'])
        if said:
            with atomic_write(out/'lists'/f'{split}.json') as f: f.write(json.dumps(said, ensure_ascii=False, indent=0))
    if m.names:
        with atomic_write(out/'classes.txt') as f: f.writelines(f'{n}\n' for n in m.names)


def subset(
    manifest: Param('manifest of the large set (csv, tsv, jsonl, parquet)'),
    out: Param('folder of the small one'),
    per_class: Param('clips of each class (of each split)', int) = 0,
    n: Param('clips of each split, by chance', int) = 0,
    first: Param('clips of each split, the first ones', int) = 0,
    ids: Param('these ids, or a file with an id a line', str, nargs='+') = (),
    splits: Param('only these splits', str, nargs='+') = (),
    seed: Param('another seed, other clips', int) = 0,
    files: Param('copy | link (hard links; copied where the disk is another) | none (paths stay whole)') = 'copy',
    root: Param("folder that the manifest's paths are relative to (default: its own)") = None,
) -> dict:  # the report
    "Choose, copy, write the table"
    from vidlab.core import progress, unknown, write_json
    from vidlab.data.manifest import Manifest
    if files not in FILES: raise unknown('--files', files, FILES)
    out, whole = Path(out).absolute(), Manifest.read(manifest, root, missing='keep')
    if out.resolve() in (Path(whole.root).resolve(), Path(manifest).resolve().parent):
        raise ValueError(f'{out}: the large set lies there; the small one needs a folder of its own')
    m = choose(whole, per_class, n, first, wanted(ids) if ids else (), splits, seed)
    m.names = whole.names
    lost = []
    if files != 'none':
        new, todo = places(m)
        todo += [b for a, to in todo for b in _beside(a, to)]
        for path, to in progress(todo, 'files'):
            try: _put(path, out/to, files)
            except (OSError, ValueError) as e: lost.append((path, str(e)))
        m = Manifest(new.cols, out, names=whole.names)
    out.mkdir(parents=True, exist_ok=True)
    _table(m, out)
    write_lists(m, out)
    report = dict(source=str(manifest), source_hash=whole.hash(), hash=m.hash(), seed=seed, clips=len(m.groups()), of=len(whole.groups()),
                  rows=len(m), splits=m.splits(), missing=[p for p, _ in lost])
    write_json(out/'manifest.report.json', report)
    return dict(report, lost=lost)


def _table(m, out):
    "The manifest; numbers of labels stay, their names are in classes.txt"
    import pyarrow as pa
    if m.root != out: m = m.with_columns(m.cols | dict(path=pa.array([os.path.join(m.root, p) for p in m.cols['path'].to_pylist()], pa.large_string())))
    m.write(out/'manifest.csv')


def main(args=None) -> int:
    "Command line; returns the exit code"
    a = vars(parser_of(subset, __doc__, EPILOG).parse_args(args))
    try: r = subset(**a)
    except (ValueError, OSError) as e: print(f'subset: {e}', file=sys.stderr); return 2
    for path, why in r['lost'][:200]: print(f'missing  {path}: {why}')
    parts = ', '.join(f'{k} {v}' for k, v in r['splits'].items())
    print(f'{r["clips"]} of {r["of"]} clips, {r["rows"]} rows{f" ({parts})" if parts else ""}, {len(r["lost"])} files missing, '
          f'hash {r["hash"]}; manifest: {os.path.join(a["out"], "manifest.csv")}')
    return int(bool(r['lost']))


if __name__ == '__main__': sys.exit(main())
