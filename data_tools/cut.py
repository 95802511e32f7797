"""Cut stretches out of videos, exact to the frame: they are encoded anew, so a cut need not wait for a key frame. What is
cut is FILE@start-end, in seconds or as h:mm:ss, or the answers of a search (a CSV with columns path, start and end).
Frames keep their own times, are turned upright, and sound goes along where there is some. A clip appears only when it is
complete; one that is there already is left as it is. A stretch that cannot be read is reported, the others are cut."""
import os, re, sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
import numpy as np
from data_tools.arguments import Param, parser_of

EPILOG = """examples:
  cut.py holiday.mp4@12-15.5 --out dive.mp4
  cut.py a.mp4@1:02-1:10 b.mp4@3- --out clips        to the end; a folder gets a.mp4 as a_62-70.mp4
  cut.py outputs/search/<run>/figs/answers.csv --out clips --most 5

As a command of vidlab also out=clips instead of --out clips.
exit code: 0 all there; 1 some failed, each with its reason; 2 nothing to do or wrong arguments"""


def stretches(words: list,  # FILE@start-end, or CSV files of answers
              most: int = 0  # rows of a CSV; 0: all
              ) -> list:  # (path, start, end); None: open
    "What is to be cut"
    import pandas as pd
    from vidlab.search import parse_clip
    out = []
    for w in words:
        if w.lower().endswith('.csv'):
            t = pd.read_csv(w)
            if lost := {'path', 'start', 'end'} - set(t): raise ValueError(f'{w}: no column {", ".join(sorted(lost))}; columns are {", ".join(map(str, t))}')
            rows = t.head(most) if most else t
            out += [(os.path.join(os.path.dirname(w), str(r.path)), float(r.start), float(r.end)) for r in rows.itertuples()]
        else: out.append(parse_clip(w))
    if not out: raise ValueError('nothing to cut: the table has no rows')
    return out


def targets(found: list,  # of `stretches`
            out: str  # a file for one stretch, or a folder
            ) -> list:  # of paths, no two alike
    "Where each clip goes"
    if Path(out).suffix.lower() == '.mp4':
        if len(found) > 1: raise ValueError(f'--out {out}: one file for {len(found)} stretches; give a folder')
        return [Path(out)]
    word = lambda x, instead: instead if x is None else f'{x:.3f}'.rstrip('0').rstrip('.')
    names = [f'{Path(p).stem}_{word(a, "0")}-{word(b, "end")}' for p, a, b in found]
    return [Path(out)/f'{n}{f"_{names[:i].count(n) + 1}" if n in names[:i] else ""}.mp4' for i, n in enumerate(names)]


def _sound(src, first: float, start: float, end: float,  # file; container's time of its first frame; seconds from there
           film):
    "Encode the sound of a stretch into a film that has begun"
    import av
    from fractions import Fraction
    with av.open(str(src)) as c:
        if not c.streams.audio: return
        into = av.AudioResampler('fltp', 'stereo', 48000)
        n, s = 0, film.sound
        c.seek(max(0, int((first + start - .5)*av.time_base)))
        for f in c.decode(audio=0):
            if f.time is None or f.time - first + f.samples/f.sample_rate <= start: continue
            if f.time - first >= end: break
            for g in into.resample(f):
                skip = max(0, round((start - (f.time - first))*48000)) if not n else 0
                left = round((end - start)*48000) - n
                x = g.to_ndarray()[:, skip:skip + max(left, 0)]
                if not x.shape[1]: continue
                g = av.AudioFrame.from_ndarray(np.ascontiguousarray(x), 'fltp', 'stereo')
                g.sample_rate, g.pts, g.time_base = 48000, n, Fraction(1, 48000)
                n += x.shape[1]
                film.file.mux(s.encode(g))
        film.file.mux(s.encode(None))


def cut_clip(src: str, start: float, end: float,  # seconds; None: open
             dst  # .mp4
             ) -> dict:  # frames, seconds
    "Encode the frames that are on screen in a stretch"
    from vidlab.data.decode import stream_frames
    from vidlab.data.files import VideoError, _open
    from vidlab.data.index import index_video
    from vidlab.overlay import pixel_aspect
    from vidlab.viz import Film
    ix = index_video(src)
    a, b = start or 0., ix.duration if end is None else min(end, ix.duration)
    i, j = max(int(np.searchsorted(ix.times, a + 1e-4, 'right')) - 1, 0), int(np.searchsorted(ix.times, b - 1e-4))
    if a >= ix.duration or j <= i: raise VideoError(src, 'cut', f'no frames in {a:g}-{b:g} s: it is {ix.duration:.2f} s long')
    times = np.maximum(ix.times[i:j] - a, 0)
    lasts = np.diff(np.append(times, b - a))
    with Film(dst, ix.height, ix.width, ix.fps, pixel_aspect(ix)) as film:
        heard = not ix.pictures and bool(_has_sound(ix.path))
        if heard: film.sound = film.file.add_stream('aac', rate=48000, layout='stereo')
        for k, x in enumerate(stream_frames(ix, np.arange(i, j))): film.add(x, times[k], lasts[k])
        if heard: _sound(ix.path, float(ix.pts[0])*ix.time_base[0]/ix.time_base[1], a, b, film)
    return dict(frames=j - i, seconds=b - a)


def _has_sound(path):
    import av
    try:
        with av.open(str(path)) as c: return c.streams.audio
    except (av.FFmpegError, OSError): return ()


def cut(
    what: Param('FILE@start-end, or a CSV of answers', str, nargs='+'),
    out: Param('an .mp4 for one stretch, or a folder', str) = 'clips',
    most: Param('rows of a CSV (default: all)', int) = 0,
    redo: Param('cut also what is there already', bool) = False,
) -> list:  # of (path, what happened)
    "Cut them all"
    from vidlab.core import progress
    from vidlab.data.files import ReaderError, VideoError
    found = stretches(what, most)
    done = []
    for (src, a, b), dst in progress(list(zip(found, targets(found, out))), 'cut'):
        if dst.exists() and not redo:
            done.append((dst, 'there already'))
            continue
        if os.path.exists(dst) and os.path.samefile(src, dst): raise ValueError(f'--out {out}: that is the source')
        try:
            got = cut_clip(src, a, b, dst)
            done.append((dst, f'{got["frames"]} frames, {got["seconds"]:.2f} s'))
        except (VideoError, ReaderError, OSError) as e: done.append((dst, f'failed: {e}'))
    return done


def main(args=None) -> int:
    "Command line; returns the exit code"
    words = [f'--{w}' if re.match(r'(out|most)=', w) else w for w in (sys.argv[1:] if args is None else args)]
    try: done = cut(**vars(parser_of(cut, __doc__, EPILOG).parse_args(words)))
    except (ValueError, OSError) as e: print(f'cut: {e}', file=sys.stderr); return 2
    for path, what in done: print(f'{path}  {what}')
    return int(any(w.startswith('failed') for _, w in done))


if __name__ == '__main__': sys.exit(main())
