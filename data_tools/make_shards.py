"""Pack the videos or pictures of a manifest into tar shards (webdataset), for large collections and slow disks.
A sample holds the file as it is, its captions as key.txt and everything the manifest knows as key.json; beside each
00000.tar lie 00000.parquet (a row a sample, with the place of its file in the tar, by which single videos are read out of
a bucket) and 00000_stats.json. manifest.parquet in the same folder is the manifest
with paths into the shards: train from it as from any other. Which sample goes where is decided beforehand, so an
interrupted run goes on where it stopped, and a second run writes only the shards whose sources have changed."""
import csv, json, os, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
import numpy as np
from data_tools.arguments import Param, parser_of

COLUMNS = ('source', 'shard', 'key', 'status', 'reason', 'bytes')

EPILOG = """examples:
  make_shards.py webvid.parquet webvid_tars                          1,000 samples a shard, in random order
  make_shards.py k400.csv k400_tars --root k400 --samples 0 --megabytes 500
  make_shards.py cc3m.csv cc3m_tars --in_order --split train

reading them:  Manifest.read('webvid_tars/manifest.parquet')  or  from_shards('webvid_tars', caption='json.text'), and
               from_shards('s3://bucket/webvid_tars') where the whole folder lies in a bucket
exit code: 0 all there; 1 some files failed, listed at the end and in the report; 2 nothing to do or wrong arguments"""


def assign(sizes: np.ndarray,  # (n,) bytes of each source, in the order of packing
           samples: int,  # most samples of a shard; 0: any number
           limit: int  # most bytes of a shard, one larger file excepted; 0: any number
           ) -> np.ndarray:  # (n,) shard of each
    "Fill one shard after the other"
    out, shard, count, total = np.zeros(len(sizes), np.int64), 0, 0, 0
    for i, size in enumerate(sizes.tolist()):
        if count and (samples and count == samples or limit and total + size > limit):
            shard, count, total = shard + 1, 0, 0
        out[i], count, total = shard, count + 1, total + size
    return out


def facts(m, rows) -> dict:  # column -> value, or the list of values where there are several rows
    "What the manifest says about a file"
    said = [m.row(int(r)) for r in rows]
    out = {k: [o.get(k) for o in said] for k in m.cols if k != 'path'}
    return {k: v[0] if len(v) == 1 else v for k, v in out.items() if any(o is not None for o in v)}


def sample(key, source, known):
    "What webdataset writes: the file, its captions, and the rest as json"
    with open(source, 'rb') as f: data = f.read()
    ending = os.path.splitext(source)[1][1:].lower()
    text = known.get('text') or []
    text = [text] if isinstance(text, str) else [o for o in text if o]
    return {'__key__': key, ending: data, 'json': json.dumps(known, ensure_ascii=False).encode()} | (
        {'txt': '\n'.join(text).encode()} if text else {})


def pack(tar: Path,  # shard to write
         todo: list,  # (key, source, facts)
         mark: str  # hash of what it is made from
         ) -> list:  # rows of the report
    "One shard with its table and its statistics; the statistics come last and say that it is complete"
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset as wds
    from vidlab.core import atomic_write, write_json
    from vidlab.data.files import scan_tar
    rows, table = [], []
    with atomic_write(tar, 'wb') as f, wds.TarWriter(f, mtime=0., encoder=False) as w:
        for key, source, known in todo:
            row = dict(source=source, shard=tar.name, key=key, status='packed', reason='', bytes=0)
            try: s = sample(key, source, known)
            except OSError as e: rows.append(row | dict(status='failed', reason=e.strerror or str(e))); continue
            w.write(s)
            ending = next(k for k in s if k not in ('__key__', 'json', 'txt'))
            table.append(dict(key=key, member=f'{key}.{ending}', bytes=len(s[ending]), caption=s.get('txt', b'').decode(),
                              json=s['json'].decode()))
            rows.append(row | dict(bytes=len(s[ending])))
    place = {name: at for name, at, _ in scan_tar(str(tar))[0]}
    df = pd.DataFrame(table, columns=['key', 'member', 'bytes', 'caption', 'json'])
    df.insert(2, 'offset', [place[m] for m in df['member']])
    said = pa.Table.from_pandas(df, preserve_index=False).replace_schema_metadata(dict(tar_bytes=str(tar.stat().st_size)))
    with atomic_write(tar.with_suffix('.parquet'), 'wb') as f: pq.write_table(said, f)
    failed = [r for r in rows if r['status'] == 'failed']
    write_json(stats_of(tar), dict(count=len(rows), successes=len(table), failed=len(failed), made_from=mark,
                                   bytes=tar.stat().st_size, status_dict={r: sum(o['reason'] == r for o in failed)
                                                                          for r in {o['reason'] for o in failed}}))
    return rows


def stats_of(tar): return tar.with_name(tar.stem + '_stats.json')


def complete(tar, mark):
    "Is the shard there, whole, made from the same sources, and with a table that says where its files lie?"
    import pyarrow.parquet as pq
    from vidlab.core import read_json
    if not tar.exists() or not stats_of(tar).exists() or not tar.with_suffix('.parquet').exists(): return False
    try: s = read_json(stats_of(tar))
    except ValueError: return False
    if 'offset' not in pq.read_schema(tar.with_suffix('.parquet')).names: return False
    return s.get('made_from') == mark and s.get('bytes') == tar.stat().st_size


def usable(path):
    "(bytes, mtime, None), or (0, 0, why it cannot be packed)"
    try: st = os.stat(path)
    except OSError as e: return 0, 0, e.strerror or str(e)
    if os.path.isdir(path): return 0, 0, 'a folder of pictures; a shard holds files'
    if not os.path.splitext(path)[1]: return 0, 0, 'a file name without an ending'
    return (st.st_size, st.st_mtime_ns, None) if st.st_size else (0, 0, 'the file is empty')


def planned(m, files, first, order):
    "[(source, rows of the manifest, (bytes, mtime, None))] of what can be packed, in order, and the report of the rest"
    rows = np.split(np.argsort(files, kind='stable'), np.cumsum(np.bincount(files))[:-1])
    todo, bad = [], []
    for i in order.tolist():
        source = m.row(int(first[i]))['path']
        size, mtime, why = usable(source)
        if why: bad.append(dict.fromkeys(COLUMNS, '') | dict(source=source, status='failed', reason=why, bytes=0))
        else: todo.append((source, rows[i], (size, mtime)))
    return todo, bad


def make_shards(
    source: Param('manifest: csv, tsv, jsonl or parquet', str),
    out: Param('folder for the shards', str),
    root: Param("folder that the manifest's paths are relative to (default: its own)", str) = None,
    samples: Param('most samples of a shard; 0: as many as --megabytes allows', int) = 1000,
    megabytes: Param('most megabytes of a shard; 0: any number', int) = 2000,
    split: Param('only this split', str) = None,
    in_order: Param('keep the order of the manifest instead of mixing it once for all', bool) = False,
    seed: Param('of the mixing', int) = 0,
    workers: Param('shards written at a time', int) = 1,
    report: Param('csv with one row a file (default: shards_report.csv in the output folder)', str) = None,
) -> list:  # rows of the report
    "Write the shards"
    from concurrent.futures import ThreadPoolExecutor
    from vidlab.core import atomic_write, progress, rng, text_hash
    from vidlab.data.manifest import Manifest
    from vidlab.data.tables import FORMATS
    if Path(source).suffix.lower() not in FORMATS: raise ValueError(f'{source!r}: a manifest ends in {" ".join(FORMATS)}')
    if samples < 0 or megabytes < 0 or not (samples or megabytes):
        raise ValueError(f'--samples {samples} --megabytes {megabytes}: from 0 on, and not both 0')
    if workers < 1: raise ValueError(f'--workers {workers}: at least 1')
    m = Manifest.read(source, root, missing='keep')
    if split: m = m.split(split)
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    path = m.column('path').dictionary_encode()
    files = path.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    n = len(path.dictionary)
    first = np.unique(files, return_index=True)[1]
    todo, bad = planned(m, files, first, np.arange(n) if in_order else rng(seed).permutation(n))
    if not todo: raise ValueError(f'{source!r}: none of its {n} files can be packed: {bad[0]["source"]}: {bad[0]["reason"]}')
    shard = assign(np.array([t[2][0] for t in todo]), samples, megabytes << 20)
    groups = np.split(np.arange(len(todo)), np.flatnonzero(np.diff(shard)) + 1)
    wide = max(5, len(str(len(groups) - 1)))
    bar, counts = progress(desc='shards', total=len(groups)), dict(written=0, kept=0)

    def one(g):
        s = int(shard[g[0]])
        tar = out/f'{s:0{wide}}.tar'
        items = [(f'{s:0{wide}}{j:06}', todo[i][0], facts(m, todo[i][1])) for j, i in enumerate(g)]
        mark = text_hash(json.dumps([items, [todo[i][2] for i in g]]))
        new = not complete(tar, mark)
        rows = pack(tar, items, mark) if new else [dict(source=p, shard=tar.name, key=k, status='kept', reason='',
                                                        bytes=todo[i][2][0]) for (k, p, _), i in zip(items, g)]
        counts['written' if new else 'kept'] += 1
        bar.note = ' '.join(f'{v} {k}' for k, v in counts.items()); bar.step()
        return rows

    with ThreadPoolExecutor(workers) as pool: done = [r for rows in pool.map(one, groups) for r in rows]
    bar.close()
    finish(m, out, todo, done, {f'{s:0{wide}}' for s in range(len(groups))})
    rows = done + bad
    with atomic_write(report or out/'shards_report.csv') as f:
        w = csv.writer(f)
        w.writerow(COLUMNS)
        for r in rows: w.writerow([str(r[k]).encode('utf-8', 'backslashreplace').decode() for k in COLUMNS])
    return rows


def finish(m, out, todo, done, names):
    "Shards of an earlier, larger plan go; the manifest with paths into the shards"
    import pyarrow as pa
    from vidlab.data.manifest import Manifest
    for old in [p for p in out.glob('*.tar') if p.stem.isdigit() and p.stem not in names and stats_of(p).exists()]:
        for p in (old, old.with_suffix('.parquet'), stats_of(old)): p.unlink(missing_ok=True)
    place = np.full(len(m), -1, np.int64)
    for i, (t, r) in enumerate(zip(todo, done)):
        if r['status'] != 'failed': place[t[1]] = i
    rows = np.flatnonzero(place >= 0)
    rows = rows[np.argsort(place[rows], kind='stable')]
    inside = [f"{r['shard']}::{r['key']}{os.path.splitext(r['source'])[1].lower()}" for r in done]
    path = pa.array([inside[i] for i in place[rows]], pa.large_string())
    Manifest(m.select(rows).cols | dict(path=path), out).write(out/'manifest.parquet')


def main(args=None) -> int:
    "Command line; returns the exit code"
    a = vars(parser_of(make_shards, __doc__, EPILOG).parse_args(args))
    try: rows = make_shards(**a)
    except (ValueError, FileNotFoundError) as e: print(f'make_shards: {e}', file=sys.stderr); return 2
    for r in [r for r in rows if r['status'] == 'failed'][-200:]: print(f'failed  {r["source"]!r}: {r["reason"]}')
    count = {k: sum(r['status'] == k for r in rows) for k in ('packed', 'kept', 'failed')}
    shards = len({r['shard'] for r in rows if r['status'] != 'failed'})
    print(f'{len(rows)} files: {count["packed"]} packed, {count["kept"]} already there, {count["failed"]} failed; '
          f'{shards} shards, {sum(r["bytes"] for r in rows)/2**20:.1f} MiB; manifest: '
          f'{os.path.join(a["out"], "manifest.parquet")}; report: '
          f'{a["report"] or os.path.join(a["out"], "shards_report.csv")}')
    return int(count['failed'] > 0)


if __name__ == '__main__': sys.exit(main())
