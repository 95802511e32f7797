"""Turn the annotation files of a data set, a table of your own or a folder of videos into one manifest
(one row per clip and caption: id, path, start, end, text, label, split). A second call changes nothing."""
import argparse, difflib, filecmp, inspect, os, re, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from vidlab.core import progress, tilde, unknown, write_json
from vidlab.data.manifest import COLUMNS, told_twice
from vidlab.data.remote import is_url
from vidlab.data.tables import FORMATS, some
from vidlab.registry import create, lookup, names, options

EXAMPLES = """
  make_manifest.py msrvtt --root MSRVTT/videos --annots msrvtt_data --train_csv MSRVTT_train.9k.csv --out msrvtt.csv
  make_manifest.py msvd --root MSVD/videos --annots msvd_data --out msvd.csv    (also your videos laid out like MSVD)
  make_manifest.py lsmdc --root LSMDC/videos --annots lsmdc_data --missing drop --out lsmdc.csv
  make_manifest.py activitynet --root ActivityNet/videos --annots anet_data --missing drop --out anet.csv
  make_manifest.py didemo --root DiDeMo/videos --annots didemo_data --out didemo.csv
  make_manifest.py captions --root videos --annots train_9k.json --split train --out train.csv   ({file: captions}, STAN)
  make_manifest.py captions --root DiDeMo --annots test.json --paragraph --split test --out test.csv
  make_manifest.py list --root k400 --annots k400_val.txt --classes k400_classes.txt --out val.csv    (path label)
  make_manifest.py list --root k400 --annots val.csv --sep , --out val_manifest.csv                   (path,label)
  make_manifest.py list --root ssv2 --annots val.txt --fields path frames label --template 'img_{:05d}.jpg' --min_frames 8
                        --classes sth_labels.csv --out val.csv                                     (folders of pictures)
  make_manifest.py kinetics --root k400/val --annots kinetics-400_val.csv --missing drop --out k400_val.csv
  make_manifest.py something --root ssv2/videos --annots ssv2/labels --out ssv2.csv             (labels.json, train.json ..)
  make_manifest.py something --root ssv1/frames --annots ssv1 --template '{:05d}.jpg' --out ssv1.csv
  make_manifest.py ucf101 --root UCF-101 --annots ucfTrainTestlist --fold 1 --out ucf_1.csv
  make_manifest.py hmdb51 --root hmdb51 --annots testTrainMulti_7030_splits --fold 1 --out hmdb_1.csv
  make_manifest.py frame_folders --root anet_frames --annots anet.csv --out anet_manifest.csv   (video,frames)
  make_manifest.py webvid --root WebVid/videos --annots results_2M_train.csv --missing drop --out webvid.parquet
  make_manifest.py pairs --root WebVid/train --annots webvid_train.tsv --split train --out webvid.parquet   (caption, path)
  make_manifest.py pairs --root CC3M/validation --annots cc3m_val.tsv --sample 1000 --split val --out cc3m_val.csv
  make_manifest.py yttemporal --root YTTemporal/videos --annots yttemporal_train.csv --missing drop --out yt.parquet
  make_manifest.py yttemporal --root YTTemporal/videos --annots 'yttemporal180m_*.jsonl.gz' --missing drop --out yt.parquet
                              (the public shards: also written as one annotation per video, with the list yttemporal.csv)
  make_manifest.py breakfast --root BreakfastII_15fps_qvga_sync --annots ViS4mer/data/Breakfast --out breakfast.csv
  make_manifest.py coin --root COIN/videos --annots COIN.json --missing drop --out coin.csv
  make_manifest.py lvu --root LVU/videos --annots lvu_1.0 --topic genre --missing drop --out lvu_genre.csv
  make_manifest.py shards --root webvid_tars --missing drop --out webvid.parquet  (00000.tar .. of video2dataset)
  make_manifest.py shards --root cc3m --pattern '{00000..00331}.tar' --caption json.caption --out cc3m.parquet
  make_manifest.py table --root clips --annots mine.csv --columns video=path caption=text --out mine_manifest.csv
  make_manifest.py folder --root clips --out clips/manifest.csv                  (no captions: to embed and search)
  make_manifest.py folder --root clips --sidecar txt --out clips/manifest.csv    (captions in name.txt beside name.mp4)
  make_manifest.py classes --root ucf101 --out ucf101/manifest.csv               (class/video or split/class/video)
  make_manifest.py shapes --split test --out shapes_test.csv                     (the embedded set)
"""
PLACE = """Paths are written relative to the folder of --out if the videos lie below it, else relative to --root: then name that
root when reading."""
WORDS = dict(table='manifest', classes='class_folders')             # words of this tool -> names of the registry
OLD = dict(lvu=dict(task='topic'))                                  # options by their former name
HERE = dict(audit=True, whole=True)                                 # who makes a manifest once reads everything, of all splits
RUN = dict(missing='videos that are not there: error, drop or keep (do not look)', missing_limit='stop when more than this share of the videos is missing',
           splits='only these splits, e.g. train test')             # what the run gives and means the same everywhere


def formats() -> list:
    "Every word for what can be read: the data sets of the registry, and the tool's own two words"
    return sorted([*names('data'), *WORDS])


def kind_of(default, annotation):
    "Type of an option: as annotated, else as its default"
    return annotation if annotation in (bool, int, float, dict, str) else tuple if isinstance(default, (tuple, list)) else str


def takes(format: str  # of `formats`
          ) -> dict:   # option -> (default, type, comment)
    "The options of a data set, as they are typed here"
    name = WORDS.get(format, format)
    made, known = inspect.signature(lookup('data', name)).parameters, options('data', name, helps=True)
    return {k: (HERE.get(k, o.default), kind_of(o.default, made[k].annotation), RUN.get(k, o.help))
            for k, o in known.items() if k not in ('path', 'root')}


def places(format: str  # of `formats`
           ) -> dict:   # 'path' and 'root', those that it takes -> Option
    "Where the files of a data set lie"
    return {k: o for k, o in options('data', WORDS.get(format, format), helps=True).items() if k in ('path', 'root')}


def renames(words: list  # e.g. ['video=path', 'caption=text']
            ) -> dict:   # {'video': 'path', 'caption': 'text'}
    "Pairs of names: as in the file, as in the manifest"
    for w in words:
        if w.count('=') != 1 or not all(w.split('=')):
            raise ValueError(f'--columns {w!r}: write name_in_file=name, e.g. video=path; names: {", ".join(COLUMNS)}')
    return dict(w.split('=') for w in words)


def add_option(parser, name, default, kind, help):
    "One option of a data set on the command line"
    shown = ' '.join(default) if isinstance(default, (tuple, list)) else '' if default in (None, True, False, inspect.Parameter.empty) else default
    how = dict(default=argparse.SUPPRESS, help=(help + (f' (default: {shown})' if shown != '' else '')).replace('%', '%%'))
    if kind is bool: parser.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, **how)
    elif kind in (int, float): parser.add_argument(f'--{name}', type=kind, metavar='N', **how)
    elif kind in (dict, tuple) or ' ' in shown: parser.add_argument(f'--{name}', nargs='+', metavar='NAME=NAME' if kind is dict else 'WORD', **how)
    else: parser.add_argument(f'--{name}', metavar='WORD', **how)


def parser_of(format: str  # of `formats`
              ) -> argparse.ArgumentParser:
    "The command line of one data set"
    shown = [e for e in re.split(r'\n(?=  make_manifest.py)', EXAMPLES.rstrip()) if e.startswith(f'  make_manifest.py {format} ')]
    p = argparse.ArgumentParser(f'make_manifest {format}', usage='%(prog)s --root FOLDER [--annots FILE or FOLDER] [--out FILE] [options]', description=str(lookup('data', WORDS.get(format, format)).__doc__),
                                epilog='\n'.join(['examples:', *shown, '', PLACE]) if shown else PLACE,
                                allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = places(format)
    p.add_argument('--root', metavar='FOLDER', help='folder of the videos' if 'root' in where else where['path'].help)
    if len(where) == 2: p.add_argument('--annots', metavar='PLACE', help=where['path'].help + ('; default: the root' if in_folder(where['path']) else ''))
    p.add_argument('--out', metavar='FILE', default='manifest.csv', help='manifest to write: .csv, .tsv, .jsonl or .parquet (default: manifest.csv)')
    for name, o in takes(format).items(): add_option(p, name, *o)
    for name in OLD.get(format, ()): p.add_argument(f'--{name}', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return p


def in_folder(o) -> bool:
    "Whether a data set's `path` is a folder, so that it may be the root"
    return o.help.startswith('folder')


def parse(format, argv) -> dict:
    "Options of a data set from the command line; what it does not take is an error that names it"
    p = parser_of(format)
    given, rest = p.parse_known_args(argv)
    if rest:
        known, word = [f'--{k}' for k in vars(p.parse_args([])) | takes(format)], rest[0].split('=')[0]
        near = difflib.get_close_matches(word, known, 1)
        raise ValueError(f'{word} has no meaning for format {format}{f"; did you mean {near[0]}?" if near else "."} It takes: {" ".join(known)}')
    given = vars(given)
    for old, new in OLD.get(format, {}).items():
        if old in given: given[new] = given.pop(old)
    make = {dict: renames, tuple: tuple, str: ' '.join}
    kinds = {k: o[1] for k, o in takes(format).items()}
    return {k: make[kinds[k]](v) if isinstance(v, list) else v for k, v in given.items()}


def files_of(format, root=None, annots=None) -> dict:
    "`path` and `root` of a data set, as far as it takes them"
    where = places(format)
    if root is None and any(o.default is inspect.Parameter.empty for o in where.values()): raise ValueError('--root is needed: the folder of the videos')
    if root is not None and not is_url(root) and not Path(root).is_dir(): raise ValueError(f'--root {root!r}: no such folder')
    if len(where) == 2 and annots is None and not in_folder(where['path']): raise ValueError(f'format {format} needs --annots, {where["path"].help}')
    found = dict(root=root, path=annots or root)
    return {k: found[k] for k in where if found[k] is not None}


def save(m, out):
    "Write the manifest if it differs from what is there; True when it was written"
    out = Path(out)
    new = m.write(out.with_name(f'.{out.stem}.{os.getpid()}{out.suffix}'))
    try:
        if out.exists() and filecmp.cmp(new, out, shallow=False): return False
        os.replace(new, out)
        return True
    finally:
        if new.exists(): new.unlink()


def tell(m, out, report, new):
    "What was made, on the screen"
    print(f"{tilde(out)}: {m.summary()}{'' if m.report.get('missing') else ', missing: 0'}, hash {m.hash()}, "
          f"{'written' if new else 'unchanged'}; report: {tilde(report)}")
    if m.report.get('read_as'): print('columns: ' + ', '.join(f'{theirs} is read as {ours}' for theirs, ours in m.report['read_as'].items()) + '; --columns says otherwise')
    for what in ('missing', 'without_caption', 'transcripts_left_out'):
        if m.report.get(what): print(f"{what.replace('_', ' ')}: {some(m.report[what])}")
    parts = {s: m.split(s) for s in m.splits() if s}
    for line in told_twice(parts, next((s for s in ('train', 'training') if s in parts), '')): print(line)
    if not is_url(m.root) and not m.root.resolve().is_relative_to(Path(out).resolve().parent):
        print(f'the videos do not lie below the manifest: read it with root={tilde(m.root)!r}')


def make_manifest(format: str,  # of `formats`
                  out: str = 'manifest.csv',  # manifest to write
                  root: str = None,  # folder of the videos
                  annots: str = None,  # file or folder of the annotations
                  **given  # options of the data set
                  ):
    "Annotation files, a table or a folder -> one manifest and a report beside it."
    if Path(out).suffix.lower() not in FORMATS: raise unknown('ending of --out', Path(out).suffix, FORMATS)
    files, here = files_of(format, root, annots), {k: v for k, v in HERE.items() if k in takes(format)}
    bar = progress(None, f'make_manifest {format}', 2)
    bar.note = 'reading'
    bar.show()
    m = create('data', WORDS.get(format, format), **files, **here | given)
    bar.step()
    bar.note = f'{len(m)} rows, writing'
    bar.show()
    new = save(m, out)
    bar.step()
    bar.note = ''
    bar.close()
    report = Path(out).with_suffix('.report.json')
    write_json(report, dict(format=format, root=str(m.root), rows=len(m), clips=len(m.groups()), splits=m.splits(),
                            hash=m.hash(), label=m.label_kind, classes=m.classes, **m.report))
    tell(m, out, report, new)


def in_options(text: str, format: str) -> str:
    "An error in the words of the command line: options instead of arguments"
    text = text.replace('Check the root folder', 'Check --root').replace('is the root folder right?', 'is --root right?').replace('name no root', 'leave --root out')
    def pairs(m): return '--columns ' + ' '.join(f'{a}={b}' for a, b in re.findall(r"'([^']*)': '([^']*)'", m[1]))
    text = re.sub(r'columns=\{(.*?)\}', pairs, text)
    for name in takes(format) if format in formats() else (): text = re.sub(rf"\b(?<!-){name}='([^']*)'", rf'--{name} \1', text)
    return text


def overview() -> str:
    "The help of the tool: every data set in one line"
    wide = max(map(len, formats()))
    sets = [f'  {f:{wide}}  {str(lookup("data", WORDS.get(f, f)).__doc__)}' for f in formats()]
    return '\n'.join(['usage: make_manifest FORMAT --root FOLDER [--annots FILE or FOLDER] [--out FILE] [options of the format]', '', __doc__, '',
                      'formats:', *sets, '', 'make_manifest.py FORMAT --help lists the options of a format and shows examples.',
                      '--root: folder of the videos, --annots: of the annotation files if elsewhere, or the file', '', PLACE])


def main(args=None) -> int:
    "Command line; returns the exit code"
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ('-h', '--help'): return print(overview()) or 0
    try:
        if args[0] not in formats(): raise unknown('format', args[0], formats())
        make_manifest(args[0], **parse(args[0], args[1:]))
    except (ValueError, OSError) as e: print(f'make_manifest: {in_options(str(e), args[0])}', file=sys.stderr); return 1
    return 0


if __name__ == '__main__': sys.exit(main())
