"""Turn the annotation files of a data set, a table of your own or a folder of videos into one manifest
(one row per clip and caption: id, path, start, end, text, label, split). A second call changes nothing."""
import argparse, filecmp, inspect, os, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from fastcore.script import Param, anno_parser
from vidlab.core import progress, tilde, unknown, write_json
from vidlab.data import annots as A

EXAMPLES = """one example per format (--root: folder of the videos, --annots: of the annotation files if elsewhere):

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
  make_manifest.py lvu --root LVU/videos --annots lvu_1.0 --task genre --missing drop --out lvu_genre.csv
  make_manifest.py shards --root webvid_tars --missing drop --out webvid.parquet  (00000.tar .. of video2dataset)
  make_manifest.py shards --root cc3m --pattern '{00000..00331}.tar' --caption json.caption --out cc3m.parquet
  make_manifest.py table --root clips --annots mine.csv --columns video=path caption=text --out mine_manifest.csv
  make_manifest.py folder --root clips --out clips/manifest.csv                  (no captions: to embed and search)
  make_manifest.py folder --root clips --sidecar txt --out clips/manifest.csv    (captions in name.txt beside name.mp4)
  make_manifest.py classes --root ucf101 --out ucf101/manifest.csv               (class/video or split/class/video)

Paths are written relative to the folder of --out if the videos lie below it, else relative to --root: then name that
root when reading."""

# what each format understands beside --root, --out
_common = ('annots', 'missing', 'missing_limit')
TAKES = dict(msrvtt=(*_common, 'train_csv', 'data_json', 'test_csv', 'captions'), msvd=(*_common, 'splits'),
             lsmdc=(*_common, 'splits'),
             activitynet=(*_common, 'splits'), didemo=(*_common, 'splits'),
             captions=(*_common, 'paragraph', 'split'), frame_folders=(*_common, 'split'), webvid=(*_common, 'split'),
             list=(*_common, 'fields', 'sep', 'header', 'label_offset', 'classes', 'label', 'split', 'template', 'min_frames'),
             kinetics=(*_common, 'classes', 'split'), something=(*_common, 'splits', 'ext', 'template'),
             ucf101=(*_common, 'fold'), hmdb51=(*_common, 'fold'),
             pairs=(*_common, 'split', 'ext', 'sample'), yttemporal=(*_common, 'split'),
             lvu=(*_common, 'splits', 'task', 'durations'),
             shards=('missing', 'missing_limit', 'pattern', 'caption', 'media', 'columns', 'split'),
             table=(*_common, 'columns', 'sep', 'encoding', 'duplicates', 'label', 'classes'),
             folder=('sidecar', 'split', 'frames'), classes=('classes', 'split', 'frames'))


def renames(words: list  # e.g. ['video=path', 'caption=text']
            ) -> dict:   # {'video': 'path', 'caption': 'text'}
    "Column names of the file -> names of the manifest"
    for w in words:
        if w.count('=') != 1 or not all(w.split('=')):
            raise ValueError(f'--columns {w!r}: write name_in_file=name, e.g. video=path; names: '
                             f'{", ".join(A.COLUMNS)}')
    return dict(w.split('=') for w in words)


FILES = dict(table='the table itself (.csv, .tsv, .jsonl or .parquet)', captions='the JSON of captions',
             list='the text file', frame_folders='the lines video,frames', webvid='the CSV', kinetics='the CSV or JSON',
             pairs='the list', yttemporal='the list, or a pattern of .jsonl.gz shards')   # --annots is a file


def narrated(annots, root, missing='error', missing_limit=.5, **options):
    "YT-Temporal from its list or its shards; every annotation is read, and what it lacks is in the report"
    from vidlab.data.asr import Narration, read_yttemporal, unpack_yttemporal
    torn = []
    if annots.endswith(('.jsonl', '.jsonl.gz')):
        shards, annots = annots, Path(root)/'yttemporal.csv'
        torn = [o for o in unpack_yttemporal(shards, root, annots)[1] if o['video'] is None]
    m = read_yttemporal(annots, root, missing=missing, missing_limit=missing_limit, **options)
    notes, bad = Narration().check(m) if missing != 'keep' else ([], {})
    lines = [Narration.tell(o) for o in torn + notes]
    rows = [Narration.tell(o) for o in torn + notes if o['part'] is None]
    A._missing_policy('videos have no usable annotation', rows, len(m) + len(torn), missing, missing_limit, str(annots), root)
    if bad: m = m.select([r for r in range(len(m)) if r not in bad])
    m.report['transcripts_left_out'] = lines
    return m


def read(format, root, annots=None, splits=None, columns=None, sep=None, classes=None, sidecar=None, fields=None,
         pattern=None, **options):
    "The manifest of a format; only options that the format takes arrive here"
    if splits: options['splits'] = splits
    if format in FILES and annots is None: raise ValueError(f'format {format} needs --annots, {FILES[format]}')
    if format == 'folder': return A.from_folder(root, captions=sidecar, **options)
    if format == 'shards':
        from vidlab.data.shards import from_shards
        return from_shards(os.path.join(root, pattern) if pattern else root,
                           columns={k: v for v, k in renames(columns or []).items()}, **options)
    if classes: classes = A.read_class_names(classes)
    if format == 'classes': return A.from_class_folders(root, classes=classes, **options)
    if format == 'yttemporal': return narrated(annots, root, **options)
    if format == 'pairs' and options['ext'] == 'auto': options['ext'] = '.mp4'
    if format == 'lvu' and options['task'] is None: raise ValueError(f'--task is needed, one of: {", ".join(A.LVU)}')
    if options.get('durations') == 'none': options['durations'] = None
    sep = '\t' if sep in ('tab', '\\t') else sep
    if format == 'table':
        return A.Manifest.read(annots, root, columns=renames(columns or []), sep=sep, classes=classes, **options)
    if format == 'list':
        return A.read_list(annots, root, ' '.join(fields or ['path', 'label']), sep, classes=classes, **options)
    if 'ext' in options and options['ext'] == 'none': options['ext'] = None
    if classes: options['classes'] = classes
    return getattr(A, f'read_{format}')(annots or root, root, **options)


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


def main(format: Param('what to read: ' + ' '.join(TAKES), str),
         root: str = None,  # folder of the videos
         out: str = 'manifest.csv',  # manifest to write: .csv, .tsv, .jsonl or .parquet
         annots: str = None,  # folder of the annotation files, default: the root; or the file, where there is one
         splits: Param('only these splits, e.g. train test', str, nargs='+') = None,
         missing: Param('videos that are not there: error, drop or keep (do not look)', str) = 'error',
         missing_limit: float = .5,  # stop when more than this share of the videos is missing
         train_csv: str = 'MSRVTT_train.9k.csv',  # msrvtt: ids of the training clips; 'none': no train split
         data_json: str = 'MSRVTT_data.json',  # msrvtt: captions of the training clips
         test_csv: str = 'MSRVTT_JSFUSION_test.csv',  # msrvtt: test pairs; 'none': no test split
         captions: str = 'all',  # msrvtt: order of the training rows, all or one (video by video)
         columns: Param('table: columns to rename, as name_in_file=name; shards: more columns, as field=name, e.g. '
                        'json.start=start', str, nargs='+') = None,
         sep: str = None,  # table, list: separator, e.g. ';' or tab (list: default white space)
         encoding: str = 'utf-8',  # table: encoding of a text table
         duplicates: str = 'keep',  # table: equal rows: keep, drop or error
         label: str = 'auto',  # table, list: kind of label: auto, class, several, float or name
         classes: str = None,  # table, list, classes, kinetics: file with one class name per line, in order
         fields: Param('list: what a line holds, default path label; of ' + ' '.join(A.FIELDS), str, nargs='+') = None,
         header: bool = False,  # list: the first line holds names
         template: str = None,  # list, something: names of the pictures of a folder, e.g. 'img_{:05d}.jpg', counted from 1
         min_frames: int = 0,  # list: leave out rows with fewer frames
         ext: str = 'auto',  # something: ending of the files, e.g. .mp4; none: folders of pictures; auto: by version. pairs: of paths without one
         sample: int = 0,  # pairs: only so many rows, drawn as published; 0: all
         task: str = None,  # lvu: relationship, way_speaking, scene, director, genre, writer, year, view_count or like_ratio
         durations: str = 'lvu_durations.csv',  # lvu: file videoid,duration within --annots, or elsewhere; none
         fold: int = 1,  # ucf101, hmdb51: official fold 1, 2 or 3
         label_offset: int = 0,  # list: added to class numbers, -1 for lists that count from 1
         paragraph: bool = False,  # captions: all captions of a video joined to one
         pattern: str = None,  # shards: which ones below the root, e.g. '{00000..00031}.tar'; default: all
         caption: str = 'txt',  # shards: txt or another text member, json.name for a field of the json, none
         media: str = None,  # shards: the member to use where a sample holds several videos or pictures
         sidecar: str = None,  # folder: txt = captions in a text file beside each video
         split: str = None,  # name of the split for all rows, where the files do not name it
         frames: bool = False  # folder, classes: clips are folders of images
         ):
    "Annotation files, a table or a folder -> one manifest and a report beside it."
    given = {k: v for k, v in locals().items() if k not in ('format', 'root', 'out')}
    if format not in TAKES: raise unknown('format', format, TAKES)
    if root is None: raise ValueError('--root is needed: the folder of the videos')
    if not Path(root).is_dir(): raise ValueError(f'--root {root!r}: no such folder')
    if Path(out).suffix.lower() not in A.FORMATS: raise unknown('ending of --out', Path(out).suffix, A.FORMATS)
    for k, v in given.items():
        if k not in TAKES[format] and v != DEFAULTS[k]:
            raise ValueError(f'--{k} has no meaning for format {format}, which '
                             f'takes: ' + ' '.join(f'--{o}' for o in TAKES[format]))
    options = {k: None if v == 'none' and k.endswith(('_csv', 'caption')) else v for k, v in given.items()
               if k in TAKES[format]}
    bar = progress(None, f'make_manifest {format}', 2)
    bar.note = 'reading'; bar.show()
    m = read(format, root, **options)
    bar.step(); bar.note = f'{len(m)} rows, writing'; bar.show()
    new = save(m, out)
    bar.step(); bar.note = ''; bar.close()
    report = Path(out).with_suffix('.report.json')
    write_json(report, dict(format=format, root=str(m.root), rows=len(m), clips=len(m.groups()), splits=m.splits(),
                            hash=m.hash(), label=m.label_kind,
                            classes=m.classes, **m.report))
    gone = m.report.get('missing', [])
    print(f"{tilde(out)}: {m.summary()}{'' if gone else ', missing: 0'}, hash {m.hash()}, "
          f"{'written' if new else 'unchanged'}; report: {tilde(report)}")
    for what in ('missing', 'without_caption', 'transcripts_left_out'):
        if m.report.get(what): print(f"{what.replace('_', ' ')}: {A._some(m.report[what])}")
    inside = Path(root).resolve().is_relative_to(Path(out).resolve().parent)
    if not inside: print(f'the videos do not lie below the manifest: read it with root={tilde(root)!r}')


DEFAULTS = {k: v.default for k, v in inspect.signature(main).parameters.items()}


def cli(argv=None):
    "Command line: errors become one line and exit status 1"
    p = anno_parser(main, prog='make_manifest')
    p.formatter_class, p.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    args = {k: v for k, v in vars(p.parse_args(argv)).items() if k not in ('pdb', 'xtra')}
    try: main(**args)
    except (ValueError, OSError) as e: raise SystemExit(f'make_manifest: {e}')


if __name__ == '__main__': cli()
