"""Make small copies of a video collection for training: 3 frames per second and a short side of 224 by default, as
CLIP4Clip recommends. Folders and names are kept, audio is dropped, frames are taken at their true times and turned
upright, and portrait clips stay portrait. A copy appears only when it is complete and has been read back, so an
interrupted run goes on where it stopped. A file that cannot be read is reported, never copied.
Numbers measured on compressed videos differ a little from those on the originals: say which ones you used."""
import csv, os, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
import numpy as np
from data_tools.arguments import Param, parser_of

HOLDS_H264 = '.mp4 .m4v .mov .mkv .avi .flv .f4v .ts .m2ts .mts .3gp .3g2'.split()   # other outputs are written as .mp4
COLUMNS = ('source', 'output', 'status', 'reason', 'frames', 'seconds', 'width', 'height', 'bytes_in', 'bytes_out')

EPILOG = """examples:
  compress_videos.py MSRVTT/videos MSRVTT/videos_224             3 fps, short side 224
  compress_videos.py k400 k400_small --fps 8 --short 256 --workers 16
  compress_videos.py clips.csv small --root clips                 the files of a manifest

A suffix is kept if its container can hold H.264 (""" + ' '.join(HOLDS_H264) + """),
else the copy is named .mp4 and the report says so. Sources smaller than the short side are enlarged, sources slower
than --fps repeat frames: every copy has one rate and one short side.
exit code: 0 all there; 1 some failed, listed at the end and in the report; 2 nothing to do or wrong arguments"""


def small_size(width: int,  # of the upright picture
               height: int,
               short: int = 224  # even
               ) -> tuple:  # (width, height), both even
    "Short side `short`, the other one in proportion, rounded down to an even number"
    if width >= height: return max(2, 2*(short*width//height//2)), short
    return short, max(2, 2*(short*height//width//2))


def grid(times: np.ndarray,  # (n,) seconds of the shown frames
         duration: float,  # seconds
         fps: float  # frames per second wanted
         ) -> np.ndarray:  # int64 frame numbers
    "For each grid time k/fps within the video the frame nearest to it, so that content does not move against the clock"
    t = np.arange(max(1, int(np.ceil(duration*fps - 1e-3))))/fps
    at = np.minimum(np.searchsorted(times, t - 1e-9), len(times) - 1)
    before = np.maximum(at - 1, 0)
    return np.where(t - times[before] < times[at] - t, before, at).astype(np.int64)


def _encode(frames, dst, wh, fps, crf):
    "RGB frames -> H.264 without audio; number of frames"
    import av
    from fractions import Fraction
    # AVI has no presentation times: B-frames in it are what makes readers slip
    bare = dst.endswith('.avi')
    n, extra = 0, dict(movflags='+faststart') if Path(dst).suffix in ('.mp4', '.m4v', '.mov') else {}
    with av.open(dst, 'w', options=extra) as out:
        x264 = {'crf': str(crf), 'g': '30', 'threads': '1', **({'bf': '0'} if bare else {})}
        s = out.add_stream('libx264', rate=Fraction(fps).limit_denominator(1001), options=x264)
        s.width, s.height = wh
        s.pix_fmt = 'yuv420p'
        for x in frames:
            f = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), format='rgb24').reformat(format='yuv420p')
            f.pts, f.time_base = n, 1/Fraction(fps).limit_denominator(1001)
            out.mux(s.encode(f)); n += 1
        out.mux(s.encode(None))
    return n


def compress_file(src: str,  # video
                  dst: str,  # copy to write
                  fps: float = 3.,  # frames per second
                  short: int = 224,  # pixels, even
                  crf: int = 23  # x264 quality, smaller is better
                  ) -> dict:  # columns of the report
    "One file, in this process: index, sample, scale, encode, read back, rename"
    from vidlab.data.decode import stream_frames
    from vidlab.data.files import VideoError
    from vidlab.data.index import VideoIndex
    from vidlab.data.index import _index_file
    part = os.path.join(os.path.dirname(dst), f'.{os.path.basename(dst)}.part{os.path.splitext(dst)[1].lower()}')
    try:
        for deep in (False, True):
            rec = _index_file(src, deep) | dict(bytes=os.stat(src).st_size, mtime=os.stat(src).st_mtime_ns)
            ix = VideoIndex(**rec)
            w, h = small_size(ix.width, ix.height, short)
            want = grid(ix.times, ix.duration, fps)
            try:
                n = _encode(stream_frames(ix, want, size=(h, w)), part, (w, h), fps, crf)
                break
            except VideoError:
                if deep: raise                        # second try: with the table of the frames that do decode
        back = _index_file(part, False)
        if (len(back['pts']), back['width'], back['height']) != (len(want), w, h) or n != len(want):
            raise VideoError(src, 'decode',
                             f'the copy reads back as {len(back["pts"])} frames of {back["width"]}x{back["height"]} '
                             f'instead of {len(want)} of {w}x{h}')
        os.replace(part, dst)
    finally:
        if os.path.exists(part): os.unlink(part)
    return dict(reason='; '.join(ix.reasons), frames=n, seconds=round(ix.duration, 3), width=w, height=h,
                bytes_in=os.path.getsize(src), bytes_out=os.path.getsize(dst))


def plan(sources: list,  # videos
         base,  # folder whose layout is kept; None: names only
         out: Path  # output folder
         ) -> dict:  # source -> output
    "Where each copy goes; no two share a name"
    def rel(p):
        below = base is not None and Path(p).is_relative_to(base)
        return os.path.relpath(p, base) if below else os.path.basename(p)
    kept = {p: os.path.join(out, rel(p)) for p in sources}
    taken = {d for p, d in kept.items() if os.path.splitext(d)[1].lower() in HOLDS_H264}
    for p, d in kept.items():
        stem, suffix = os.path.splitext(d)
        if suffix.lower() not in HOLDS_H264:
            kept[p] = next(n for n in (stem + '.mp4', d + '.mp4', *(f'{stem}_{i}.mp4' for i in range(2, 10**6)))
                           if n not in taken)
            taken.add(kept[p])
    if len(set(kept.values())) < len(kept):
        twice = next(d for d in kept.values() if list(kept.values()).count(d) > 1)
        raise ValueError(f'two sources would become {twice!r}: give --root, the folder whose layout is to be kept')
    return kept


def _one(src, dst, options, redo, child, timeout):
    "A row of the report; work is done in the child"
    from vidlab.data.files import VideoError, _stat
    row = dict.fromkeys(COLUMNS, '') | dict(source=src, output=dst)
    if not redo and os.path.exists(dst) and os.path.getsize(dst):
        return row | dict(status='kept', bytes_in=os.path.getsize(src) if os.path.exists(src) else '',
                          bytes_out=os.path.getsize(dst))
    try:
        _stat(src)
        os.makedirs(os.path.dirname(dst), exist_ok=True)
        row |= child.call('data_tools.compress_videos:compress_file', src, dst, *options, timeout=timeout)
    except (VideoError, OSError) as e:
        return row | dict(status='failed', output='', reason=getattr(e, 'reason', None) or str(e))
    suffix = os.path.splitext(src)[1]
    renamed = '' if suffix == os.path.splitext(dst)[1] else f'{suffix} cannot hold H.264: written as .mp4'
    return row | dict(status='made', reason='; '.join(filter(None, (renamed, row['reason']))))


def compress_videos(
    source: Param('folder, manifest (csv, tsv, jsonl, parquet), list of paths (txt), or one video', str),
    out: Param('folder for the copies', str),
    fps: Param('frames per second', float) = 3.,
    short: Param('pixels of the short side, even', int) = 224,
    crf: Param('x264 quality, 0 (best) to 51', int) = 23,
    workers: Param('processes (default: all cores)', int) = None,
    timeout: Param('seconds without a sign of life after which a file fails', float) = 60.,
    root: Param("folder that a manifest's paths are relative to, its layout is kept (default: its own)", str) = None,
    report: Param('csv with one row a file (default: compress_report.csv in the output folder)', str) = None,
    redo: Param('make copies that are already there again', bool) = False,
) -> list:  # rows of the report
    "Make the small copies"
    from concurrent.futures import ThreadPoolExecutor
    from vidlab.machine import cores
    from data_tools.check_videos import TABLES, find, listed
    from vidlab.core import atomic_write, progress, read_json, write_json
    from vidlab.data.child import Crew
    src, out = Path(source).absolute(), Path(out).absolute()
    if not src.exists(): raise ValueError(f'{source!r}: no such file or folder')
    if not 0 < fps <= 240: raise ValueError(f'--fps {fps}: above 0, at most 240')
    if short < 2 or short % 2:
        raise ValueError(f'--short {short}: an even number (H.264 with 4:2:0 colour has even sizes)')
    if not 0 <= crf <= 51: raise ValueError(f'--crf {crf}: 0 to 51')
    if workers is not None and workers < 1: raise ValueError(f'--workers {workers}: at least 1')
    if src.resolve() == out.resolve():
        raise ValueError(f'{str(out)!r} is the source: the copies need a folder of their own')
    if src.is_dir():
        sources, base = [p for p in find(src) if not os.path.isdir(p) and not Path(p).is_relative_to(out)], src
    elif src.suffix.lower() in (*TABLES, '.txt', '.lst'):
        sources, base = listed(src, root), Path(root or src.parent).absolute()
    else: sources, base = [str(src)], src.parent
    if not sources: raise ValueError(f'{source!r}: no videos in it')
    made_with, stamp = dict(fps=fps, short=short, crf=crf), out/'.compress.json'
    if stamp.exists() and read_json(stamp) != made_with and not redo:
        raise ValueError(f'{str(out)!r} holds copies made with {read_json(stamp)}, not {made_with}: '
                         'take another folder, or --redo')
    out.mkdir(parents=True, exist_ok=True)
    write_json(stamp, made_with)
    targets = plan([os.path.abspath(p) for p in sources], base, out)
    bar, counts = progress(desc='compressed', total=len(targets)), dict(made=0, kept=0, failed=0)
    with Crew() as crew, ThreadPoolExecutor(min(workers or cores(), len(targets))) as pool:
        def work(pair):
            row = _one(*pair, (fps, short, crf), redo, crew(), timeout)
            counts[row['status']] += 1
            bar.note = ' '.join(f'{v} {k}' for k, v in counts.items()); bar.step()
            return row
        rows = list(pool.map(work, targets.items()))
    bar.close()
    with atomic_write(report or out/'compress_report.csv') as f:
        w = csv.writer(f)
        w.writerow(COLUMNS)
        for r in rows:
            w.writerow([str(r[k]).encode('utf-8', 'backslashreplace').decode() for k in COLUMNS])
    return rows


def main(args=None) -> int:
    "Command line; returns the exit code"
    a = vars(parser_of(compress_videos, __doc__, EPILOG).parse_args(args))
    try: rows = compress_videos(**a)
    except ValueError as e: print(f'compress_videos: {e}', file=sys.stderr); return 2
    for r in [r for r in rows if r['status'] == 'failed'][-200:]: print(f'failed  {r["source"]!r}: {r["reason"]}')
    done = [r for r in rows if r['status'] != 'failed']
    size = {k: sum(r[k] or 0 for r in done)/2**20 for k in ('bytes_in', 'bytes_out')}
    count = {k: sum(r['status'] == k for r in rows) for k in ('made', 'kept', 'failed')}
    print(f'{len(rows)} files: {count["made"]} made, {count["kept"]} already there, {count["failed"]} failed; '
          f'{size["bytes_in"]:.1f} MiB -> {size["bytes_out"]:.1f} MiB; '
          f'report: {a["report"] or os.path.join(a["out"], "compress_report.csv")}')
    return int(count['failed'] > 0)


if __name__ == '__main__': sys.exit(main())
