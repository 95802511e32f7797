"""The Mug head against loops over single words and frames, in blocks, with padding, within its memory, and over two processes."""
import os, sys
from pathlib import Path

import pytest
import torch
import warm

from vidlab import mug
from vidlab.mug import MODES, MugHead, alignment

ROOT = Path(__file__).resolve().parent.parent


def soft(xs, tau):
    "Softmax-weighted mean of a list of scalars, and the weights"
    e = torch.stack([(tau*(x - max(float(y.detach()) for y in xs))).exp() for x in xs]); e = e/e.sum()
    return sum(a*x for a, x in zip(e, xs)), e


def oracle(head, text, text_mask, video, video_mask):
    "Pair by pair, word by word, frame by frame, float64: only what is real exists"
    unit, tau, out = lambda x: x/x.norm(), head.tau, []
    for a in range(len(text)):
        for b in range(len(video)):
            tokens, feats = [x for x, m in zip(text[a], text_mask[a]) if m], [x for x, m in zip(video[b], video_mask[b]) if m]
            w, f = [unit(x) for x in tokens], [unit(x) for x in feats]
            if not w or not f: out.append(text.new_tensor(float('nan'))); continue
            S = [[x @ y for y in f] for x in w]
            r, c = [soft(row, tau)[0] for row in S], [soft(col, tau)[0] for col in zip(*S)]
            if head.mode == 'simple': s = (soft(r, tau)[0] + soft(c, tau)[0])/2
            elif head.mode == 'full': s = sum(x*y for x, y in zip(soft(r, tau)[1], w)) @ sum(x*y for x, y in zip(soft(c, tau)[1], f))
            elif head.mode == 'frame_text': s = r[-1]
            else:
                tw = torch.stack([head.text_weight_fc(x)[0] for x in tokens]).softmax(0); vw = torch.stack([head.video_weight_fc(x)[0] for x in feats]).softmax(0)
                s = (sum(x*max(row, key=torch.Tensor.item) for x, row in zip(tw, S)) + sum(x*max(col, key=torch.Tensor.item) for x, col in zip(vw, zip(*S))))/2
            out.append(s)
    return torch.stack(out).view(len(text), len(video))


def data(seed=0, A=4, B=3, L=6, V=5, E=8, whole=False, dtype=torch.float32):
    torch.manual_seed(seed)
    text, video = torch.randn(A, L, E, dtype=dtype), torch.randn(B, V, E, dtype=dtype)
    tm, vm = [torch.arange(n) < torch.randint(1, n+1, (k, 1)) for n, k in ((L, A), (V, B))]
    if whole: tm, vm = torch.ones_like(tm), torch.ones_like(vm)
    return text, tm, video, vm


def make(mode, tau=100., **kw):
    torch.manual_seed(0)
    return MugHead(mode, tau, dim=8, **kw)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('tau', [5., 100.])
@pytest.mark.parametrize('whole', [False, True])
def test_equals_the_loops(mode, tau, whole):
    "Values and gradients, in one block and in many, with and without a gradient"
    text, tm, video, vm = data(whole=whole)
    head = make(mode, tau); ref = make(mode, tau).double()
    x, y = text.double().requires_grad_(), video.double().requires_grad_()
    want = oracle(ref, x, tm, y, vm); torch.manual_seed(2); g = torch.randn(want.shape)
    (want*g).sum().backward()
    for mb in (64, 1e-6, 4*6*5*8*2/2**20):          # one block; pair by pair; two pairs at once
        head.block_mb = mb; head.zero_grad()
        a, b = text.clone().requires_grad_(), video.clone().requires_grad_()
        got = head(a, tm, b, vm); (got*g).sum().backward()
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
        for z, e in [(a.grad, x.grad), (b.grad, y.grad), *((p.grad, q.grad) for p, q in zip(head.parameters(), ref.parameters()))]:
            assert (z.double() - e).abs().max() <= 1e-4*max(.1, e.abs().max())         # a shift of all weights has a zero gradient
        with torch.no_grad(): torch.testing.assert_close(head(text, tm, video, vm).double(), want.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('grad', [False, True])
def test_padding_does_not_matter(mode, grad):
    "What padding words and frames hold, how many there are, and where they stand"
    text, tm, video, vm = data()
    head = make(mode); run = lambda *x: head(x[0].clone().requires_grad_(grad), *x[1:])
    want = run(text, tm, video, vm)
    other = torch.where(tm[..., None], text, 1e3), tm, torch.where(vm[..., None], video, -video.flip(0)), vm
    wider = [torch.cat([x, torch.randn(len(x), 3, 8)], 1) if x.ndim == 3 else torch.cat([x, torch.zeros(len(x), 3, dtype=torch.bool)], 1) for x in (text, tm, video, vm)]
    front = [x.roll(3, 1) for x in wider]
    for x in (other, wider, front): torch.testing.assert_close(run(*x), want, rtol=1e-5, atol=1e-6)
    for i in range(4): torch.testing.assert_close(run(text[i:i+1], tm[i:i+1], video, vm), want[i:i+1], rtol=1e-5, atol=1e-6)   # nor the company


def test_zeros_are_not_padding():
    "A real word at right angles to every frame stays a word; word weights act by sign, and zero makes padding"
    text, tm, video, vm = data(whole=True)
    text[..., -1], video[..., -1] = 0., 0.; text[0, 2] = 0.; text[0, 2, -1] = 1.
    for mode in MODES:
        head = make(mode, 5.)
        want = oracle(make(mode, 5.).double(), text.double(), tm, video.double(), vm)
        torch.testing.assert_close(head(text, tm, video, vm).double(), want.detach(), rtol=1e-5, atol=1e-5)
        w = torch.rand(4, 6) + .1; torch.testing.assert_close(head(text, tm, video, vm, w), head(text, tm, video, vm), rtol=1e-5, atol=1e-6)
        w[:, 4] = 0.; gone = tm.clone(); gone[:, 4] = False
        torch.testing.assert_close(head(text, tm, video, vm, w), head(text, gone, video, vm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('mode', ['simple', 'full'])
def test_one_exponential_knows_its_limits(mode, monkeypatch):
    "A text that is the opposite of every frame: the short way would lose it"
    calls = []; long = mug.marginals
    monkeypatch.setattr(mug, 'marginals', lambda Z: calls.append(1) or long(Z))
    text, tm, video, vm = data(whole=True)
    with torch.no_grad():
        head = make(mode); head(text + 9, tm, video + 9, vm); assert not calls
        video = video[0, :1] + .01*torch.randn(3, 5, 8); text[1] = -video[0, 0] + .3*torch.randn(6, 8)
        got = head(text, tm, video, vm)
        assert calls
        torch.testing.assert_close(got.double(), oracle(head, text.double(), tm, video.double(), vm), rtol=1e-5, atol=1e-5)


def test_autocast_and_missing():
    text, tm, video, vm = data()
    head = make('simple'); want = head(text, tm, video, vm)
    with torch.autocast('cpu', torch.bfloat16): got = head(text, tm, video, vm)
    assert torch.equal(got, want) and got.dtype == torch.float32
    assert head(text.bfloat16(), tm, video.bfloat16(), vm).dtype == torch.float32
    tm[1], vm[2] = False, False
    for mode in MODES:
        s = make(mode)(text.requires_grad_(), tm, video, vm)
        assert s[1].isnan().all() and s[:, 2].isnan().all() and s[[0, 2, 3]][:, :2].isfinite().all()
        s[0, 0].backward(); assert text.grad.isfinite().all(); text.grad = None
    with pytest.raises(ValueError, match='text_mask has shape'): head(text, tm[:, :3], video, vm)
    with pytest.raises(ValueError, match='text_mask has shape'): head(text[:, 0], tm, video, vm)


def test_alignment_is_the_head():
    text, tm, video, vm = data()
    for i in range(4):
        for j in range(3):
            a = alignment(text[i], tm[i], video[j], vm[j], tau=30.)
            r, c = (a['p']*a['S']).sum(1), (a['q']*a['S']).sum(0)
            for mode, s in dict(simple=(a['alpha'] @ r + a['beta'] @ c)/2, full=a['alpha'] @ a['S'] @ a['beta']).items():
                torch.testing.assert_close(make(mode, 30.)(text, tm, video, vm)[i, j], s, rtol=1e-5, atol=1e-5)
            assert (a['p'][~tm[i]] == 0).all() and (a['q'][:, ~vm[j]] == 0).all() and abs(a['alpha'].sum() - 1) < 1e-5 and abs(a['beta'].sum() - 1) < 1e-5


# ---------------------------------------------------------------------------------------------------------------- memory
MEMORY = r'''
import re, torch
from vidlab.mug import MugHead
peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])/1024     # ru_maxrss would count the parent
head = MugHead()
def run(n, grad):
    w, f = torch.randn(n, 32, 32, requires_grad=grad), torch.randn(n, 32, 32)
    s = head(w, torch.ones(n, 32), f)
    if grad: s.sum().backward(); assert w.grad.isfinite().all()
    assert s.shape == (n, n) and s.isfinite().all()
run(8, True); at = peak()
with torch.no_grad(): run(1000, False)
print(peak() - at); at = peak()
run(200, True); print(peak() - at)
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the memory of a process from /proc')
def test_memory_of_a_whole_evaluation():
    "1000 x 1000 texts and videos of 32 words and frames: 4 GB per tensor if computed at once. 200 x 200 with a gradient: 160 MB per tensor, about eight of them"
    out = warm.run([sys.executable, '-c', MEMORY], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    evaluation, training = map(float, out.stdout.split())
    assert evaluation < 400 and training < 400, f'{evaluation:.0f} MB in evaluation, {training:.0f} MB more in training'


# ---------------------------------------------------------------------------------------------------------------- two processes
NET = '''
import torch
from vidlab.losses import contrastive, gather_dict
from vidlab.mug import MugHead

class Net(torch.nn.Module):
    def __init__(self, mode):
        super().__init__(); torch.manual_seed(0)
        self.text, self.video, self.mug = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8), MugHead(mode, 20., dim=8, block_mb=1e-3)
    def forward(self, text, text_mask, video, video_mask):
        o = gather_dict(dict(text=self.text(text), text_mask=text_mask, video=self.video(video), video_mask=video_mask), 'full')
        return contrastive(self.mug(**o)/.05)

def batch():
    torch.manual_seed(1)
    return [torch.randn(5, 4, 6), torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4]]), torch.randn(5, 3, 6), torch.arange(3) < torch.tensor([[3], [3], [1], [2], [3]])]
'''
RANK = NET + '''
import os, sys, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
part, out = (slice(0, 3), slice(3, 5))[rank], {}
for mode in ('simple', 'drl_wti'):
    net = DDP(Net(mode)); loss = net(*(x[part] for x in batch())); loss.backward()
    out[mode] = dict(loss=loss.detach(), **{n: p.grad for n, p in net.module.named_parameters()})
torch.save(out, f'{folder}/out{rank}.pt')
dist.barrier()
os._exit(0)                              # gloo's threads can abort an ordinary exit on a busy machine; what is tested is saved
'''


def test_two_processes_are_one_batch(tmp_path):
    "Uneven halves on two ranks, gathered with gradient, averaged: the gradient of the joined batch"
    (tmp_path/'rank.py').write_text(RANK)
    warm.ranks([tmp_path/'rank.py', '{rank}', tmp_path])
    scope = {}; exec(NET, scope)
    for mode in ('simple', 'drl_wti'):
        net = scope['Net'](mode); loss = net(*scope['batch']()); loss.backward()
        for r in (0, 1):
            got = torch.load(tmp_path/f'out{r}.pt', weights_only=True)[mode]
            torch.testing.assert_close(got['loss'], loss.detach(), rtol=1e-5, atol=1e-6)
            for n, p in net.named_parameters(): torch.testing.assert_close(got[n], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f'{mode} {n}: {m}')
