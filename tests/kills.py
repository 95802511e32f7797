"""Kill a run at its file events, one after the other, and go on: `python tests/kills.py FOLDER [EVERY [FIRST]]` prints what went wrong as json; with KILLS_ASIDE=1 checkpoints are written while training goes on.

A process that has imported everything forks one child for each kill. In the child every event that changes the disk is counted (Python's audit events, `os.fsync`, and the library that writes tensors, which is
also cut off in the middle); at its number the child kills itself. Another child then looks at what is left, and goes on as the next start of the run would."""
import json, os, shutil, signal, sys, traceback
from pathlib import Path

import torch
from torch import nn

from vidlab.build import weights_path
from vidlab.callbacks import Log
from vidlab.ckpt import find_checkpoint, load_checkpoint
from vidlab.core import RunFolder, write_json
from vidlab.learner import Learner, make_engine
from vidlab.owner import owned, state_of
from vidlab.train import _tidy

SCORES = {1: 1., 2: .5, 3: 2.}                               # epoch -> what its evaluation says: better, worse, better


class Toy(nn.Module):
    monitor, lower = 'score', False

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.5), nn.Linear(8, 1))

    def forward(self, b): return dict(loss=self.model(b['x'])[:, 0].pow(2).mean())

    def after_step(self): pass


class Rows:
    def __len__(self): return 4

    def epoch(self, epoch, start=0):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(epoch))
        for i in range(start, 4): yield dict(x=x[4*i:4*i + 4], sid=torch.arange(4))


def train(path):
    "What `run` does, on a toy"
    with owned(RunFolder(path)) as folder:
        _tidy(folder)
        folder.beat_every = 1e9                                 # one more sign of life would be one more event
        folder.status('starting')
        torch.manual_seed(0)
        task = Toy()
        learn = Learner(task, torch.optim.AdamW(task.parameters(), lr=.01), Rows(), folder, 3, make_engine(device='cpu'), ema=.5, save_every=2, keep_every=3, async_save=bool(os.environ.get('KILLS_ASIDE')), cbs=[Log(2)],
                        evaluate=lambda learn: dict(score=SCORES[learn.epoch]))
        learn.resume()
        learn.fit(lambda: write_json(folder/'eval'/'test.json', dict(metrics=dict(score=SCORES[3]))))


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.chmod', 'os.truncate', 'os.link', 'os.utime', 'shutil.rmtree'}


def count(at, say):
    "Kill this process at event number `at`; `say` hears every event"
    n = [0]
    def event(what):
        say(what)
        n[0] += 1
        if n[0] == at: os.kill(os.getpid(), signal.SIGKILL)
    def hook(name, args):
        if name in CHANGES or name == 'open' and args[2] & WRITES: event(f'{name} {args[0]}')
    os.fsync = lambda f: event('fsync')                        # a process that is killed loses nothing that it has written
    import safetensors.torch as st
    save = st.save_file
    def torn(tensors, path, metadata=None):
        save(tensors, path, metadata)
        whole = Path(path).read_bytes()
        with open(path, 'wb') as f: f.write(whole[:len(whole)//2])
        event('half of the tensors')
        save(tensors, path, metadata)
    st.save_file = torn
    sys.addaudithook(hook)


def forked(f) -> tuple: # how it ended, what it returned or raised
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try: out = f()
        except BaseException: out = 'ERROR ' + traceback.format_exc()[-1500:]
        os.write(w, json.dumps(out).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as p: said = p.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(said) if said else None


def names(path): return sorted(str(p.relative_to(path)) for p in Path(path).rglob('*'))


def everything(path):
    "Weights, averages, moments and counters of all checkpoints"
    out = {}
    for p in sorted((Path(path)/'ckpt').iterdir()):
        ck = load_checkpoint(p)
        out |= {f'{p.name}/{part}/{k}': v for part in ck if part not in ('card', 'state') for k, v in ck[part].items()}
        if ck['state']:
            out |= {f'{p.name}/{i}/{k}': v for i, s in ck['state']['optimizer']['state'].items() for k, v in s.items()}
            out[f'{p.name}/counters'] = torch.tensor([ck['state'][k] for k in ('epoch', 'batch', 'step', 'best')])
    return out


def look(path, whole):
    "What a kill has left, and what comes of it"
    bad, last, best = [], find_checkpoint(Path(path)/'ckpt'/'last'), find_checkpoint(Path(path)/'ckpt'/'best')
    state = load_checkpoint(Path(path)/'ckpt'/'last')['state'] if last else None
    if state and state['best'] is not None:
        if best is None: bad.append('best is lost')
        elif load_checkpoint(best)['card']['metrics']['score'] < state['best']: bad.append('best is an older one')
    if best and weights_path(path).parent != best: bad.append(f'evaluated would be {weights_path(path)}')
    if (said := state_of(path)['state']) not in ('dead', 'done', 'empty'): bad.append(f'the status is {said}')
    if said == 'done' and not (Path(path)/'eval'/'test.json').exists(): bad.append('done without numbers')
    train(path)
    if state_of(path)['state'] != 'done': bad.append('does not end')
    if other := set(names(path)) ^ set(names(whole)): bad.append(f'litter or loss: {sorted(other)}')
    a, b = everything(path), everything(whole)
    if a.keys() != b.keys() or (other := [k for k in a if not torch.equal(a[k], b[k])]): bad.append(f'other weights: {(other or sorted(a.keys() ^ b.keys()))[:4]}')
    return dict(bad=bad, saved=last is not None)


def main(home, every=1, first=1):
    torch.set_num_threads(1)
    home, whole = Path(home), Path(home)/'whole'
    train(RunFolder(whole).made().path)                         # here: what it imports need not be imported by every child
    counted = RunFolder(home/'counted').made().path
    def unbroken():
        said = []
        count(0, said.append)
        train(counted)
        return said
    _, events = forked(unbroken)
    assert not str(events).startswith('ERROR'), events
    wrong, saved = {}, False
    for at in range(int(first), len(events) + 1, int(every)):
        path = RunFolder(home/'killed').made().path
        code, said = forked(lambda: (count(at, lambda what: None), train(path)))
        now = f'{at}: before {events[at - 1]}'.replace(str(counted), '')
        if code != -signal.SIGKILL: wrong[now] = [f'not killed: {said}']
        code, said = forked(lambda: look(path, whole))
        if code or not isinstance(said, dict): wrong[now] = [str(said)]
        else:
            bad = said['bad'] + ['the last checkpoint is lost']*(saved and not said['saved'])
            saved = saved or said['saved']
            if bad: wrong[now] = bad
        shutil.rmtree(path)
    print(json.dumps(dict(events=len(events), wrong=wrong)))


if __name__ == '__main__': main(*sys.argv[1:])
