"Render the embedded data set `shapes`: stills, clips, narrated and long videos with their manifests"
from time import time
from fastcore.script import call_parse, Param
from vidlab.core import tilde
from vidlab.data.shapes import KINDS, SPLITS, make_shapes, shapes_folder, shapes_settings


def parse_sizes(words: list  # e.g. ['clips.train=216', 'clips.test=108']
                ) -> dict:   # {'clips': {'train': 216, 'test': 108}}
    "Counts from words of the form kind.split=number"
    out = {}
    for w in words:
        kind, _, rest = w.partition('.')
        split, _, n = rest.partition('=')
        if not n.isdigit() or not kind or not split:
            raise ValueError(f'--sizes {w!r}: write kind.split=number, e.g. clips.train=216; '
                             f'kinds: {", ".join(KINDS)}; splits: {", ".join(SPLITS)}')
        out.setdefault(kind, {})[split] = int(n)
    return out


@call_parse
def main(root: str = None,  # parent folder (default: shapes/ in the cache, $VIDLAB_CACHE or ~/.cache/vidlab)
         kinds: Param('what to render: stills clips narrated long', str, nargs='+') = ('stills', 'clips'),
         seed: int = 0,  # another seed, another set
         workers: int = None,  # threads (default: one per core)
         sizes: Param('counts that differ, as kind.split=number', str, nargs='+') = ()
         ):
    """Render what is missing of the embedded data set; a second call finds it and returns at once.
    Example: python data_tools/make_shapes.py --root shapes --kinds stills clips --sizes clips.train=216"""
    t0 = time()
    try:
        sizes = parse_sizes(sizes)
        had = [k for k in kinds if (shapes_folder(root, seed, sizes)/k/'stamp.json').exists()]
        folder = make_shapes(root, kinds, seed, workers, sizes)
    except (ValueError, OSError) as e: raise SystemExit(f'make_shapes: {e}')
    counts = shapes_settings(seed, sizes)['counts']
    for k in kinds:
        n = ' + '.join(f'{counts[k][s]} {s}' for s in SPLITS)
        print(f'{k}: {n}{" (was there)" if k in had else ""}')
    print(f'{tilde(folder)}: {len(kinds) - len(had)} made, {len(had)} there, {time() - t0:.1f} s')
