"""The command `vidlab` as a person and as a script use it: refusals before work, progress with and without a terminal, ends, interrupts."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from vidlab import cli
from vidlab.core import read_json, write_json
from vidlab.owner import take

ROOT = Path(__file__).resolve().parents[1]
WAIT = '''
import time
from vidlab.core import RunFolder, progress
folder = RunFolder.new(recipe)
folder.status('running')
try:
    for i in progress(range(steps), 'counting'): time.sleep(.1)
except KeyboardInterrupt:
    folder.status('stopped', step=i)
    (folder/'ckpt'/'last').mkdir()
if fail: raise ValueError('no file a.mp4\\nsay where it is')
'''


def page(folder):
    "A run page that counts instead of training"
    code = lambda s, *tags: dict(cell_type='code', id=str(abs(hash(s)))[:8], metadata=dict(tags=list(tags)), source=s, outputs=[], execution_count=None)
    head = "recipe:str = 'shapes_smoke' # its name\nresume:str = '' # run\n# counting\nsteps:int = 3 # how many\nfail:bool = False # in the end"
    nb = dict(cells=[dict(cell_type='markdown', id='a', metadata={}, source='# Train\n\n> Counts'), code(head, 'parameters'), code(WAIT),
                     code("print('the table of', steps)", 'result')],
              metadata=dict(kernelspec=dict(name='nobody-has-this', language='python', display_name='x')), nbformat=4, nbformat_minor=5)
    folder.mkdir(parents=True)
    write_json(folder/'train.ipynb', nb)


@pytest.fixture
def command(tmp_path):
    "`vidlab` on that page, in a process of its own"
    page(tmp_path/'pages')
    start = ('import sys; from pathlib import Path; from vidlab import cli; '
             f'cli.run_pages = lambda: dict(train=Path({str(tmp_path/"pages"/"train.ipynb")!r})); sys.exit(cli.main())')
    env = {**os.environ, 'VIDLAB_OUTPUTS': str(tmp_path/'outputs'), 'PYTHONPATH': str(ROOT), 'TERM': 'xterm', 'COLUMNS': '100'}
    def go(*args, **kw):
        return subprocess.Popen([sys.executable, '-c', start, *args], **{**dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env), **kw})
    return go


def kernels():
    import psutil
    return [p for p in psutil.Process().children(recursive=True) if 'ipykernel_launcher' in ' '.join(p.cmdline())]


def ask(code):
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return r.returncode, r.stdout, r.stderr


def test_help_and_refusals_import_nothing_heavy():
    "Neither help nor a misspelt word waits for torch or papermill"
    heavy = "; print('heavy', [m for m in ('torch', 'papermill', 'pandas', 'matplotlib') if m in sys.modules])"
    for args, code in ((['--help'], 0), (['train', '--help'], 0), (['recipes', 'shapes'], 0), (['recipes', 'k400_stan_b16+stan_compat'], 0), (['train', 'shapes_smokee'], 2),
                       (['train', 'shapes_smoke', 'epoch=2'], 2), (['train', 'shapes_smoke', 'epochs=two'], 2)):
        rc, out, err = ask(f'import sys; from vidlab import cli; rc = cli.main({args!r}){heavy}; sys.exit(rc)')
        assert (rc, out.splitlines()[-1]) == (code, 'heavy []'), (args, out, err)
    assert ask("import resource; from vidlab import cli; cli.main(['--help']); u = resource.getrusage(resource.RUSAGE_SELF); "
               "assert u.ru_utime + u.ru_stime < 1.5")[0] == 0


@pytest.mark.parametrize('args, said', [
    (['trein', 'x'], "did you mean 'train'"), (['train', 'shapes_seqtransf'], "did you mean 'shapes_seqTransf'"),
    (['train', 'shapes_smoke', 'batchsize=3'], "did you mean 'batch_size'"), (['train', 'shapes_smoke', 'lr=fast'], "'fast' is not a float"),
    (['train', 'shapes_smoke', '--epochs', '2'], 'name=value'), (['attention', 'shapes_stan'], 'first: vidlab train shapes_stan'),
    (['train', 'shapes_smoke', 'seed=1', 'seed=2'], 'given twice'), (['compare', 'shapes_meanP', 'shapes_nope'], 'unknown recipe')])
def test_refused_before_a_kernel(args, said, outputs, capsys, monkeypatch):
    "What cannot run is refused in one line that names the nearest word"
    monkeypatch.setattr(cli, 'run_page', lambda *a: pytest.fail('a kernel was to be started'))
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_names_of_runs(outputs, monkeypatch):
    "A folder is itself, a recipe its newest run, else the recipe as it starts"
    got = []
    monkeypatch.setattr(cli, 'run_page', lambda name, values: got.append(values) or 0)
    assert cli.main(['evaluate', 'shapes_stan']) == 0
    for n in ('20260101-000000_a', '20260102-000000_b'):
        write_json(outputs/'shapes_stan'/n/'config.json', {})
        write_json(outputs/'shapes_stan'/n/'ckpt'/'best'/'card.json', {})
    cli.main(['evaluate', 'shapes_stan', 'dsl=true'])
    cli.main(['attention', str(outputs/'shapes_stan'/'20260101-000000_a')])
    new, old = (str(outputs/'shapes_stan'/n) for n in ('20260102-000000_b', '20260101-000000_a'))
    assert got == [dict(recipe='shapes_stan'), dict(run=new, dsl=True), dict(run=old)]


def test_lists(outputs, capsys):
    "Recipes are filtered; a run whose process is gone is dead"
    assert cli.main(['recipes', 'seqtransf']) == 0
    assert 'shapes_seqTransf' in (out := capsys.readouterr().out) and 'videomamba' not in out
    for state, pid in (('done', 1), ('running', 2**22 + 9), ('running', os.getpid())):
        p = outputs/'shapes_stan'/f'{pid}'
        write_json(p/'config.json', {})
        write_json(p/'status.json', dict(state=state, pid=pid, step=3, total_steps=9, heartbeat=time.time()))
        write_json(p/'eval'/'test.json', dict(metrics=dict(R1=45.25)))
    take(outputs/'shapes_stan'/f'{os.getpid()}')                # this process is its owner
    cli.main(['runs'])
    rows = {l.split()[-1].rsplit('/')[-1]: l.split()[1] for l in capsys.readouterr().out.splitlines()[1:]}
    assert rows == {'1': 'done', str(2**22 + 9): 'dead', str(os.getpid()): 'running'}
    cli.main(['runs', 'dead'])
    assert 'test R1 45.25' in (out := capsys.readouterr().out) and len(out.splitlines()) == 2


def test_plain_lines_and_the_end(command, tmp_path):
    "Into a pipe go whole lines, the result and where things lie; the page lies in the run folder; the kernel is this interpreter"
    out, err = (p := command('train', 'shapes_smoke', 'steps=25')).communicate(timeout=60)
    assert p.returncode == 0, err
    assert 'the table of 25' in out and '\x1b' not in out and '\r' not in out
    assert any(l.startswith('[0:') and 'counting' in l and '/25' in l for l in out.splitlines())
    run, = (tmp_path/'outputs'/'shapes_smoke').iterdir()
    assert (run/'train.ipynb').exists() and f'vidlab evaluate {run}' in out
    assert not list((tmp_path/'outputs'/'train').iterdir())


def test_a_page_that_fails(command, tmp_path):
    "One error, its cell and the executed page; no traceback of papermill"
    out, err = (p := command('train', 'shapes_smoke', 'fail=true')).communicate(timeout=60)
    assert p.returncode == 1
    assert 'vidlab train failed: cell [3]: ValueError: no file a.mp4\nsay where it is' in out
    assert 'Traceback' not in out + err and len(out.splitlines()) < 12
    assert list(tmp_path.glob('outputs/shapes_smoke/*/train.ipynb'))


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_interrupt(command, sign, tmp_path):
    "The kernel gets the signal once; the end says how to go on; nothing is left running"
    p = command('train', 'shapes_smoke', 'steps=600')
    while 'counting' not in (line := p.stdout.readline()): assert line
    assert kernels()
    p.send_signal(sign)
    if sign == signal.SIGTERM: p.send_signal(sign)          # as `timeout` does
    out, _ = p.communicate(timeout=30)
    run, = (tmp_path/'outputs'/'shapes_smoke').iterdir()
    assert p.returncode == 130, out
    assert f'vidlab train shapes_smoke steps=600 resume={run}' in out
    assert not kernels()


def test_a_terminal_and_two_interrupts(command, tmp_path):
    "On a terminal a bar is drawn in place; the second Ctrl-C ends at once and leaves no kernel"
    import pty
    ours, theirs = pty.openpty()
    p = command('train', 'shapes_smoke', 'steps=600', stdin=theirs, stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    seen = b''
    while b'counting' not in seen: seen += os.read(ours, 4096)
    assert kernels()
    p.send_signal(signal.SIGINT)
    p.send_signal(signal.SIGINT)
    try:
        while more := os.read(ours, 4096): seen += more
    except OSError: pass                                   # the other end is closed
    assert p.wait(20) == 130
    assert b'\x1b[' in seen and '━'.encode() in seen
    assert not kernels()


def test_tools_by_name(capsys):
    "A data tool takes its own arguments and gives its own status"
    assert cli.main(['check_videos', '--help']) == 0
    assert 'check_videos' in capsys.readouterr().out
    assert cli.main(['make_manifest', 'no_such_format']) != 0

def test_an_app_without_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, 'voila', None)
    assert cli.main(['app', 'search', str(tmp_path)]) == 2 and 'pip install vidlab[app]' in capsys.readouterr().err
