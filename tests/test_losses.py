"""Gathering over two real processes: both backward rules, uneven batches, and the claim that DDP averaging gives the full-batch gradient."""
import os, sys
from pathlib import Path

import pytest
import torch
import warm

CODE = '''
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from vidlab.losses import contrastive, gather, gather_dict, gather_sizes, world
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)

class Net(torch.nn.Module):
    def __init__(self, how):
        super().__init__(); torch.manual_seed(0); self.how = how
        self.a, self.b, self.scale = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4), torch.nn.Parameter(torch.tensor(0.5))
    def forward(self, x, y):
        o = gather_dict(dict(a=self.a(x), b=self.b(y), keep=x[:, 0] > 0, note='rides along'), self.how)
        assert o['note'] == 'rides along' and o['keep'].dtype == torch.bool and len(o['keep']) == len(o['a'])
        return contrastive(self.scale.exp()*o['a'] @ o['b'].T)

torch.manual_seed(1)
x, y = torch.randn(2, 5, 6).double(), None
x, y = x[0], x[1]
part = slice(0, 3) if rank == 0 else slice(3, 5)                     # uneven: three and two rows
out = {}
for how in ('full', 'official', 'local'):
    net = DDP(Net(how).double())
    loss = net(x[part], y[part]); loss.backward()
    out[how] = dict(loss=loss.item(), **{n: p.grad for n, p in net.module.named_parameters()})
assert gather_sizes(3 - rank) == [3, 2] and world() == 2
ids = gather(torch.arange(3 - rank) + 10*rank); assert ids.tolist() == [0, 1, 2, 10, 11], ids
torch.save(out, f'{folder}/out{rank}.pt')
dist.barrier()
os._exit(0)                              # gloo's threads can abort an ordinary exit on a busy machine; what is tested is saved
'''


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('gather'); (d/'rank.py').write_text(CODE)
    warm.ranks([d/'rank.py', '{rank}', d])
    return [torch.load(d/f'out{r}.pt', weights_only=True) for r in (0, 1)]


@pytest.fixture(scope='module')
def whole():
    "One process with all five rows"
    from vidlab.losses import contrastive
    torch.manual_seed(0)
    a, b, scale = torch.nn.Linear(6, 4).double(), torch.nn.Linear(6, 4).double(), torch.tensor(0.5, dtype=torch.double, requires_grad=True)
    torch.manual_seed(1)
    x, y = torch.randn(2, 5, 6).double()
    loss = contrastive(scale.exp()*a(x) @ b(y).T); loss.backward()
    return dict(loss=loss.item(), scale=scale.grad, **{f'{k}.{n}': p.grad for k, m in (('a', a), ('b', b)) for n, p in m.named_parameters()})


@pytest.mark.parametrize('rank', [0, 1])
def test_full_is_the_full_batch(runs, whole, rank):
    got = runs[rank]['full']
    assert got['loss'] == pytest.approx(whole['loss'], rel=1e-6)
    for n in whole:
        if n != 'loss': torch.testing.assert_close(got[n].float(), whole[n].float(), rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f'{n}: {m}')


def test_official_scaling(runs, whole):
    "1/world of the gradient before the gather, all of it after"
    got = runs[0]['official']
    assert got['loss'] == pytest.approx(whole['loss'], rel=1e-6)
    for n in whole:
        if n != 'loss': torch.testing.assert_close(got[n].float()*(1 if n == 'scale' else 2), whole[n].float(), rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f'{n}: {m}')


def test_local_differs(runs, whole):
    assert runs[0]['local']['loss'] != pytest.approx(runs[1]['local']['loss'])
    assert not torch.allclose(runs[0]['local']['a.weight'].float(), whole['a.weight'].float(), rtol=1e-2)
