"""The golden runner's table: which function checks which kind of case.

A module in this folder registers its checks with `@kind(system, name)`; a check takes the case (the parsed JSON) and
its tensors (`weight/..`, `input/..`, `output/..`, `grad/..`; None for a case without a safetensors file) and raises
AssertionError where vidlab disagrees. Everything is read from the case; its name carries no information."""
import importlib, os, pkgutil, sys, traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import warm

KINDS = {}     # (system, kind) -> check
BROKEN = {}    # module -> traceback of its failed import
_listed, _differs = {}, []   # the running case: sub-case -> reason, and what was found to differ


def kind(system, *names):
    "Register the decorated `(case, tensors) -> None` as the check of `(system, name)`"
    def _inner(f):
        for name in names:
            old = KINDS.get((system, name))
            if old is not None and (old.__module__, old.__name__) != (f.__module__, f.__name__):
                raise ValueError(f'golden kind {system}/{name} is checked by both {old.__module__} and {f.__module__}')
            KINDS[system, name] = f
        return f
    return _inner


def load_kinds():
    "Import every module of this folder; one that does not import is remembered in `BROKEN`, the others go on"
    for m in pkgutil.iter_modules(__path__):
        name = f'{__name__}.{m.name}'
        try: importlib.import_module(name)
        except Exception: BROKEN[name] = traceback.format_exc()
    return KINDS


def _array(x):
    if hasattr(x, 'detach'):
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x).numpy()
    x = np.asarray(x)
    if x.dtype.kind not in 'biuf': raise AssertionError(f'not a numeric array: {x.dtype}')
    return x.astype(np.float64)


def close(name, got, expected, tol=0., own=False, unit=1.):
    """Assert max|got - expected| <= tol * max(unit, max|expected|), equal shapes, NaN and inf at the same places.
    `own=True` (gradients): relative to the tensor's own maximum alone. Returns the relative difference."""
    g, e = _array(got), _array(expected)
    assert g.shape == e.shape, f'{name}: shape {g.shape}, expected {e.shape}'
    if not e.size: return 0.
    fin = np.isfinite(e)
    assert np.array_equal(np.isnan(g), np.isnan(e)), f'{name}: NaN at other places than expected'
    assert np.array_equal(g[~fin & ~np.isnan(e)], e[~fin & ~np.isnan(e)]), f'{name}: infinities differ'
    assert np.isfinite(g[fin]).all(), f'{name}: not finite where a finite value is expected'
    if not fin.any(): return 0.
    scale = np.abs(e[fin]).max() if own else max(unit, np.abs(e[fin]).max())
    diff = np.abs(np.where(fin, g, 0) - np.where(fin, e, 0))
    at = np.unravel_index(diff.argmax(), diff.shape)
    rel = float(diff[at]/scale) if scale > 0 else float(diff[at])
    assert diff[at] <= tol*scale, (
        f'{name}: |got - expected| is {diff[at]:.3g} at {tuple(map(int, at))} (got {g[at]:.8g}, '
        f'expected {e[at]:.8g}); allowed {tol:g} * {scale:.3g}')
    return rel


def close_grad(name, got, expected, tol): return close(name, got, expected, tol, own=True)


def only(case, *known):
    "A case with a part that its check does not know is a failure, not a pass"
    more = set(case) - {'system', 'kind', 'case', 'config', 'what', 'tolerance', 'tolerance_note', *known}
    assert not more, f"unknown parts: {', '.join(sorted(more))}; known: {', '.join(known)}"


def part(tensors, prefix):
    "Tensors below a prefix; fp16 is storage only"
    return {k[len(prefix):]: v.float() if str(v.dtype) == 'torch.float16' else v for k, v in tensors.items() if k.startswith(prefix)}


def run_ranks(module, world, folder, timeout=300):
    "Run `python -m module RANK WORLD FOLDER` once per rank, side by side; raises with their logs unless all succeed"
    warm.ranks(['-m', module, '{rank}', world, folder], world, timeout, PYTHONPATH=os.pathsep.join(map(str, (warm.ROOT, warm.ROOT/'tests'))))


@contextmanager
def sub(name):
    """One named sub-case of a case: a failure inside is collected as a known difference when `differs.toml` lists
    (system, kind, name), and raised otherwise"""
    try: yield
    except Exception as e:
        if name not in _listed:
            raise AssertionError(f'{name}: {e if isinstance(e, AssertionError) else repr(e)}') from e
        _differs.append((name, _listed[name]))


def run_case(case, tensors, differs):
    """Run one case. `differs`: the entries of `differs.toml`. Returns the (sub-case, reason) pairs that were found to
    differ; an entry with sub-case "*" covers whatever the check raises."""
    key = case['system'], case['kind']
    if key not in KINDS:
        broken = ''.join(f'\n{k} does not import:\n{v}' for k, v in BROKEN.items())
        raise AssertionError(f"no check for golden kind {key[0]}/{key[1]}; known: "
                             f"{', '.join('/'.join(k) for k in sorted(KINDS))}{broken}")
    _listed.clear(); _differs.clear()
    _listed.update({d['sub']: d['reason'] for d in differs if (d['system'], d['kind']) == key})
    try: KINDS[key](case, tensors)
    except Exception:
        if '*' not in _listed: raise
        _differs.append(('*', _listed['*']))
    return list(_differs)
