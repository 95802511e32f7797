"""Turn videos into folders of JPEG pictures, one folder a clip: a folder of videos, or the clips of a manifest (with start
and end only that range). Pictures are upright, in the order they are shown, numbered from 1; clock.json in each folder
keeps their frame rate and times, so that samplers choose the same frames as from the video. manifest.csv in the same
place is the manifest with paths to the folders: train from it as from any other. A folder appears only when it is
complete, so an interrupted run goes on where it stopped. A file that cannot be read is reported and left out."""
import csv, os, shutil, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
import numpy as np
from data_tools.arguments import Param, parser_of

COLUMNS = ('source', 'start', 'end', 'output', 'status', 'reason', 'frames', 'fps', 'width', 'height', 'bytes')

EPILOG = """examples:
  extract_frames.py ssv2.csv ssv2_frames --root ssv2/videos            every frame, img_00001.jpg, img_00002.jpg, ...
  extract_frames.py ucf101 ucf101_frames --short 256 --workers 16      smaller pictures
  extract_frames.py k400.csv k400_frames --fps 8 --template '{:05d}.jpg' --lists
  extract_frames.py didemo.csv didemo_frames --whole                   clips share the folder of their video

reading them:  Manifest.read('ssv2_frames/manifest.csv'), or in a run  data=manifest data_path=ssv2_frames/manifest.csv
--lists writes lines "folder frames label" (train.txt, val.txt, ... by split), as loaders of Something-Something read.
A clip cut out by start and end begins at time 0 in its folder. Samplers that count frames choose the same ones as from
the video; the one-second grid, which counts in whole frames a second, does for whole seconds and whole rates. With
--whole nothing is cut, start and end stay in the manifest, and every sampler chooses the same frames.
exit code: 0 all there; 1 some failed, listed at the end and in the report; 2 nothing to do or wrong arguments"""


def fit(width: int, height: int,  # pixels, upright
        short: int  # 0: as stored
        ) -> tuple:  # (height, width)
    "Size with the short side at most `short`, the other one in proportion; nothing is enlarged"
    if not short or min(width, height) <= short: return height, width
    return max(1, round(height*short/min(width, height))), max(1, round(width*short/min(width, height)))


def _number(x): return f'{x:.3f}'.rstrip('0').rstrip('.')


def folder_names(clips: list  # (path, start, end), distinct; paths relative, nan: open
                 ) -> list:  # folders, relative
    "A folder for each clip: the path without its ending, and the range; with the ending where two would meet"
    from vidlab.data.files import PICTURES, VIDEO
    def name(path, start, end, whole):
        stem, suffix = os.path.splitext(path.replace('.tar::', os.sep))
        if whole or suffix.lower() not in (*VIDEO, *PICTURES): stem += suffix
        if start == start or end == end:
            stem += f'_{_number(start) if start == start else 0}_{_number(end) if end == end else "end"}'
        return stem
    def clashes(names):
        count = {}
        for n in names: count[n] = count.get(n, 0) + 1
        above = {str(p) for n in names for p in Path(n).parents}           # a clip in the folder of another one
        return [count[n] > 1 or n in above for n in names]
    names = [name(*c, False) for c in clips]
    names = [name(*c, True) if bad else n for c, n, bad in zip(clips, names, clashes(names))]
    if any(bad := clashes(names)):
        i = bad.index(True)
        raise ValueError(f'clip {clips[i]}: its folder {names[i]!r} is also that of another clip, or holds it: rename the video')
    return names


def write_frames(src: str, record: dict,  # fields of VideoIndex
                 want: np.ndarray, times, fps: float,  # (n,) frames; their seconds, None: number / fps
                 out: str, size: tuple, template: str, quality: int) -> int:  # bytes
    "In the child: the pictures of a clip and its clock"
    from PIL import Image
    from vidlab.data.decode import stream_frames
    from vidlab.data.index import VideoIndex
    from vidlab.data.files import beat, write_clock
    os.makedirs(out)
    for i, x in enumerate(stream_frames(VideoIndex(**record), want, size), 1):
        Image.fromarray(x).save(os.path.join(out, template.format(i)), quality=quality)
        beat(i)
    write_clock(out, fps, times)
    return sum(e.stat().st_size for e in os.scandir(out))


def extract_clip(src: str, start: float, end: float,  # seconds, nan: open
                 folder: Path,  # to make
                 fps: float, short: int, quality: int, template: str,  # as in `extract_frames`
                 child, timeout: float, row: dict = None  # of the manifest, where the source is a folder of pictures
                 ) -> dict:  # columns of the report
    "One clip: index, choose frames, write them beside, rename"
    from data_tools.compress_videos import grid
    from vidlab.data.files import VideoError
    from vidlab.data.index import index_video
    from vidlab.data.sample import _window
    part = folder.with_name(f'.{folder.name}.part')
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for deep in (False, True):
            ix = index_video(src, deep=deep, timeout=timeout, child=child)
            if ix.how == 'folder':
                from vidlab.data.clips import listed_pictures
                ix = listed_pictures(ix, row or {})
            i, j = _window(ix.times, ix.n, *(None if t != t else t for t in (start, end)))
            times = ix.times[i:j] - ix.times[i]
            want = i + (grid(times, float(times[-1]) + 1/ix.fps, fps) if fps else np.arange(j - i))
            size = fit(ix.width, ix.height, short)
            shutil.rmtree(part, ignore_errors=True)
            try:
                n = child.call('data_tools.extract_frames:write_frames', src, vars(ix), want, None if fps else times,
                               fps or ix.fps, str(part), size, template, quality, timeout=timeout)
                break
            except VideoError:
                if deep: raise                        # second try: with the table of the frames that do decode
        os.replace(part, folder)
    finally: shutil.rmtree(part, ignore_errors=True)
    return dict(reason='; '.join(ix.reasons), frames=len(want), fps=fps or ix.fps, width=size[1], height=size[0], bytes=n)


def _one(src, start, end, folder, options, child, timeout, known):
    "A row of the report"
    from vidlab.data.files import CLOCK, VideoError, _pictures_in, read_clock
    row = dict.fromkeys(COLUMNS, '') | dict(source=src, output=str(folder), start='' if start != start else start,
                                            end='' if end != end else end)
    try:
        if folder.exists() and not (folder/CLOCK).exists() and any(folder.iterdir()):
            raise VideoError(folder, 'open', 'a folder that was not made here is in the way')
        if (folder/CLOCK).exists():
            n = len(_pictures_in(folder))
            return row | dict(status='kept', frames=n, fps=read_clock(folder, n)[0])
        return row | dict(status='made') | extract_clip(src, start, end, folder, *options, child, timeout, known)
    except (VideoError, ValueError, OSError) as e:
        return row | dict(status='failed', output='', reason=getattr(e, 'reason', None) or str(e))


def check_lists(m):
    "Lists need one class for every clip"
    if m.label_kind != 'class': raise ValueError(f'--lists: lines "folder frames label" need one class number a clip; labels here: {m.label_kind}')
    if (m.cols['label'] < 0).any(): raise ValueError(f'--lists: row {int(np.argmax(m.cols["label"] < 0)) + 1} of the manifest has no label')
    odd = next((p for p in m.cols['path'].to_pylist() if any(c.isspace() for c in p)), None)
    if odd is not None: raise ValueError(f'--lists: {odd!r}: a line is split at white space, so names may hold none')


def write_lists(m, out: Path) -> list:  # files
    "The official lists of Something-Something loaders, one a split"
    from vidlab.core import atomic_write
    files = []
    for split in m.splits() or [None]:
        rows = m if split is None else m.split(split)
        files.append(out/f'{split or "list"}.txt')
        with atomic_write(files[-1]) as f:
            for i in rows.groups().first.tolist():
                f.write(f'{rows.cols["path"][i].as_py()} {rows.cols["frames"][i]} {rows.cols["label"][i]}\n')
    return files


def finish(m, out, name, code, names, done, whole, lists):
    "The manifest with paths to the folders, without the clips that failed; and the lists"
    import pyarrow as pa
    from vidlab.data.manifest import Manifest
    good = np.array([r['status'] != 'failed' for r in done])[code]
    if not good.any(): return
    count = np.array([r['frames'] or 0 for r in done], np.int64)[code[good]]
    cols = {k: v for k, v in m.select(good).cols.items() if k not in ('template', 'frames')}
    cols |= dict(path=pa.array([names[c] for c in code[good]], pa.large_string()), frames=count)
    if not whole: cols |= dict(start=np.full(len(count), np.nan), end=np.full(len(count), np.nan))
    new = Manifest(cols, out)
    new.write(out/name)
    if lists: write_lists(new, out)


def clips_of(m, whole):
    "Distinct (path, start, end), the clip of each row, and the first row of each clip"
    open_ = np.full(len(m), np.nan)
    start, end = (open_, open_) if whole else (m.cols['start'], m.cols['end'])
    number, code, first = {}, np.empty(len(m), np.int64), []
    for r, (p, s, e) in enumerate(zip(m.cols['path'].to_pylist(), start.tolist(), end.tolist())):
        c = number.setdefault((p, str(s), str(e)), len(number))
        if c == len(first): first.append((r, (p, s, e)))
        code[r] = c
    return [c for _, c in first], code, [r for r, _ in first]


def sources(source, root, out):
    "The manifest behind the first argument"
    from vidlab.data.manifest import Manifest
    from vidlab.data.sets.folders import from_folder
    from vidlab.data.tables import FORMATS
    src = Path(source)
    if not src.exists(): raise ValueError(f'{source!r}: no such file or folder')
    if src.is_file():
        if src.suffix.lower() not in FORMATS: raise ValueError(f'{source!r}: a folder of videos, or a manifest that ends in {" ".join(FORMATS)}')
        return Manifest.read(src, root, missing='keep')
    if root: raise ValueError('--root goes with a manifest, the paths in a folder are its own')
    if src.resolve() == out.resolve(): raise ValueError(f'{str(out)!r} is the source: the pictures need a folder of their own')
    m = from_folder(src)
    inside = os.path.relpath(out.resolve(), src.resolve()) + os.sep
    return m.select(np.array([not p.startswith(inside) for p in m.cols['path'].to_pylist()], bool))


def extract_frames(
    source: Param('folder of videos, or manifest (csv, tsv, jsonl, parquet)', str),
    out: Param('folder for the folders of pictures', str),
    fps: Param('pictures a second (default 0: every frame)', float) = 0.,
    short: Param('pixels of the short side; smaller videos stay as they are (default 0: as stored)', int) = 0,
    quality: Param('of JPEG, 1 to 100', int) = 90,
    template: Param('names of the pictures, counted from 1', str) = 'img_{:05d}.jpg',
    whole: Param('do not cut clips out: a folder a video, start and end stay in the manifest', bool) = False,
    lists: Param('also write lists "folder frames label", one a split', bool) = False,
    root: Param("folder that a manifest's paths are relative to (default: its own)", str) = None,
    name: Param('name of the manifest in the output folder', str) = 'manifest.csv',
    workers: Param('processes (default: all cores)', int) = None,
    timeout: Param('seconds without a sign of life after which a file fails', float) = 60.,
    report: Param('csv with one row a clip (default: frames_report.csv in the output folder)', str) = None,
    redo: Param('make folders that are already there again', bool) = False,
) -> list:  # rows of the report
    "Write the folders of pictures"
    from concurrent.futures import ThreadPoolExecutor
    from vidlab.machine import cores
    from vidlab.core import atomic_write, progress, read_json, unknown, write_json
    from vidlab.data.child import Crew
    from vidlab.data.files import CLOCK, PICTURES
    from vidlab.data.manifest import checked_template
    from vidlab.data.tables import FORMATS
    out, form = Path(out).absolute(), checked_template(template)
    if os.path.splitext(form)[1].lower() not in PICTURES: raise unknown('ending of --template', os.path.splitext(form)[1], PICTURES)
    if not 0 <= fps <= 240: raise ValueError(f'--fps {fps}: 0 (every frame) to 240')
    if short < 0: raise ValueError(f'--short {short}: pixels, 0 as stored')
    if not 1 <= quality <= 100: raise ValueError(f'--quality {quality}: 1 to 100')
    if workers is not None and workers < 1: raise ValueError(f'--workers {workers}: at least 1')
    if timeout <= 0: raise ValueError(f'--timeout {timeout}: seconds, above 0')
    if os.path.basename(name) != name or os.path.splitext(name)[1].lower() not in FORMATS:
        raise ValueError(f'--name {name!r}: a name without a folder that ends in {" ".join(FORMATS)}')
    m = sources(source, root, out)
    if not len(m): raise ValueError(f'{source!r}: no videos in it')
    if lists: check_lists(m)
    clips, code, first = clips_of(m, whole)
    names = folder_names(clips)
    made_with, stamp = dict(fps=fps, short=short, quality=quality, template=template), out/'.frames.json'
    if stamp.exists() and read_json(stamp) != made_with and not redo:
        raise ValueError(f'{str(out)!r} holds pictures made with {read_json(stamp)}, not {made_with}: take another folder, or --redo')
    out.mkdir(parents=True, exist_ok=True)
    write_json(stamp, made_with)
    for n in names if redo else ():                   # all of them first: an interrupted run must not keep old ones
        if (out/n/CLOCK).exists(): shutil.rmtree(out/n)
    counts = dict(made=0, kept=0, failed=0)
    bar = progress(desc='clips', total=len(clips))
    with Crew() as crew, ThreadPoolExecutor(min(workers or cores(), len(clips))) as pool:
        def work(c):
            known = m.row(first[c])
            row = _one(known['path'], *clips[c][1:], out/names[c], (fps, short, quality, template), crew(), timeout, known)
            counts[row['status']] += 1
            bar.note = ' '.join(f'{v} {k}' for k, v in counts.items()); bar.step()
            return row
        rows = list(pool.map(work, range(len(clips))))
    bar.close()
    finish(m, out, name, code, names, rows, whole, lists)
    with atomic_write(report or out/'frames_report.csv') as f:
        w = csv.writer(f)
        w.writerow(COLUMNS)
        for r in rows: w.writerow([str(r[k]).encode('utf-8', 'backslashreplace').decode() for k in COLUMNS])
    return rows


def main(args=None) -> int:
    "Command line; returns the exit code"
    a = vars(parser_of(extract_frames, __doc__, EPILOG).parse_args(args))
    try: rows = extract_frames(**a)
    except (ValueError, FileNotFoundError) as e: print(f'extract_frames: {e}', file=sys.stderr); return 2
    for r in [r for r in rows if r['status'] == 'failed'][-200:]: print(f'failed  {r["source"]!r}: {r["reason"]}')
    count = {k: sum(r['status'] == k for r in rows) for k in ('made', 'kept', 'failed')}
    print(f'{len(rows)} clips: {count["made"]} made, {count["kept"]} already there, {count["failed"]} failed; '
          f'{sum(r["frames"] or 0 for r in rows)} pictures, {sum(r["bytes"] or 0 for r in rows)/2**20:.1f} MiB written; '
          f'manifest: {os.path.join(a["out"], a["name"])}; '
          f'report: {a["report"] or os.path.join(a["out"], "frames_report.csv")}')
    return int(count['failed'] > 0)


if __name__ == '__main__': sys.exit(main())
