"""What a machine with a GPU owes us: every check and time that the CPU cannot give, in under eight minutes, as one table.

    python tests/gpu_day.py [--out DIR] [--device auto|cpu|cuda] [--only steps scan ...] [--limit 440]

Without a GPU the same code runs on the CPU at tiny sizes. A check is a function that yields rows; it ends when its share of the time is
over, an error in it becomes a row, and the exit status is 1 when a row says no. `gpu_day.sh` calls this file.
"""
import argparse, copy, gc, math, os, re, shutil, signal, statistics, subprocess, sys, tempfile, threading, time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))

import vidlab                                   # noqa: before torch, whose threads it settles
import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidlab.attend import Attend, attention_map
from vidlab.core import RunFolder, env_record, tilde
from vidlab.cost import Trial, _clock, in_turns, matmul_peak, ways_cost, ways_of
from vidlab.data.shapes import make_shapes
from vidlab.learner import Learner, NotFinite, make_engine, to_device
from vidlab.optim import make_optimizer
from vidlab.results import noise_task
from vidlab.ssm import PATHS, Scan, _run, scan_inputs, scan_path, scan_paths, scan_status
from vidlab.train import config_from, run

# system -> what is measured on a GPU, and its small sister for a CPU: (recipe, clips, frames)
SYSTEMS = {
    'CLIP4Clip': dict(cuda=('msrvtt9k_seqTransf_b32', 32, 12), cpu=('shapes_seqTransf', 3, 4)),
    'STAN': dict(cuda=('msrvtt9k_stan_b32', 32, 12), cpu=('shapes_stan', 3, 4)),
    'TDS-CLIP': dict(cuda=('ssv2_tdsclip_b16', 16, 8), cpu=('shapes_tdsclip', 3, 4)),
    'VideoMamba': dict(cuda=('k400_videomamba_s_f8', 16, 8), cpu=('shapes_videomamba', 3, 4)),
    'TVTS': dict(cuda=('yttemporal_tvts', 16, 8), cpu=('shapes_tvts', 3, 4)),
}
TINY = ('shapes_meanP', 'shapes_seqLSTM', 'shapes_seqTransf', 'shapes_tightTransf', 'shapes_stan', 'shapes_mugstan', 'shapes_tdsclip', 'shapes_probe',
        'shapes_videomamba', 'shapes_videomamba_pretrain', 'shapes_tvts', 'shapes_tvts_captions', 'shapes_tvts_ft')
PRECISIONS = dict(cuda=('fp32', 'bf16', 'fp16'), cpu=('fp32', 'bf16'))
NEAR = dict(bf16=.05, fp16=.02)                 # of a loss from that in fp32: 8 and 11 bits, logits of a hundred cosines
COLUMNS = ('what', 'system', 'precision', 'value', 'unit', 'against', 'reference', 'ratio', 'ok', 'note')


@dataclass
class Row:
    "A line of the table; `ok`: 'yes', 'no', '' a number without a bound, or 'not here' and the reason in `note`"
    what: str
    system: str = ''
    precision: str = ''
    value: float = math.nan
    unit: str = ''
    against: str = ''           # name of the reference, whose value follows
    reference: float = math.nan
    ok: str = ''
    note: str = ''

    @property
    def ratio(self): return self.value/self.reference if self.reference else math.nan


def said(good): return 'yes' if good else 'no'


CHECKS = {}         # name -> function of a device, and of a function that gives the seconds that are left, which yields rows; its share of the time

def check(share):
    def add(f):
        CHECKS[f.__name__] = f, share
        return f
    return add


def failed(what, e, system=''):
    return Row(what, str(system), ok='no', note=f'failed: {type(e).__name__}: {" ".join(str(e).split())[:300]}')


def each(items, what, left, f, *args):
    "The rows of several things; an error of one does not keep the others from being tried, and none begins that would hardly come to its end"
    longest = 0.
    for item in items:
        if left() < longest:
            yield Row(what, str(item), ok='not here', note=f'{left():.0f} s left, and one took {longest:.0f} s')
            continue
        began = left()
        try: yield from f(item, *args)
        except Exception as e: yield failed(what, e, item)
        longest = max(longest, began - left())
        gc.collect()
        if torch.cuda.is_available(): torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- rows of the checks
def built(system, size):
    "Task and batch of a system; size: 'cuda' | 'cpu'"
    recipe, clips, frames = SYSTEMS[system][size]
    torch.manual_seed(0)
    return noise_task(recipe, clips, frames)


@torch.no_grad()
def loss_of(task, batch, engine):
    "Without dropout, in the engine's precision"
    task.to(engine.device).eval()
    with engine.autocast(): return float(task(to_device(batch, engine.device))['loss'])


class Same:
    "A loader of one batch, for a learner that is led by hand"
    def __init__(self, batch): self.batch = batch
    def __len__(self): return 1


def learner_of(task, batch, precision, device, folder):
    opt = make_optimizer('adamw', [dict(params=[p for p in task.parameters() if p.requires_grad])], lr=2e-5)
    return Learner(task, opt, Same(batch), RunFolder(folder).made(), 1, make_engine(precision, device.type), clip_grad=1.)


def stepped(learn, batch, n):
    "Losses and milliseconds of n steps that were taken, each with the same dropout; at most so many more that the scaler left out"
    losses, ms = [], []
    while len(losses) < n and learn.skipped < 20:
        before = learn.skipped
        torch.manual_seed(0)
        took = _clock(lambda: learn.one_step([batch]), learn.engine.device)
        if learn.skipped > before: continue
        losses.append(float(learn.out['loss']))
        ms.append(took)
    return losses, ms


def overflow_row(learn, batch, system, precision, scale=1e30):
    "A scale that overflows costs a step and changes no weight"
    weights = [p.detach().clone() for p in learn.raw_task.parameters()]
    learn.engine.scaler.update(scale)
    before = learn.skipped
    learn.one_step([batch])
    same = all(torch.equal(a, b) for a, b in zip(weights, learn.raw_task.parameters()))
    return Row('steps left out after an overflow', system, precision, learn.skipped - before, 'steps', 'one', 1, said(same and learn.skipped == before + 1))


def guard_row(learn, batch, system, precision):
    "A batch of nan is refused before it reaches the weights"
    try: learn.one_step([{**batch, 'video': torch.full(batch['video'].shape, math.nan)}])
    except NotFinite: return Row('a batch of nan is refused', system, precision, ok='yes')
    return Row('a batch of nan is refused', system, precision, ok='no', note='the step was taken')


def stepped_rows(system, device):
    "Of one system in every precision"
    n, seen = 6 if device.type == 'cuda' else 3, {}
    start, batch = built(system, device.type)
    for precision in PRECISIONS[device.type]:
        with tempfile.TemporaryDirectory() as folder:
            task = copy.deepcopy(start)
            still = loss_of(task, batch, make_engine(precision, device.type))
            learn = learner_of(task.train(), batch, precision, device, folder)
            losses, ms = stepped(learn, batch, n)
            falls = len(losses) == n and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
            yield Row(f'loss after {n - 1} steps on one batch', system, precision, losses[-1], '', 'before', losses[0], said(falls),
                      f'{learn.skipped} left out by the scaler' if learn.skipped else '')
            seen[precision] = still, statistics.median(ms[1:])
            if learn.engine.scaler is not None: yield overflow_row(learn, batch, system, precision)
            if system == 'CLIP4Clip': yield guard_row(learn, batch, system, precision)
        whole, first = seen['fp32']
        yield Row('step', system, precision, seen[precision][1], 'ms', 'fp32', first)
        if precision != 'fp32': yield Row('loss without dropout', system, precision, still, '', 'fp32', whole, said(abs(still/whole - 1) <= NEAR[precision]))
        del learn, task
    if device.type == 'cpu': yield Row('step', system, 'fp16', ok='not here', note='fp16 needs a GPU')


@check(130)
def steps(device, left):
    "Training steps of the five systems by the learner, in every precision"
    yield from each(SYSTEMS, 'training steps', left, stepped_rows, device)


def gradients(task, batch, device):
    "Loss and norm of the gradient, without dropout"
    task = copy.deepcopy(task).to(device).eval()
    for m in task.modules():
        if isinstance(m, nn.RNNBase): m.train()             # cuDNN knows no backward pass of one that evaluates
    loss = task(to_device(batch, device))['loss']
    loss.backward()
    norms = [p.grad.double().norm() for p in task.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


def same_rows(recipe, device):
    torch.manual_seed(0)
    task, batch = noise_task(recipe, 3, 4)
    on_cpu, here = (gradients(task, batch, d) for d in (torch.device('cpu'), device))
    for what, want, got, tol in zip(('loss', 'norm of the gradient'), on_cpu, here, (1e-4, 1e-3)):
        yield Row(what, recipe, 'fp32', got, '', 'CPU', want, said(abs(got - want) <= tol*abs(want)))


@check(50)
def same(device, left):
    "The small systems in fp32: what the golden cases say of the CPU holds on the device"
    yield from each(TINY, 'the device beside the CPU', left, same_rows, device)


@check(60)
def tests(device, left):
    "The tests that skip themselves where there is no device"
    call = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', 'tests/test_ssm.py', '-k', 'cuda']
    p = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=left())
    last = p.stdout.strip().splitlines()[-1] if p.stdout.strip() else p.stderr[-200:]
    passed = int((re.search(r'(\d+) passed', last) or [0, 0])[1])
    wrong = p.returncode or device.type == 'cuda' and not passed
    yield Row('tests of the Triton kernels', 'ssm', value=passed, unit='passed', ok='no' if wrong else 'yes' if passed else 'not here', note='' if passed and not wrong else last)


def scan_case(device, clips, dtype=torch.float32):
    "Arguments of a scan of VideoMamba-Ti on eight frames, or of a small one"
    K, E, S, L = (2, 384, 16, 1569) if device.type == 'cuda' else (2, 24, 8, 130)
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g).to(device)
    half = lambda *s: r(*s).to(dtype)                   # autocast leaves the parameters in fp32
    return half(K, clips, E, L), half(K, clips, E, L), -r(K, E, S).exp(), half(K, clips, S, L), half(K, clips, S, L), r(K, E), half(K, clips, E, L), r(K, E)


def scanned(path, args):
    "Output and gradients by name"
    t = [v.clone().requires_grad_() for v in args]
    with torch.enable_grad():
        out = _run(path, scan_inputs(*t, softplus=True))[0]
        grads = torch.autograd.grad(out.double().square().sum(), t)
    return dict(zip(('out', *Scan._fields), (out.detach(), *grads)))


def scan_errors(precision, device, paths):
    "Of every path, beside the recurrence in fp64 on the same numbers"
    dtype, tol = dict(fp32=(torch.float32, 1e-3), bf16=(torch.bfloat16, 1e-2))[precision]       # bf16: one rounding of what comes out
    args = scan_case(device, 1, dtype)
    want = scanned('reference', [a.double() for a in args])
    off = lambda a, b: float((a.double() - b).abs().max()/b.abs().max())
    for p in paths:
        got = scanned(p, args)
        for what, names in (('output', ['out']), ('gradients', list(Scan._fields[:8]))):
            worst = max(names, key=lambda k: off(got[k], want[k]))
            far = off(got[worst], want[worst])
            yield Row(f'scan, {what}: largest error', p, precision, far, 'of the maximum', 'reference in fp64', 0., said(far <= tol), worst)


@check(45)
def scan(device, left):
    "Every path of the scan against the recurrence, and its time beside that of the path that is taken"
    mine, status = scan_path(str(device)), scan_status(device)
    yield Row('scan, path that is taken', mine, ok=said(mine == 'triton' or device.type == 'cpu'))
    paths = [p for p in scan_paths(device) if p != 'reference']
    yield from each(('fp32', 'bf16'), 'scan', left, scan_errors, device, paths)
    for clips in (1, 8) if device.type == 'cuda' else (1,):              # one clip: Triton cuts its sequences into spans
        args = scan_case(device, clips)
        ms = 1e3*in_turns({p: lambda p=p, args=args: scanned(p, args) for p in paths}, 3, device=device).median()
        for p in paths: yield Row('scan, forward and backward', p, 'fp32', ms[p], 'ms', mine, ms[mine], note=f'clips: {clips}')
    for p in PATHS:
        if status[p]: yield Row('scan, forward and backward', p, ok='not here', note=status[p])


BACKENDS = dict(flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION, math=SDPBackend.MATH)
HALVES = dict(bf16=torch.bfloat16, fp16=torch.float16)
TOKENS = dict(cuda=dict(frame=(384, 12, 50, 64), clip=(8, 12, 1569, 64)), cpu=dict(frame=(4, 2, 17, 16), clip=(1, 2, 65, 16)))     # B, H, N, Dh

def attended(qkv, how, kernel=None):
    "A pass and its gradients"
    t = [v.detach().clone().requires_grad_() for v in qkv]
    with sdpa_kernel([kernel]) if kernel else nullcontext(): y = Attend(how)(*t)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), t)


def attention_rows(case, device):
    size, precision = case
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(*TOKENS[device.type][size], generator=g).to(device, HALVES[precision]) for _ in range(3)]
    want = attention_map(qkv[0].double(), qkv[1].double()) @ qkv[2].double()
    ways, there = dict(explicit=('explicit',), auto=('auto',), **{n: ('fused', k) for n, k in BACKENDS.items()}), {}
    for name, way in ways.items():
        try: y = attended(qkv, *way)[0]
        except RuntimeError as e:
            none = 'kernel' in str(e).lower()                   # as PyTorch says where it has none for these tensors
            yield Row(f'attention of a {size}', name, precision, ok='not here', note=str(e).splitlines()[0]) if none else failed(f'attention of a {size}', e, name)
            continue
        there[name] = lambda way=way: attended(qkv, *way)
        far = float((y.double() - want).abs().max()/want.abs().max())
        yield Row(f'attention of a {size}: largest error', name, precision, far, 'of the maximum', 'fp64', 0., said(far <= 2e-2))
    del want
    ms = 1e3*in_turns(there, 3, device=device).median()
    for n, v in ms.items(): yield Row(f'attention of a {size}, forward and backward', n, precision, v, 'ms', 'explicit', ms['explicit'])


@check(40)
def attention(device, left):
    "The fused kernels against the softmax written out: errors beside fp64, times in turns"
    cases = [(size, p) for size in TOKENS[device.type] for p in HALVES if p in PRECISIONS[device.type]]
    yield from each(cases, 'attention', left, attention_rows, device)


@check(60)
def loader(device, left):
    "A short run on the embedded data set: how long does the device wait for clips?"
    big = device.type == 'cuda'
    model = dict(clip='ViT-B-32', precision='bf16', max_frames=8) if big else dict(clip='tiny', precision='fp32', max_frames=4)
    with tempfile.TemporaryDirectory() as tmp:
        data = make_shapes(Path(tmp)/'shapes', kinds=('clips',), sizes=dict(clips=dict(train=288 if big else 24, val=6, test=6)))
        cfg = config_from('shapes_meanP', preset='tiny', weights='random', data_path=str(data), val_split='', test_split='', epochs=3 if big else 2, batch_size=36 if big else 12,
                          workers=min(12, os.cpu_count()) if big else 0, device=device.type, cache_frames=0, log_every=1, lr=1e-4, **model)
        with mock.patch.dict(os.environ, VIDLAB_OUTPUTS=tmp): folder = run(cfg)
        rows = [r for r in folder.metrics() if r['kind'] == 'step']
        later = rows[len(rows)//2:]                             # workers are warm
        waited, whole = (statistics.mean(r[k] for r in later) for k in ('data_time', 'step_time'))
        done = folder.status()['state'] == 'done' and all(math.isfinite(r['loss']) for r in rows)
        yield Row('training from video files: wait for a batch', cfg.options['clip'], cfg.precision, 1e3*waited, 'ms', 'whole step', 1e3*whole, said(done),
                  f'{later[-1]["clips_per_s"]:g} clips/s, {cfg.workers} workers')


def peak_rows(system, device):
    clips, precision = (64, 'bf16') if device.type == 'cuda' else (8, 'fp32')
    recipe, _, frames = SYSTEMS[system][device.type]
    r = ways_cost(*noise_task(recipe, clips, frames), ways_of([]), clips, precision=precision, device=device.type).iloc[0]
    yield Row('step, share of the peak', system, precision, r['MFU %'], '%', note=f'{clips} clips: {r["TFLOP"]:.3g} TFLOP, {r["step ms"]:.4g} ms, {r["peak MiB"]:.0f} MiB')


@check(60)
def peak(device, left):
    "How much of the machine's matrix products a step is"
    for precision in ('fp32', 'bf16', 'fp16') if device.type == 'cuda' else ('fp32',):
        yield Row('product of matrices', '', precision, matmul_peak(precision, device.type)/1e12, 'TFLOP/s')
    yield from each(('CLIP4Clip', 'VideoMamba'), 'share of the peak', left, peak_rows, device)


def losses_and_ms(trial, n):
    "Losses of n steps, each with the same dropout, and the time of the later ones"
    losses, ms = [], []
    for _ in range(n):
        torch.manual_seed(0)
        losses.append(float(trial.loss()))
        torch.manual_seed(0)
        ms.append(_clock(trial.step, trial.dev))
    return losses, ms


LARGE = 'CLIP4Clip', 'VideoMamba'                # a graph of many layers takes its time: of the others the small sister shows whether the losses agree

def compiled_rows(system, device):
    from torch._dynamo.utils import counters
    from torch._inductor import config as inductor
    precision, tol, n = ('bf16', 2e-2, 8) if device.type == 'cuda' else ('fp32', 1e-4, 3)
    (start, batch), seen = built(system, device.type if system in LARGE else 'cpu'), {}
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(fallback_random=True):              # the same dropout as without a graph
        for how in ('eager', 'compiled'):
            task, t = copy.deepcopy(start), time.perf_counter()
            if how == 'compiled': task.model.compile()
            seen[how] = losses_and_ms(Trial(task, batch, make_engine(precision, device.type)), n)
            took = time.perf_counter() - t
    (a, ms_a), (b, ms_b) = seen['eager'], seen['compiled']
    off = max(abs(x - y)/abs(x) for x, y in zip(a, b))
    yield Row(f'compiled: largest difference of the loss in {n} steps', system, precision, off, 'of the loss', 'eager', 0., said(off <= tol),
              f'{counters["stats"]["unique_graphs"]} graphs, {sum(counters["graph_break"].values())} breaks, {took:.0f} s with compiling')
    yield Row('compiled: step', system, precision, statistics.median(ms_b[2:]), 'ms', 'eager', statistics.median(ms_a[2:]))


@check(230)
def compiled(device, left):
    "torch.compile against the eager run of the same weights: the losses of some steps, and the time of one"
    if device.type == 'cpu' and not shutil.which('g++'):
        yield Row('compiled: step', ok='not here', note='no g++, which compiles for the CPU')
        return
    # on a CPU one is enough to see that this code runs; tests/test_compile.py has them all
    yield from each(sorted(SYSTEMS, key=lambda s: s not in LARGE) if device.type == 'cuda' else ('CLIP4Clip',), 'compiled', left, compiled_rows, device)


# ------------------------------------------------------------------------------------------------- running them
class TooLong(BaseException): "Not an Exception: no handler on the way may take it for an error of its own"


@contextmanager
def bounded(seconds):
    "`TooLong` where the block stands after so many seconds"
    def stop(sig, frame): raise TooLong(f'longer than its {seconds:.0f} s')
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(.001, seconds))
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def carry_out(name, f, share, device, keep):
    "Give the rows of a check to `keep`; what ends it before its end is a row, too"
    began = time.monotonic()
    left = lambda: began + share - time.monotonic()
    try:
        with bounded(share):
            for row in f(device, left): keep(row)
    except TooLong as e: keep(Row(name, ok='no', note=f'stopped: {e}'))
    except Exception as e: keep(failed(name, e))
    keep(Row(f'{name}: all of it', value=time.monotonic() - began, unit='s', against='its share', reference=share))


def table_of(rows) -> pd.DataFrame:
    return pd.DataFrame([{c: getattr(r, c) for c in COLUMNS} for r in rows], columns=list(COLUMNS))


def shown(v): return '' if v != v else f'{v:.4g}' if isinstance(v, (float, int)) else str(v).replace('|', '/')


def markdown(rows, head) -> str:
    lines = [list(COLUMNS), ['---']*len(COLUMNS), *([shown(getattr(r, c)) for c in COLUMNS] for r in rows)]
    return f'# A day with a GPU\n\n{head}\n\n' + '\n'.join('| ' + ' | '.join(l) + ' |' for l in lines) + '\n'


def heading(device) -> str:
    e = env_record()
    on = f'{e["device"]}' if device.type == 'cuda' else 'CPU: a dry run at tiny sizes, whose times mean nothing'
    return f'{on}; torch {torch.__version__}, {e["cores"]} cores, commit {e["commit"] or "unknown"}, {time.strftime("%Y-%m-%d %H:%M")}'


def write(rows, out, head):
    table_of(rows).to_csv(out/'table.csv', index=False)
    (out/'table.md').write_text(markdown(rows, head), encoding='utf-8')


def run_checks(checks, device, out, limit) -> list:
    "All rows; the table is written after each of them, so that whoever stops this has what there is"
    rows, end, head = [], time.monotonic() + limit, heading(device)
    def keep(row):
        rows.append(row)
        print(' | '.join(x for x in (shown(getattr(row, c)) for c in COLUMNS) if x), flush=True)
        write(rows, out, head)
    for name, (f, share) in checks.items():
        left = end - time.monotonic()
        if left < 1: keep(Row(name, ok='no', note=f'not reached in {limit:.0f} s'))
        else: carry_out(name, f, min(share, left), device, keep)
    return rows


def gone(out):
    print(f'something hangs: stopped; what there is lies in {tilde(out)}', flush=True)
    os._exit(3)


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', type=Path, help='folder of the table; default: a new one below the outputs')
    ap.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    ap.add_argument('--only', nargs='+', choices=list(CHECKS), default=list(CHECKS), help='some of the checks')
    ap.add_argument('--limit', type=float, default=440, help='seconds for all of them')
    a = ap.parse_args(argv)
    device = make_engine('fp32', a.device).device
    slack = 1 if device.type == 'cuda' else 4                   # a CPU is no machine to hurry on: what is tried there is the code
    if device.type == 'cpu': print('no CUDA device: a dry run of the same code on the CPU, at tiny sizes; its times mean nothing')
    out = a.out or RunFolder.new('gpu_day').path
    out.mkdir(parents=True, exist_ok=True)
    watch = threading.Timer(slack*a.limit + 30, gone, [out])    # whatever hangs where no signal is heard
    watch.daemon = True
    watch.start()
    rows = run_checks({n: (CHECKS[n][0], slack*CHECKS[n][1]) for n in a.only}, device, out, slack*a.limit)
    watch.cancel()
    bad = [r for r in rows if r.ok == 'no']
    print((out/'table.md').read_text(encoding='utf-8'))
    n = Counter(r.ok for r in rows)
    print(f'{len(rows)} rows: {n["yes"]} as they should be, {n["no"]} not, {n["not here"]} that could not be tried here; {tilde(out/"table.md")}')
    for r in bad: print('NOT:', r.what, r.system, r.precision, r.note)
    return int(bool(bad))


if __name__ == '__main__': sys.exit(main())
