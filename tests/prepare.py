"What many tests and pages start from, made once before they run side by side: embedded clips, a tiny CLIP, and what numba compiles, which is kept beside its source"
import sys
from multiprocessing import get_context

import numpy as np
import torch
from vidlab.data.pixels import LOOKS, MOVES, NUMBA, TONES, operate
from vidlab.data.shapes import make_shapes
from vidlab.data.transforms import rand_args
from vidlab.ssm import causal_conv1d, scan_path, selective_scan
from vidlab.tinyclip import tiny_clip


def scan(dtype):
    x = torch.ones(1, 2, 8, dtype=dtype, requires_grad=True)
    h = causal_conv1d(x, torch.ones(2, 4, dtype=dtype), torch.ones(2, dtype=dtype))
    selective_scan(h, h, -torch.ones(2, 2), h, h, z=h, path='numba').sum().backward()

def usual_scan():
    if scan_path('cpu') == 'numba': scan(torch.float32)

def the_rest():
    rng = np.random.default_rng(0)
    operate(np.zeros((2, 8, 8, 3), np.uint8), [(name, *rand_args(name, 5, rng)) for name in LOOKS + TONES + MOVES])
    scan(torch.bfloat16)

if __name__ == '__main__':
    if NUMBA:
        with get_context('fork' if sys.platform == 'linux' else 'spawn').Pool(2) as both:
            for done in [both.apply_async(f) for f in (usual_scan, the_rest)]: done.wait()         # what fails here fails in a test that says why
    make_shapes()
    tiny_clip()
