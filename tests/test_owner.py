"One run, one owner; nothing trained is lost: kills at every file event, dead and hanging processes, signals to whoever watches."
import json, os, signal, stat, subprocess, sys, time
from pathlib import Path

import psutil
import pytest
import torch

import kills
import warm
import vidlab.train
from vidlab import cli
from vidlab.build import latest_run, runs_of, weights_path
from vidlab.ckpt import find_checkpoint, load_checkpoint, save_checkpoint
from vidlab.core import RunFolder, read_json, write_json
from vidlab.data.shapes import make_shapes
from vidlab.evaluate import evaluate, save_eval
from vidlab.learner import Learner, Stopped, make_engine
from vidlab.owner import NAME, STALE, InUse, owned, owner_of, place, started, state_of, take
from vidlab.train import launch, make_config, run, run_eval, start_folder, unfinished_run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('outputs')


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    "A small embedded data set: 16 train, 8 val, 8 test clips"
    return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=16, val=8, test=8)))


def small(shapes, **kw):
    base = dict(data='shapes', data_path=str(shapes), clip='random', head='meanP', sampler='segment', max_frames=2, epochs=1, batch_size=8, eval_batch_size=8, lr=1e-3, workers=0,
                log_every=1, device='cpu')
    return make_config(**{**base, **kw})


HOLD = 'import sys, time; from vidlab.core import RunFolder; from vidlab.owner import owned\nwith owned(RunFolder(sys.argv[1])): print(1, flush=True); time.sleep(600)'


def held(folder):
    "Another process that owns the run"
    p = subprocess.Popen([sys.executable, '-c', HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert p.stdout.readline() == '1\n'
    return p


def gone(pids, within):
    "All of them have ended in that time"
    until = time.time() + within
    while time.time() < until and any(started(p) is not None for p in pids): time.sleep(.1)
    return [p for p in pids if started(p) is not None] == []

# ---------------------------------------------------------------------------------------------------- who trains


def test_a_run_that_lives_is_refused_and_one_that_was_killed_is_taken(shapes, capsys):
    cfg = small(shapes)
    folder = start_folder(cfg)
    folder.status('running')
    save_checkpoint(folder/'ckpt'/'last', dict(w=torch.ones(1)), {}, dict(step=1))
    p, before = held(folder), (folder/'config.json').read_bytes()
    more = small(shapes, epochs=3)                              # may differ, and must not be written into the run of another
    for resume in (str(folder.path), 'auto'):
        for go_on in (lambda: run(more, resume), lambda: launch(more, 2, resume), lambda: start_folder(more, resume)):
            with pytest.raises(InUse, match=rf'process {p.pid} of this machine trains it.*kill {p.pid}'): go_on()
    assert (folder/'config.json').read_bytes() == before and folder.status()['state'] == 'running' and state_of(folder.path)['state'] == 'running'
    p.kill()
    p.wait()
    assert state_of(folder.path)['state'] == 'dead'
    assert start_folder(more, 'auto').path == folder.path and f'process {p.pid}' in capsys.readouterr().out
    assert owner_of(folder.path) is None


def test_of_several_that_find_a_dead_owner_one_gets_the_run(tmp_path):
    folder = RunFolder.new('x', root=tmp_path)
    write_json(folder/NAME, dict(place(), pid=os.getpid(), started=1, id='before'))           # the number is used again
    ps = [subprocess.Popen([sys.executable, '-c', HOLD, str(folder.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    while sum(p.poll() is not None for p in ps) < 3: time.sleep(.05)
    one, = [p for p in ps if p.poll() is None]
    assert owner_of(folder.path)['pid'] == one.pid
    one.kill()
    for p in ps: assert p is one or f'process {one.pid} of this machine trains it' in p.communicate()[1]
    one.communicate()


def test_an_owner_on_another_machine_is_told_by_its_age(tmp_path):
    folder = RunFolder.new('x', root=tmp_path)
    folder.status('running')
    write_json(folder/NAME, dict(place(), host='node3', boot='b', pid=77, started=5, id='x'))
    for age, state in ((STALE - 60, 'running'), (STALE + 60, 'dead')):
        os.utime(folder/NAME, (time.time() - age,)*2)
        assert state_of(folder.path)['state'] == state
        if state == 'running':
            with pytest.raises(InUse) as e: take(folder.path)
            assert all(t in str(e.value) for t in ('process 77 on node3', 'last sign 2 min ago', 'after 3 min without a sign', f'rm {folder/NAME}'))
    with owned(folder): assert owner_of(folder.path)['pid'] == os.getpid()


def test_who_has_lost_the_run_writes_nothing_more(tmp_path):
    "The record was deleted while the process stood still, and another one trains"
    lost = []
    class Lose:
        def after_step(self, learn):
            if learn.step != 3: return
            lost.append(kills.names(tmp_path))
            write_json(tmp_path/NAME, dict(place(), pid=os.getpid(), started=started(os.getpid()), id='other'))
            RunFolder(tmp_path).status('running', step=1234)
    with owned(RunFolder(tmp_path)) as folder:
        task = kills.Toy()
        learn = Learner(task, torch.optim.SGD(task.parameters(), lr=.1), kills.Rows(), folder, 4, make_engine(device='cpu'), save_every=2, cbs=[Lose()])
        with pytest.raises(InUse, match='trains it'): learn.fit()
    assert read_json(tmp_path/'status.json')['step'] == 1234 and read_json(tmp_path/NAME)['id'] == 'other'
    assert load_checkpoint(tmp_path/'ckpt'/'last')['card']['step'] == 2 and kills.names(tmp_path) == lost[0]

# ---------------------------------------------------------------------------------------------------- what the status says


def test_what_fails_while_a_run_is_set_up_is_in_its_status(shapes, monkeypatch):
    def state(recipe):
        s = RunFolder(runs_of(recipe)[0]).status()
        assert owner_of(runs_of(recipe)[0]) is None
        return s['state'], s['reason']
    with pytest.raises(FileNotFoundError): run(small(shapes, start='no/such/run', recipe='a'))
    assert state('a')[0] == 'failed' and "FileNotFoundError: start 'no/such/run'" in state('a')[1]
    with pytest.raises(FileNotFoundError): run_eval(small(shapes, start='no/such/run', recipe='b'))
    assert state('b')[0] == 'failed'
    before = signal.signal(signal.SIGINT, signal.default_int_handler)              # a background shell has it ignored
    for sig, error in ((signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)):
        monkeypatch.setattr('vidlab.train.build_learner', lambda *a: os.kill(os.getpid(), sig) or time.sleep(60))
        with pytest.raises(error): run(small(shapes, recipe=sig.name))
        assert state(sig.name)[0] == 'stopped' and state(sig.name)[1].startswith(error.__name__) and 'while the run was set up' in state(sig.name)[1]
    signal.signal(signal.SIGINT, before)


def test_done_is_written_with_the_test_numbers(shapes, monkeypatch):
    cfg = small(shapes, val_split='')
    with monkeypatch.context() as m:
        m.setattr('vidlab.train.evaluate_split', lambda *a: 1/0)
        with pytest.raises(ZeroDivisionError): run(cfg)
    folder = RunFolder(runs_of('clip4clip')[0])
    assert folder.status()['state'] == 'failed' and 'ZeroDivisionError' in folder.status()['reason'] and not (folder/'eval'/'test.json').exists()
    seen = []
    def measured(*a):
        seen.append(folder.status()['state'])
        save_eval(folder, 'test', dict(metrics={}, arrays={}, seconds=0), {})
    monkeypatch.setattr('vidlab.train.evaluate_split', measured)
    assert run(cfg, 'auto').path == folder.path and folder.status()['state'] == 'done' and seen == ['running']


@pytest.mark.parametrize('broken', ['', '{"state": "runn', '[]', '{"step": 3}', '{"state": 3}', b'\xff\xfe{', 'folder', '{"state": "running", "heartbeat": "x", "pid": "y"}'])
def test_a_broken_status_harms_only_its_own_run(outputs, capsys, broken):
    good, bad = RunFolder.new('x'), RunFolder.new('x')
    bad.path = bad.path.rename(bad.path.with_name('99999999-' + bad.path.name))               # the newest
    for f in (good, bad):
        write_json(f/'config.json', {})
        save_checkpoint(f/'ckpt'/'last', dict(w=torch.ones(1)), {}, {})
    good.status('done')
    if broken == 'folder': (bad/'status.json').mkdir()
    else: (bad/'status.json').write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    (bad/'eval'/'test.json').write_text('{"metrics": 3')
    assert latest_run('x') == good.path
    assert cli.main(['runs']) == 0
    rows = [l.split()[1] for l in capsys.readouterr().out.splitlines()[1:]]
    assert rows == ['dead' if 'heartbeat' in str(broken) else 'unreadable', 'done']
    (bad/'config.json').write_text('{"epo')
    assert unfinished_run(make_config(recipe='x')) is None
    if broken != 'folder': assert bad.status('running')['state'] == bad.status()['state'] == 'running'       # its own run may go on


def test_reading_makes_no_folders(outputs, tmp_path):
    p = tmp_path/'some'/'run'
    f = RunFolder(p)
    assert (f.status(), f.metrics(), state_of(p)['state'], owner_of(p)) == ({}, [], 'empty', None)
    with pytest.raises(FileNotFoundError): latest_run('never')
    with pytest.raises(FileNotFoundError): weights_path(p)
    cli.main(['runs'])
    p.mkdir(parents=True)
    write_json(p/'config.json', {})
    RunFolder(p).status(), state_of(p), cli.newest_run('some')
    assert [q.name for q in p.iterdir()] == ['config.json'] and not outputs.exists()

# ---------------------------------------------------------------------------------------------------- nothing trained is lost


def killed(tmp_path, every, first):
    r = warm.run([sys.executable, str(ROOT/'tests'/'kills.py'), str(tmp_path), str(every), str(first)], capture_output=True, text=True, cwd=ROOT,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])


def test_a_kill_at_some_file_events_costs_nothing(tmp_path):
    got = killed(tmp_path, 61, 5)
    assert got['events'] > 200 and got['wrong'] == {}


@pytest.mark.long
def test_a_kill_costs_nothing_where_checkpoints_are_written_aside(tmp_path, monkeypatch):
    monkeypatch.setenv('KILLS_ASIDE', '1')
    got = killed(tmp_path, 23, 5)
    assert got['events'] > 200 and got['wrong'] == {}


@pytest.mark.long
def test_a_kill_at_any_file_event_costs_nothing(tmp_path):
    assert killed(tmp_path, 1, 1)['wrong'] == {}


class Batches:
    "Of an evaluation; a signal comes with one of them"
    def __init__(self, n, at): self.n, self.at, self.seen = n, at, []
    def __len__(self): return self.n
    def __iter__(self):
        for i in range(self.n):
            self.seen.append(i)
            if i == self.at: os.kill(os.getpid(), signal.SIGTERM)
            yield dict(sid=torch.tensor([i]), view=torch.zeros(1, dtype=torch.long))


class Measured(kills.Toy):
    def eval_step(self, b): return dict(b)
    def score(self, parts, expected=None): return dict(metrics=dict(score=float(len(parts['video']['sid']))), arrays={})


def test_a_signal_between_two_batches_of_an_evaluation(tmp_path):
    def learner(batches):
        torch.manual_seed(0)
        task = Measured()
        return Learner(task, torch.optim.SGD(task.parameters(), lr=.1), kills.Rows(), tmp_path, 1, make_engine(device='cpu'),
                       evaluate=lambda learn: evaluate(learn.raw_task, dict(video=batches), learn.engine)['metrics'])
    first = Batches(6, at=2)
    learner(first).fit()
    s = RunFolder(tmp_path).status()
    assert first.seen == [0, 1, 2] and s['state'] == 'stopped' and s['reason'] == f'SIGTERM; go on with resume={tmp_path}' and s['step'] == 4
    assert find_checkpoint(tmp_path/'ckpt'/'best') is None
    again = learner(whole := Batches(6, at=None))
    assert again.resume() and again.step == 4
    again.fit()
    assert whole.seen == list(range(6)) and RunFolder(tmp_path).status()['state'] == 'done' and load_checkpoint(tmp_path/'ckpt'/'best')['card']['metrics']['score'] == 6


def test_all_files_of_a_run_may_be_read_by_the_same_people(tmp_path):
    mask = os.umask(0o027)
    try:
        kills.train(RunFolder(tmp_path/'r').made().path)
        save_eval(RunFolder(tmp_path/'r'), 'val', dict(metrics={}, arrays=dict(a=torch.ones(2)), seconds=1), {})
    finally: os.umask(mask)
    files = [p for p in (tmp_path/'r').rglob('*') if p.is_file()]
    assert {'weights.safetensors', 'ema.safetensors', 'state.pt', 'card.json', 'val.safetensors'} <= {p.name for p in files}
    assert {(p.name, oct(stat.S_IMODE(p.stat().st_mode))) for p in files if stat.S_IMODE(p.stat().st_mode) != 0o640} == set()

# ---------------------------------------------------------------------------------------------------- the processes of a run

SIGNS = """
import os, signal, sys, time
from pathlib import Path
from vidlab.core import leave_signs, tick
run, rank, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
leave_signs(run/'.signs'/rank)
tick('data')
if what == 'deaf': signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what == 'further': tick('forward')
if what == 'kill': os.kill(os.getpid(), signal.SIGKILL)
if what == 'exit': os._exit(int(sys.argv[4]))
if what == 'error':
    (run/f'error_{rank}.txt').write_text('Traceback\\nKeyError: 7')
    sys.exit(1)
if what == 'lost':
    time.sleep(.5)
    (run/f'error_{rank}.txt').write_text('Traceback\\nRuntimeError: Connection closed by peer')
    sys.exit(1)
if what == 'end': tick('end')
else: time.sleep(600)
"""


@pytest.mark.parametrize('whats,said', [
    (['deaf', 'kill'], 'rank 1 was killed by SIGKILL (by hand, or by the system because memory ran out)'),
    (['lost', 'exit 0'], 'rank 1 ended with code 0 in the middle of the run'),
    (['exit 3', 'lost'], 'rank 0 ended with code 3 in the middle of the run'),
    (['lost', 'deaf', 'error'], 'rank 2 failed: KeyError: 7'),
    (['further', 'deaf'], "rank 1 hangs: no process has given a sign for 2 s (`hang`), the last of it came after 'data'"),
    (['end', 'end'], ''),
])
def test_the_one_that_went_astray_is_named_and_all_are_ended(tmp_path, monkeypatch, whats, said):
    monkeypatch.setattr('vidlab.train.GRACE', 1.)
    folder = RunFolder.new('x', root=tmp_path)
    (folder/'.signs').mkdir()
    procs = [subprocess.Popen([sys.executable, '-c', SIGNS, str(folder.path), str(r), *w.split()], cwd=ROOT) for r, w in enumerate(whats)]
    t = time.time()
    assert vidlab.train._watch(dict(enumerate(procs)), folder, 2. if 'further' in whats else 60., lambda: None).splitlines()[:1] == ([said] if said else [])
    assert all(p.poll() is not None for p in procs) and time.time() - t < 25


FAULT = """
import os, time
if os.environ.get('RANK') == '1':
    import vidlab.learner as L
    step, fault = L.Learner.one_step, os.environ['FAULT']
    def one_step(self, batches):
        if self.step == 3:
            if fault == 'raise': raise OSError('the disk of this process is gone')
            if fault == 'exit': os._exit(0)
            if fault == 'hang': time.sleep(1e4)
            os.kill(os.getpid(), dict(kill=9, stop=19)[fault])
        return step(self, batches)
    L.Learner.one_step = one_step
"""


@pytest.mark.parametrize('fault,said', [
    pytest.param('kill', 'rank 1 was killed by SIGKILL', marks=pytest.mark.slow),
    pytest.param('hang', 'rank 1 hangs: no process has given a sign for 45 s', marks=pytest.mark.long),
    pytest.param('stop', 'rank 1 hangs: no process has given a sign for 45 s', marks=pytest.mark.long),
    pytest.param('raise', 'rank 1 failed: OSError: the disk of this process is gone', marks=pytest.mark.long),
    pytest.param('exit', 'rank 1 ended with code 0 in the middle of the run', marks=pytest.mark.long)])
def test_a_rank_that_dies_or_hangs(shapes, tmp_path, monkeypatch, fault, said):
    (tmp_path/'sitecustomize.py').write_text(FAULT)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    monkeypatch.setenv('FAULT', fault)
    with pytest.raises(RuntimeError) as e: launch(small(shapes, epochs=30, save_every=2, hang=45. if fault in ('hang', 'stop') else 900., val_split='', test_split=''), 2)
    folder = RunFolder(runs_of('clip4clip')[0])
    assert str(e.value).startswith(said) and f'resume={folder.path}' in str(e.value)
    s = folder.status()
    assert s['state'] == 'failed' and s['reason'].startswith(said) and not (folder/'.signs').exists() and owner_of(folder.path) is None
    assert [p.pid for p in psutil.Process().children(recursive=True) if 'vidlab.train' in ' '.join(p.cmdline())] == []
    if fault == 'hang': assert 'in one_step' in str(e.value)
    if fault == 'stop': assert 'rank 1: does not answer' in str(e.value)


LAUNCH = 'import sys; from vidlab.train import launch, make_config; print(launch(make_config(**eval(sys.argv[1])), 2).status())'


def watched(outputs, cmd, stage, target, sig):
    "Send a signal to one of a tree of processes once a file is there; (process, all numbers, the run)"
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    t = time.time()
    while not list(outputs.glob(stage)) and p.poll() is None and time.time() - t < 180: time.sleep(.1)
    assert p.poll() is None, p.communicate()[0][-3000:]
    kids = psutil.Process(p.pid).children(recursive=True)
    os.kill(next(k.pid for k in [psutil.Process(p.pid), *kids] if target in ' '.join(k.cmdline())), sig)
    return p, [p.pid, *(k.pid for k in kids)], next(outputs.glob('*/*/config.json')).parent


SAVED, BEGUN = '*/*/ckpt/last/card.json', '*/*/status.json'


@pytest.mark.parametrize('cmd,stage,target,sig', [
    pytest.param('launch', SAVED, 'launch(', signal.SIGKILL, marks=pytest.mark.long),
    pytest.param('launch', SAVED, 'launch(', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('launch', BEGUN, 'launch(', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('launch', SAVED, 'vidlab.train /', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('papermill', SAVED, 'papermill', signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param('papermill', SAVED, 'papermill', signal.SIGKILL, marks=pytest.mark.long),
    pytest.param('papermill', SAVED, 'ipykernel', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('papermill 2', SAVED, 'papermill', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('vidlab 2', SAVED, 'vidlab', signal.SIGTERM, marks=pytest.mark.long),
    pytest.param('vidlab 2', SAVED, 'vidlab', signal.SIGKILL, marks=pytest.mark.long)])
def test_a_signal_ends_the_whole_run_and_can_be_gone_on_from(shapes, outputs, tmp_path, cmd, stage, target, sig):
    words = dict(data_path=str(shapes), clip='random', max_frames=2, epochs=200, batch_size=8, workers=0, device='cpu', save_every=1, val_split='', test_split='')
    page = [x for k, v in dict(words, nproc=2 if '2' in cmd else 0).items() for x in ('-p', k, str(v))]
    line = dict(launch=[sys.executable, '-c', LAUNCH, repr(dict(words, data='shapes', sampler='segment'))],
                papermill=[sys.executable, '-m', 'papermill', 'nbs/runs/train.ipynb', str(tmp_path/'out.ipynb'), *page],
                vidlab=[sys.executable, '-m', 'vidlab.cli', 'train', 'shapes_smoke', 'nproc=2', *(f'{k}={v}' for k, v in words.items())])[cmd.split()[0]]
    p, pids, folder = watched(outputs, line, stage, target, sig)
    assert gone(pids, 30), 'somebody trains on'
    said = p.communicate()[0]
    s = state_of(folder)
    assert s['state'] == 'stopped' and s['reason'], said[-2000:]
    if stage == BEGUN: return
    assert f'resume={folder}' in s['reason'] and load_checkpoint(folder/'ckpt'/'last')['state']['step'] == s['step'] > 0
    assert RunFolder(folder).owner is None and not (owner_of(folder) or dict(alive=False))['alive']
