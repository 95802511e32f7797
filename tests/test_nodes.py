"Several machines: launches that meet, ranks and launchers that are killed, torchrun under the script for Slurm and the job for Kubernetes."
import os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from test_owner import shapes, small                            # noqa: F401 the fixture
from vidlab.core import RunFolder, read_json
from vidlab.nodes import free_port
from vidlab.owner import state_of
from vidlab.train import _said, launch, run

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT/'nbs'/'runs'/'cluster'
pytestmark = pytest.mark.usefixtures('outputs')
WORDS = dict(epochs=3, save_every=2, val_split='', seed=3)

# before step 3 of the first start: a rank is killed; 'wait': all of them stand for so long that the test can kill a launcher
FAULT = """
import os, time
if 'RANK' in os.environ:
    import vidlab.learner as L
    step, fault, run = L.Learner.one_step, os.environ['FAULT'], os.environ['FAULT_ONCE']
    def one_step(self, batches):
        if self.step == 3 and not os.path.exists(run):
            if fault == 'wait': time.sleep(600)
            if os.environ['RANK'] == '1':
                open(run, 'w').close()
                os.kill(os.getpid(), 9)
        return step(self, batches)
    L.Learner.one_step = one_step
"""


@pytest.fixture
def fault(tmp_path, monkeypatch):
    "Processes that are started from here fail once; gives the file that says it has happened"
    site = tmp_path/'site'
    site.mkdir()
    (site/'sitecustomize.py').write_text(FAULT)
    monkeypatch.setenv('PYTHONPATH', f'{site}{os.pathsep}{ROOT}')
    monkeypatch.setenv('FAULT_ONCE', str(tmp_path/'happened'))
    monkeypatch.setenv('FAULT', 'kill')
    return tmp_path/'happened'


def losses(folder): return {r['step']: r['loss'] for r in RunFolder(folder).metrics() if r['kind'] == 'step'}


def same(one, other):
    "Losses and numbers of two runs, up to float32 sums in another order"
    a, b = losses(one), losses(other)
    assert list(a) == sorted(b) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-4)
    assert read_json(Path(one)/'eval'/'test.json')['metrics'] == read_json(Path(other)/'eval'/'test.json')['metrics']


def machines(cfg, n, **kw):
    "A launch of one process on each of n machines, all of them this one; what each gave, or its error"
    got, where = {}, f'127.0.0.1:{free_port()}'
    def machine(r):
        try: got[r] = launch(cfg, 1, nnodes=n, rank=r, rendezvous=where, **kw)
        except BaseException as e: got[r] = e
    threads = [threading.Thread(target=machine, args=(r,)) for r in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return [got[r] for r in range(n)]


@pytest.mark.long
def test_two_machines_and_a_rank_that_is_killed(shapes, fault):
    cfg = small(shapes, **WORDS)
    first, second = machines(cfg, 2, restarts=1)
    assert first.path == second.path and fault.exists() and first.status()['state'] == 'done'
    assert {p.name for p in first.path.glob('launch*.log')} == {'launch.log', 'launch_1.log'} and not (first/'.signs').exists()
    assert [r['step'] for r in first.metrics() if r['kind'] == 'step'] == [1, 2, 3, 3, 4, 5, 6]         # from the checkpoint of step 2
    same(run(cfg).path, first.path)


@pytest.mark.long
def test_without_restarts_both_machines_name_the_rank(shapes, fault):
    first, second = machines(small(shapes, **WORDS), 2)
    assert 'rank 1 was killed by SIGKILL' in str(first) and 'resume=' in str(first)
    assert 'rank 1 was killed by SIGKILL' in str(second) and 'launch_1.log' in str(second)


def test_words_of_several_machines(shapes, outputs):
    for kw, said in ((dict(nnodes=2), 'rendezvous=HOST:PORT'), (dict(rank=1), 'numbered from 0 to 0'), (dict(restarts=-1), 'restarts -1'), (dict(nnodes=2, rendezvous='node1'), 'HOST:PORT of the first machine'),
                     (dict(rendezvous='node1:1'), 'say nnodes')):
        with pytest.raises(ValueError, match=re.escape(said)): launch(small(shapes), 1, **kw)
    with pytest.raises(ValueError, match='nproc 0'): launch(small(shapes), 0, nnodes=2, rendezvous='node1:29500')
    assert not outputs.exists()                                 # nothing was made before
    cfg = _said(['shapes_smoke', 'epochs=7', 'lr=2e-4', 'val_split=', 'options={}', 'ema_cpu=true', 'temporal_layers=2'])
    assert (cfg.epochs, cfg.lr, cfg.val_split, cfg.ema_cpu, cfg.temporal_layers, cfg.recipe) == (7, 2e-4, '', True, 2, 'shapes_smoke')
    with pytest.raises(ValueError, match="'more': what comes after"): _said(['shapes_smoke', 'more'])
    with pytest.raises(ValueError, match='epcohs'): _said(['shapes_smoke', 'epcohs=2'])
    with pytest.raises(ValueError, match='name its folder'): _said(['shapes_smoke', 'start=latest:shapes_meanP'])

def test_torchrun_that_would_find_the_dead_is_refused(monkeypatch):
    from vidlab.train import _keeps_addresses
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    _keeps_addresses()
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    with pytest.raises(ValueError, match='TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'): _keeps_addresses()
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'False')
    _keeps_addresses()

# ---------------------------------------------------------------------------------------------------- files for clusters

SBATCH = {'job-name', 'nodes', 'ntasks-per-node', 'gpus-per-node', 'cpus-per-task', 'time', 'signal', 'requeue', 'open-mode', 'output'}     # of sbatch, as used here


def test_the_script_for_slurm_is_whole():
    text = (CLUSTER/'slurm.sh').read_text()
    said = re.findall(r'^#SBATCH --([\w-]+)', text, re.M)
    assert set(said) == SBATCH and len(said) == len(set(said)) and text.index('#SBATCH') < text.index('set -uo')       # sbatch reads up to the first command
    assert subprocess.run(['bash', '-n', str(CLUSTER/'slurm.sh')]).returncode == 0


def job(): return {d['kind']: d for d in yaml.safe_load_all((CLUSTER/'kubernetes.yaml').read_text())}


def test_the_job_for_kubernetes_is_whole():
    service, j = job()['Service'], job()['Job']
    pod, env = j['spec']['template']['spec'], {e['name']: e['value'] for e in j['spec']['template']['spec']['containers'][0]['env']}
    assert (service['apiVersion'], j['apiVersion'], j['spec']['completionMode'], service['spec']['clusterIP']) == ('v1', 'batch/v1', 'Indexed', 'None')
    assert j['spec']['completions'] == j['spec']['parallelism'] == int(env['NODES']) and all(isinstance(v, str) for v in env.values())
    assert pod['containers'][0]['resources']['limits']['nvidia.com/gpu'] == int(env['PROCESSES'])
    name, port = env['MEET'].split(':')
    assert name == f'{j["metadata"]["name"]}-0.{pod["subdomain"]}' and pod['subdomain'] == service['metadata']['name']    # the first pod's name in that service
    assert int(port) == service['spec']['ports'][0]['port'] == pod['containers'][0]['ports'][0]['containerPort']
    assert service['spec']['selector'].items() <= j['spec']['template']['metadata']['labels'].items()
    assert {v['name'] for v in pod['volumes']} == {v['name'] for v in pod['containers'][0]['volumeMounts']} and pod['restartPolicy'] == 'OnFailure'
    recipe, *words = env['ARGS'].split()
    assert _said([recipe, *words]).data_path.startswith(pod['containers'][0]['volumeMounts'][0]['mountPath'])


def typed(cfg): return ['shapes_smoke', *(f'{k}={v}' for k, v in cfg.items())]


def words(shapes): return dict(data_path=shapes, clip='random', max_frames=2, batch_size=8, eval_batch_size=8, lr=1e-3, workers=0, log_every=1, device='cpu', precision='fp32', head='meanP', **WORDS)


def of_recipe(shapes):
    from vidlab.train import config_from
    return config_from('shapes_smoke', **{k: str(v) if k == 'data_path' else v for k, v in words(shapes).items()})


@pytest.mark.long
def test_the_job_for_kubernetes_runs(shapes, tmp_path, fault):
    "Two pods on this machine; a rank is killed, torchrun starts all of them again"
    c = job()['Job']['spec']['template']['spec']['containers'][0]
    env = {e['name']: e['value'] for e in c['env']} | dict(PROCESSES='1', MEET=f'127.0.0.1:{free_port()}', RUN=str(tmp_path/'run'), ARGS=' '.join(typed(words(shapes))))
    pods = [subprocess.Popen([*c['command'], *c['args']], env={**os.environ, **env}, cwd=tmp_path) for _ in range(2)]
    assert [p.wait(300) for p in pods] == [0, 0] and fault.exists() and RunFolder(tmp_path/'run').status()['state'] == 'done'
    same(run(of_recipe(shapes)).path, tmp_path/'run')


SRUN = """#!/bin/bash
# as many launchers as there are machines; ends all when one fails, as --kill-on-bad-exit=1
while [[ $1 == --* ]]; do shift; done
for i in $(seq $SLURM_JOB_NUM_NODES); do SLURM_NODEID=$((i-1)) "$@" & echo $! >> "$SRUN_PIDS"; done
code=0
while [ -n "$(jobs -pr)" ]; do wait -n || { code=$?; kill $(jobs -pr) 2>/dev/null; }; done
exit $code
"""


@pytest.mark.long
def test_the_script_for_slurm_runs(shapes, tmp_path, monkeypatch, fault):
    "A launcher is killed in step 3; the job starts again, as Slurm's --requeue does, and comes to the same numbers"
    monkeypatch.setenv('FAULT', 'wait')
    bin_ = tmp_path/'bin'
    bin_.mkdir()
    for name, text in dict(srun=SRUN, scontrol='#!/bin/bash\n[ $1 = show ] && echo 127.0.0.1 || echo "$@" >> "$SRUN_PIDS.requeued"\n').items():
        (bin_/name).write_text(text)
        (bin_/name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{bin_}{os.pathsep}{os.environ["PATH"]}', 'SLURM_JOB_NODELIST': 'here', 'SLURM_JOB_NUM_NODES': '2', 'SLURM_JOB_ID': '7', 'SLURM_GPUS_ON_NODE': '1', 'RESTARTS': '0',
           'PORT': str(free_port()), 'SRUN_PIDS': str(tmp_path/'pids')}
    cmd, out = ['bash', str(CLUSTER/'slurm.sh'), str(tmp_path/'run'), *typed(words(shapes))], RunFolder(tmp_path/'run')
    p = subprocess.Popen(cmd, env=env, cwd=tmp_path)
    until = time.time() + 240
    while (out.status() or {}).get('step') != 3 and time.time() < until and p.poll() is None: time.sleep(.1)
    agents = (tmp_path/'pids').read_text().split()
    workers = [c for a in agents for c in psutil.Process(int(a)).children(recursive=True)]
    fault.touch()                                               # nothing stands any more
    os.kill(int(agents[1]), signal.SIGKILL)
    assert p.wait(120) != 0
    _, alive = psutil.wait_procs(workers, timeout=40)
    assert alive == [] and state_of(out.path)['state'] in ('stopped', 'failed', 'dead') and 2 <= max(losses(out.path)) <= 3
    assert subprocess.run(cmd, env=env, cwd=tmp_path, timeout=300).returncode == 0 and out.status()['state'] == 'done'
    same(run(of_recipe(shapes)).path, tmp_path/'run')
