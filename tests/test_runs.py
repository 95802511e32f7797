"Whole runs on a few rendered clips: resume to the last bit, two processes equal one, bad files, papermill."
import json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
import pytest
import torch
import warm
from vidlab.core import RunFolder, read_json
from vidlab.data.shapes import make_shapes
from vidlab.train import config_from, launch, make_config, run, run_eval, start_folder
from pages import execute, pairs, papermill

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    "A small embedded data set: 32 train, 8 val, 8 test clips"
    return make_shapes(tmp_path_factory.mktemp('shapes'), kinds=('clips',), sizes=dict(clips=dict(train=32, val=8, test=8)))

pytestmark = pytest.mark.usefixtures('outputs')

def small(shapes, **kw):
    "Config of a run of 2 x 4 steps with an untrained tiny CLIP; tightTransf has dropout, so random states matter"
    base = dict(data='shapes', data_path=str(shapes), clip='random', head='seqTransf', temporal_layers=1, sampler='segment', max_frames=4, epochs=2, batch_size=8,
                eval_batch_size=8, lr=1e-3, workers=0, log_every=1, device='cpu')
    return make_config(**{**base, **kw})

def weights(folder, which='last'):
    from safetensors.torch import load_file
    return load_file(folder/'ckpt'/which/'weights.safetensors')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def losses(folder): return [r['loss'] for r in folder.metrics() if r['kind'] == 'step']

def spawn(folder, **env):
    return warm.Popen([sys.executable, '-m', 'vidlab.train', str(folder.path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, **env})

# ---------------------------------------------------------------------------------------------------- resume

@pytest.mark.slow
@pytest.mark.parametrize('workers,sig,head', [(2, signal.SIGTERM, 'seqTransf'),
    *(pytest.param(*p, marks=pytest.mark.long) for p in ((0, signal.SIGKILL, 'tightTransf'), (2, signal.SIGKILL, 'seqTransf')))])
def test_stop_anywhere_and_resume_is_bit_for_bit(shapes, workers, sig, head):
    cfg = small(shapes, workers=workers, head=head, save_every=1, test_split='')
    whole = run(cfg)
    cut = start_folder(cfg)
    p = spawn(cut)
    t = time.time()
    while len(losses(cut)) < 3 and p.poll() is None and time.time() - t < 120: time.sleep(.02)
    p.send_signal(sig); out = p.communicate(timeout=60)[0]
    state = cut.status()
    if sig == signal.SIGKILL: assert (p.returncode, state['state']) == (-9, 'running'), out[-2000:]
    else: assert (p.returncode, state['state']) == (0, 'stopped'), out[-2000:]
    assert 0 < len(losses(cut)) < 8, 'the signal came too late to prove anything'
    other = weights(cut) if sig == signal.SIGTERM else weights(run(small(shapes, head=head, seed=1, test_split='')))
    run(cfg, resume=str(cut.path))
    assert cut.status()['state'] == 'done'
    assert same(weights(whole), weights(cut)) and not same(weights(whole), other)         # the comparison can fail

@pytest.mark.slow
def test_resume_refuses_other_settings(shapes):
    cfg = small(shapes, epochs=1, test_split='')
    folder = run(cfg)
    with pytest.raises(ValueError, match='lr 0.001 -> 0.01'): run(small(shapes, epochs=1, lr=.01, test_split=''), resume=str(folder.path))
    with pytest.raises(FileNotFoundError, match='no run there'): run(cfg, resume='nowhere')
    more = run(small(shapes, epochs=2, test_split=''), resume=str(folder.path))      # more epochs are allowed, and trained
    assert more.status()['epoch'] == 2 and more.status()['state'] == 'done'

@pytest.mark.slow
def test_optimiser_state_is_safe_to_load(shapes):
    folder = run(small(shapes, epochs=1, test_split='', optimizer='bertadam', ema=.9, accum=2))
    state = torch.load(folder/'ckpt'/'last'/'state.pt', weights_only=True)
    assert state['step'] == 2 and len(state['optimizer']['state'])
    assert (folder/'ckpt'/'last'/'ema.safetensors').exists()

def test_without_validation_the_last_averaged_weights_are_measured_and_named(shapes):
    from vidlab.core import file_hash
    folder = run(small(shapes, epochs=1, val_split='', ema=.5))
    w = read_json(folder/'eval'/'test.json')['protocol']['weights']
    assert w == dict(file='ckpt/last/ema.safetensors', sha256=file_hash(folder/'ckpt'/'last'/'ema.safetensors'), step=4)
    again = run_eval(small(shapes, start=str(folder.path)))
    assert read_json(again/'eval'/'test.json')['metrics'] == read_json(folder/'eval'/'test.json')['metrics']

# ---------------------------------------------------------------------------------------------------- processes

@pytest.mark.slow
@pytest.mark.parametrize('head', ['seqTransf', pytest.param('tightTransf', marks=pytest.mark.long)])
def test_two_processes_train_as_one(shapes, head, warm_ranks):
    "Same losses and weights as one process on the joined batch, and the same evaluation"
    kw = dict(epochs=1, head=head, dropout=0.) if head == 'tightTransf' else dict(epochs=1, head=head)
    one, two = run(small(shapes, **kw)), launch(small(shapes, **kw), 2)
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4, atol=1e-5)        # float32 sums in another order
    a, b = weights(one), weights(two)
    # Adam turns a rounding difference of a gradient near zero into a whole step, so compare what most weights did
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a if a[k].is_floating_point()])
    assert (moved > 1e-4).float().mean() < .01
    ma, mb = (read_json(f/'eval'/'test.json')['metrics'] for f in (one, two))
    assert (ma['texts'], ma['videos']) == (mb['texts'], mb['videos']) == (8, 8)

def test_a_batch_that_processes_cannot_share(shapes, outputs):
    "Said before any of them starts"
    with pytest.raises(ValueError, match='multiple of 2'): launch(small(shapes, batch_size=7), 2)
    assert not list(Path(os.environ['VIDLAB_OUTPUTS']).glob('*/*'))

# ---------------------------------------------------------------------------------------------------- unreadable files

@pytest.fixture
def mixed(shapes, tmp_path):
    "The data set with an empty, a cut and a missing-header file among the clips of every split"
    root = tmp_path/'mixed'
    shutil.copytree(shapes, root)
    import pandas as pd
    broken = {}
    for split in ('train', 'test'):
        rows = pd.read_csv(root/'clips'/f'{split}.csv')
        for path, data in zip(rows['path'][:2], (b'', b'<html>not found</html>')):
            p = root/'clips'/path
            p.unlink(); p.write_bytes(data)
            broken.setdefault(split, []).append(p.name)
        torn(root/'clips'/rows['path'][2])
        broken[f'{split} torn'] = [Path(rows['path'][2]).name]
    return root, broken

def torn(path):
    "A packet in the middle is overwritten with zeros: readable, with a frame less"
    import av
    with av.open(str(path)) as c: at, size = [(p.pos, p.size) for p in c.demux(video=0) if p.size][5]
    data = bytearray(path.read_bytes())
    data[at:at+size] = bytes(size)
    path.write_bytes(data)

def test_training_goes_on_without_bad_files_and_names_them(mixed):
    root, broken = mixed
    folder = run(small(root, epochs=1, val_split='', test_split=''))
    assert folder.status()['state'] == 'done'
    report = read_json(folder/'unread.json')
    assert sorted(Path(p).name for p in report) == sorted(broken['train'])
    assert all(report.values())
    warned = read_json(folder/'warned.json')                              # and what the decoder said of one that could be read
    assert [Path(p).name for p in warned] == broken['train torn'] and 'damaged' in str(warned)

def test_training_stops_above_the_limit(mixed):
    root, _ = mixed
    with pytest.raises(RuntimeError, match='bad_limit=0.01'): run(small(root, epochs=1, val_split='', test_split='', bad_limit=.01))

def test_evaluation_refuses_bad_files_or_counts_them_as_missed(mixed):
    root, broken = mixed
    with pytest.raises(Exception, match=broken['test'][0].replace('.', r'\.')): run_eval(small(root))
    said = read_json(run_eval(small(root, on_bad='miss'))/'eval'/'test.json')
    m = said['metrics']
    assert [Path(p).name for p in said['protocol']['warned']] == broken['test torn']
    assert (m['texts'], m['videos'], m['unread'], m['t2v/nan_queries']) == (8, 8, 2, 2)

# ---------------------------------------------------------------------------------------------------- parameters

def test_precisions_and_options(shapes):
    with pytest.raises(ValueError, match='fp16'): run(small(shapes, precision='fp16'))
    folder = run(small(shapes, epochs=1, precision='bf16', accum=2, grad_checkpointing=True, layer_decay=.8, test_split=''))
    assert folder.status()['step'] == 2

@pytest.mark.slow
def test_weights_of_another_head(shapes):
    first = run(small(shapes, epochs=1, head='meanP', test_split=''))
    second = run(small(shapes, epochs=1, head='seqTransf', weights=str(first.path), test_split=''))
    assert second.status()['state'] == 'done'

def test_typos_name_the_nearest_word(shapes):
    with pytest.raises(ValueError, match="did you mean 'epochs'"): make_config(epcohs=3)
    with pytest.raises(ValueError, match="did you mean 'seqTransf'"): run(small(shapes, head='seqTranf'))
    with pytest.raises(ValueError, match="did you mean 'msrvtt9k_meanP_b32'"): config_from('msrvtt9k_meanP_b23')
    with pytest.raises(ValueError, match='not an int'): make_config(epochs='many')

def test_official_data_missing_says_which_path():
    with pytest.raises(FileNotFoundError, match='data_path'): run(config_from('msrvtt9k_meanP_b32', device='cpu'))

# ---------------------------------------------------------------------------------------------------- papermill

def test_train_page_lists_every_setting():
    "`papermill --help-notebook` shows every field of RunConfig and every option of models, tasks and data sets with its meaning, as the registries have them now"
    import ast
    from vidlab.config import FIELDS, parameters_cell
    from vidlab.registry import KINDS, names, options
    cell = ''.join(next(c for c in json.loads((ROOT/'nbs'/'runs'/'train.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))['source'])
    assert cell.endswith(parameters_cell()), 'the cell is not what the registries say: run `make export`'
    there = [n.target.id for n in ast.parse(cell).body]
    words = {o.name for k in KINDS for n in names(k) for o in options(k, n).values() if not o.given}
    assert set(there) == {*FIELDS} - {'options'} | {'resume', 'nproc', 'nnodes', 'rank', 'rendezvous', 'restarts'} | words and len(there) == len(set(there))
    assert [l for l in cell.splitlines() if not l.startswith('#') and '#' not in l] == []

@pytest.mark.slow
def test_papermill_train_then_evaluate_and_attention(shapes, tmp_path):
    "The three run pages one after the other on one run"
    r = papermill('train.ipynb', tmp_path/'train.ipynb', *pairs(recipe='shapes_smoke', data_path=shapes, clip='random', epochs=2, batch_size=8, workers=0))
    assert r.returncode == 0, r.stderr[-3000:]
    folder = next((tmp_path/'outputs').glob('*/*'))
    assert read_json(folder/'config.json')['epochs'] == 2 and read_json(folder/'status.json')['state'] == 'done'
    text = (tmp_path/'train.ipynb').read_text()
    assert text.count('training 8/8') == 1, 'progress leaves exactly one line'
    execute('evaluate.ipynb', run=str(folder), workers=0)
    again = next(p for p in (tmp_path/'outputs').glob('*/*') if p != folder)
    a, b = (read_json(f/'eval'/'test.json') for f in (folder, again))
    assert a['metrics'] == b['metrics'] and a['protocol']['weights']['sha256'] == b['protocol']['weights']['sha256']
    execute('attention.ipynb', run=str(folder), sid=3, caption='a small red circle')
    maps = np.load(folder/'figs'/'test3_integrated.npz')['maps']
    assert maps.shape == (8, 4, 4) and (maps >= 0).all() and (folder/'figs'/'test3_integrated.gif').stat().st_size > 1000

@pytest.mark.long
def test_papermill_cost(tmp_path):
    r = papermill('cost.ipynb', tmp_path/'cost.ipynb', '-y', 'recipes: [shapes_probe, shapes_tdsclip]', *pairs(batch_size=2, frames=2, rounds=1, precision='fp32', device='cpu'))
    assert r.returncode == 0, r.stderr[-3000:]
    assert 'shapes_tdsclip : shapes_probe' in (tmp_path/'cost.ipynb').read_text()

@pytest.mark.slow
@pytest.mark.parametrize('kernel', ['here', pytest.param('papermill', marks=pytest.mark.long)])
def test_papermill_compare(shapes, tmp_path, kernel):
    "The page of `make run`, on a few clips"
    words = dict(data_path=str(shapes), epochs=1, workers=0, batch_size=8)
    if kernel == 'here': execute('compare.ipynb', **words)
    else: assert (r := papermill('compare.ipynb', tmp_path/'compare.ipynb', *pairs(**words))).returncode == 0, r.stderr[-3000:]
    text = (tmp_path/'outputs'/'compare'/'summary.txt').read_text()
    for word in ('shapes_meanP', 'shapes_seqTransf', 'shapes_stan', 'shapes_mugstan', 't2v R1', 'v2t MnR', 'clips/s', 'peak MiB', 'executed notebook', 'ckpt/best'): assert word in text, word
    figs = next((tmp_path/'outputs'/'compare').glob('*/figs'))
    assert {p.stem for p in figs.glob('*.png')} >= {'curves', 'patches', 'branch', 'time', 'words'}      # of the last recipe, Mug-STAN

@pytest.mark.parametrize('name,value,near', [('epcohs', '2', 'epochs'), ('recipe', 'shapes_smok', 'shapes_smoke')])
@pytest.mark.parametrize('kernel', ['here', pytest.param('papermill', marks=pytest.mark.long)])
def test_papermill_typo(tmp_path, name, value, near, kernel):
    "In this process the cells with what papermill would put in; papermill itself takes a kernel's start"
    if kernel == 'here':
        with pytest.raises(ValueError, match=f"did you mean '{near}'"): execute('train.ipynb', **{name: value})
    else:
        r = papermill('train.ipynb', tmp_path/'out.ipynb', *pairs(**{name: value}))
        assert r.returncode != 0 and f"did you mean '{near}'" in r.stderr


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from vidlab.train import config_from, launch, start_folder
signal.signal(signal.SIGINT, signal.default_int_handler)              # a shell's background processes ignore it
cfg = config_from('shapes_smoke', **eval(sys.argv[1]))
out = Path(os.environ['VIDLAB_OUTPUTS'])
def interrupt(): # when the run has its folder and its processes begin
    while not list(out.glob('*/*/launch.log')): threading.Event().wait(.1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
folder = launch(cfg, 2)
assert start_folder(cfg, str(folder.path)).path == folder.path
print(folder.status()['state'], *(p.name for p in folder.path.glob('error_*')))
"""

def test_launched_and_interrupted_before_the_first_step(shapes, outputs):
    "Ctrl-C while the processes start: the run is stopped, not failed, and can be gone on with"
    words = dict(data_path=str(shapes), clip='random', batch_size=8, workers=0, device='cpu', epochs=50)
    r = warm.run([sys.executable, '-c', INTERRUPTED, repr(words)], capture_output=True, text=True)
    assert r.stdout.split()[-1:] == ['stopped'], r.stdout + r.stderr[-2000:]
