"Render the embedded data set `shapes`: stills, clips, narrated and long videos and scenes with their manifests"
import sys
from pathlib import Path
from time import time
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, parser_of

EPILOG = """Example:
  make_shapes.py --root shapes --kinds stills clips --sizes clips.train=216

A second call finds what is there and returns at once.
exit code: 0 all there; 1 wrong arguments or no room"""


def parse_sizes(words: list  # e.g. ['clips.train=216', 'clips.test=108']
                ) -> dict:   # {'clips': {'train': 216, 'test': 108}}
    "Counts from words of the form kind.split=number"
    from vidlab.data.shapes import KINDS, SPLITS
    out = {}
    for w in words:
        kind, _, rest = w.partition('.')
        split, _, n = rest.partition('=')
        if not n.isdigit() or not kind or not split:
            raise ValueError(f'--sizes {w!r}: write kind.split=number, e.g. clips.train=216; '
                             f'kinds: {", ".join(KINDS)}; splits: {", ".join(SPLITS)}')
        out.setdefault(kind, {})[split] = int(n)
    return out


def make_shapes(
    root: Param('parent folder (default: shapes/ in the cache, $VIDLAB_CACHE or ~/.cache/vidlab)', str) = None,
    kinds: Param('what to render: stills clips narrated long scenes', str, nargs='+') = ('stills', 'clips'),
    seed: Param('another seed, another set', int) = 0,
    workers: Param('threads (default: one per core)', int) = None,
    sizes: Param('counts that differ, as kind.split=number', str, nargs='+') = (),
):
    "Render what is missing, and say what was there"
    from vidlab.core import tilde
    from vidlab.data import shapes as S
    t0, sizes = time(), parse_sizes(sizes)
    had = [k for k in kinds if (S.shapes_folder(root, seed, sizes)/k/'stamp.json').exists()]
    folder = S.make_shapes(root, kinds, seed, workers, sizes)
    counts = S.counts_of(S.shapes_settings(seed, sizes))
    for k in kinds:
        n = ' + '.join(f'{counts[k][s]} {s}' for s in S.SPLITS)
        print(f'{k}: {n}{" (was there)" if k in had else ""}')
    print(f'{tilde(folder)}: {len(kinds) - len(had)} made, {len(had)} there, {time() - t0:.1f} s')


def main(args=None) -> int:
    "Command line; returns the exit code"
    try: make_shapes(**vars(parser_of(make_shapes, __doc__, EPILOG).parse_args(args)))
    except (ValueError, OSError) as e: print(f'make_shapes: {e}', file=sys.stderr); return 1
    return 0


if __name__ == '__main__': sys.exit(main())
