"""Find the files of a video collection that cannot be read, or not as they claim: every file is indexed (with --deep:
decoded) in a child process with a time limit. Verdicts are cached by path, size and date, so a second call, or one
after an interruption, only looks at what is new."""
import csv, json, os, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, parser_of
from vidlab.data.files import PICTURES, VIDEO
from vidlab.data.decode import audit
from vidlab.data.tables import FORMATS

COLUMNS = ('path', 'verdict', 'reasons', 'n', 'width', 'height', 'fps', 'seconds', 'codec', 'container', 'rotation',
           'discarded', 'damaged', 'how', 'decoders')
TABLES = (*FORMATS, '.json', '.ndjson')

EPILOG = """examples:
  check_videos.py MSRVTT/videos --report report.csv           every video below a folder
  check_videos.py msrvtt.csv --root MSRVTT/videos --deep      the files of a manifest, every frame decoded
  check_videos.py files.txt --workers 4 --report bad.jsonl    a list, one path a line

verdicts: ok; warn (readable, but shorter than promised, damaged, odd timestamps ...); bad (cannot be read);
          unknown (the reader failed, not the file: nothing is known of it)
labels, captions, splits and copies as well: vidlab audit

exit code: 0 no bad file; 1 bad or unknown files, listed at the end and in the report; 2 nothing to check or wrong arguments"""


def find(folder: Path) -> list:
    "Videos and folders of pictures below `folder`, by suffix, in order"
    out = []
    told = lambda e: print(f'cannot enter {e.filename}: {e.strerror}: what lies below is not checked', file=sys.stderr)
    for here, dirs, names in os.walk(folder, onerror=told):
        dirs[:] = sorted(d for d in dirs if not d.startswith('.'))
        names = sorted(n for n in names if not n.startswith('.'))
        out += [os.path.join(here, n) for n in names if os.path.splitext(n)[1].lower() in VIDEO]
        if not any(os.path.splitext(n)[1].lower() in VIDEO for n in names) and sum(n.lower().endswith(PICTURES)
                for n in names) > 1:
            out.append(here)
    return out


def listed(file: Path, root=None) -> list:
    "The paths of a manifest, or of a list (one path a line); relative to `root` or else to the file's folder"
    from vidlab.data.remote import placed
    base = root or file.parent
    if file.suffix.lower() in TABLES: return _columns(file, base)
    lines = [os.fsdecode(line) for line in file.read_bytes().split(b'\n')]
    return list(dict.fromkeys(placed(p.strip('\r'), base) for p in lines if p.strip()))


def _columns(file, base):
    "The paths of a table, without the checks of a manifest"
    from vidlab.data.manifest import our_names
    from vidlab.data.remote import placed
    from vidlab.data.tables import guess_encoding, read_table
    names, cols = read_table(file, encoding='utf-8' if file.suffix.lower() == '.parquet' else guess_encoding(file))
    table = dict(zip(our_names(names, None, file), (c.to_pylist() for c in cols)))
    paths = table.get('path', table.get('id'))
    return list(dict.fromkeys(placed(str(p), base) for p in paths if p))


def write_report(file, rows):
    "One row a file, as .jsonl or .csv; names that are not UTF-8 are escaped"
    from vidlab.core import atomic_write
    def plain(v): return v.encode('utf-8', 'backslashreplace').decode() if isinstance(v, str) else v
    with atomic_write(file) as f:
        if str(file).endswith('.jsonl'):
            for r in rows: f.write(json.dumps({k: r[k] for k in COLUMNS}) + '\n')
            return
        w = csv.writer(f)
        w.writerow(COLUMNS)
        for r in rows:
            w.writerow([plain('; '.join(r[k]) if k == 'reasons' else ' '.join(r[k]) if k == 'decoders' else r[k])
                        for k in COLUMNS])


def check_videos(
    source: Param('folder, manifest (csv, tsv, jsonl, parquet), list of paths (txt), or one video', str),
    deep: Param('decode every frame, not only the packets (finds damage inside pictures; 10-50 times slower)',
                bool) = False,
    workers: Param('child processes (default: all cores)', int) = None,
    timeout: Param('seconds without a sign of life after which a file counts as bad', float) = 20.,
    report: Param('write one row a file to this .csv or .jsonl', str) = None,
    root: Param("folder that a manifest's or list's paths are relative to (default: its own folder)", str) = None,
    fresh: Param('do not use cached verdicts', bool) = False,
) -> list:  # rows of `vidlab.data.decode.audit`
    "Check the videos of a folder, manifest or list"
    from vidlab.core import progress
    src = Path(source)
    if report and not report.endswith(('.csv', '.jsonl')):
        raise ValueError(f'--report {report}: the name must end in .csv or .jsonl')
    if workers is not None and workers < 1: raise ValueError(f'--workers {workers}: at least 1')
    if timeout <= 0: raise ValueError(f'--timeout {timeout}: seconds, above 0')
    if not src.exists(): raise ValueError(f'{source!r}: no such file or folder')
    table = src.is_file() and src.suffix.lower() in (*TABLES, '.txt', '.lst')
    paths = find(src) if src.is_dir() else listed(src, root) if table else [str(src)]
    if not paths:
        raise ValueError(f'{source!r}: no videos in it (looked for {" ".join(sorted(VIDEO))} and folders of pictures)')
    bar, counts = progress(desc='checked', total=len(paths)), dict(ok=0, warn=0, bad=0, unknown=0)
    def each(row):
        counts[row['verdict']] += 1
        bar.note = ' '.join(f'{v} {k}' for k, v in counts.items() if v or k != 'unknown'); bar.step()
    rows = audit(paths, deep=deep, workers=workers, timeout=timeout, cache=not fresh, each=each)
    bar.close()
    if report: write_report(report, rows)
    return rows


def main(args=None) -> int:
    "Command line; returns the exit code"
    a = vars(parser_of(check_videos, __doc__, EPILOG).parse_args(args))
    try: rows = check_videos(**a)
    except (ValueError, FileNotFoundError) as e: print(f'check_videos: {e}', file=sys.stderr); return 2
    worst = [r for r in rows if r['verdict'] != 'ok']
    for r in sorted(worst, key=lambda r: r['verdict'] in ('bad', 'unknown'))[-200:]:
        print(f'{r["verdict"]:4}  {r["path"]!r}: {"; ".join(r["reasons"])}')
    bad, unknown = (sum(r['verdict'] == v for r in rows) for v in ('bad', 'unknown'))
    frames = sum(r['n'] for r in rows)
    print(f'{len(rows)} files: {len(rows) - len(worst)} ok, {len(worst) - bad - unknown} with warnings, {bad} bad'
          + (f', {unknown} unknown' if unknown else '') + '; '
          f'{frames} frames, {sum(r["seconds"] for r in rows)/60:.1f} min'
          + (f'; report: {a["report"]}' if a['report'] else ''))
    return int(bad + unknown > 0)


if __name__ == '__main__': sys.exit(main())
