"Before the first step: what will be needed later is tried, nothing of the run changes, and a failure says why in its folder"
from collections import namedtuple
import glob, shutil
import pytest
import torch
from conftest import encode
from vidlab import preflight as P
from vidlab.build import build_learner
from vidlab.core import RunFolder
from vidlab.learner import make_engine
from vidlab.train import make_config, run

pytestmark = pytest.mark.usefixtures('outputs')
CLIPS = dict(model='clip4clip', preset='tiny', weights='random', clip='tiny', head='tightTransf', temporal_layers=1, data='manifest', sampler='segment', max_frames=2, max_words=8,
             epochs=1, batch_size=2, eval_batch_size=2, lr=1e-3, workers=0, device='cpu', log_every=1, check=True)
CLASSES = dict(model='videomamba', preset='tiny', dim=16, state=2, image_size=32, task='recognition', data='manifest', sampler='segment', max_frames=2, epochs=1, batch_size=2,
               eval_batch_size=2, lr=1e-3, workers=0, device='cpu', log_every=1)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    "Twelve clips of half a second, and tables about them"
    d = tmp_path_factory.mktemp('videos')
    for i in range(12): encode(d/f'{i}.mp4', n=6, w=48, h=32, rate=12)
    def table(head='path,text,split', row=lambda i, part: f'{i}.mp4,clip {i},{part}'):
        (d/'t.csv').write_text('\n'.join([head, *(row(i, ('train', 'val', 'test')[i//4]) for i in range(12))]) + '\n')
        return str(d/'t.csv')
    return table


def folder_of(outputs):
    found = glob.glob(str(outputs/'*'/'*'))
    assert len(found) == 1
    return RunFolder(found[0])


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder/'ckpt'/'last'/'weights.safetensors')


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_is_the_same_with_and_without(videos, monkeypatch, workers, capsys):
    "tightTransf draws dropout; the same weights to the last bit, and the random state in the checkpoint"
    cfg = make_config(**{**CLIPS, 'data_path': videos(), 'workers': workers, 'test_split': '', 'epochs': 2})
    one = run(cfg)
    assert 'tried before the first step: a batch of training, two batches of the val split' in capsys.readouterr().out
    monkeypatch.setattr('vidlab.train.preflight', lambda learn: '')
    two = run(cfg)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rng = [torch.load(f/'ckpt'/'last'/'state.pt', weights_only=True)['rng'][0]['torch'] for f in (one, two)]
    assert torch.equal(*rng) and not torch.equal(rng[0], torch.random.manual_seed(0).get_state())


def test_counters_and_modes_come_back(videos, monkeypatch):
    "Batch norm that counts, frozen parts in their own mode, draws of every generator"
    learn = build_learner(make_config(**{**CLASSES, 'data_path': videos('path,label,split', lambda i, s: f'{i}.mp4,{"ab"[i%2]},{s}')}), RunFolder.new('x'), make_engine(device='cpu'))
    task = learn.raw_task
    task.norm, task.frozen = torch.nn.BatchNorm1d(2), torch.nn.Dropout().eval()
    score, forward = task.eval_step, type(task).forward
    def noisy(self, batch):
        self.norm(torch.randn(4, 2)); import numpy, random; numpy.random.rand(); random.random()
        return forward(self, batch)
    monkeypatch.setattr(type(task), 'forward', noisy)
    from vidlab.learner import rng_state
    before = rng_state(), {k: v.clone() for k, v in task.state_dict().items()}, {n: m.training for n, m in task.named_modules()}
    P.preflight(learn)
    after = rng_state(), task.state_dict(), {n: m.training for n, m in task.named_modules()}
    assert all(torch.equal(before[1][k], after[1][k]) for k in after[1]) and before[2] == after[2] and after[1]['norm.num_batches_tracked'] == 0
    assert before[0]['python'] == after[0]['python'] and all(torch.equal(before[0][k], after[0][k]) for k in ('torch', 'numpy')) and before[0]['pos'] == after[0]['pos']
    assert all(p.grad is None for p in task.parameters()) and not learn.opt.state


@pytest.mark.parametrize('split', ['val', 'test'])
def test_an_evaluation_that_cannot_work_fails_before_the_first_step(videos, outputs, monkeypatch, split):
    "Also when it fails in the model, or where the numbers are made; of which one it is, stands in the folder"
    from vidlab.tasks import RetrievalTask
    real, seen = RetrievalTask.score, []
    def score(self, parts, expected=None):
        seen.append(0)
        if len(seen) == ('val', 'test').index(split) + 1: raise ZeroDivisionError('no numbers')
        return real(self, parts, expected)
    monkeypatch.setattr(RetrievalTask, 'score', score)
    with pytest.raises(ZeroDivisionError): run(make_config(**{**CLIPS, 'data_path': videos()}))
    s = folder_of(outputs).status()
    assert s['state'] == 'failed' and not s.get('step') and s['reason'].startswith(f"before the first step, trying the {split} split '{split}': ZeroDivisionError")


def test_a_full_disk_is_told(videos, outputs, monkeypatch):
    Usage = namedtuple('Usage', 'total used free')
    monkeypatch.setattr(P.shutil, 'disk_usage', lambda p: Usage(2**30, 2**30, 2**10))
    with pytest.raises(OSError, match=r'checkpoints of this run take up to \d+ MiB and the disk has 1 MiB left: make room, or let .* VIDLAB_OUTPUTS'):
        run(make_config(**{**CLIPS, 'data_path': videos()}))
    assert 'trying the disk' in folder_of(outputs).status()['reason']


def test_room_is_what_the_checkpoints_take(videos):
    "Two of `last` are there for a moment, and one of each other"
    learn = build_learner(make_config(**{**CLIPS, 'data_path': videos(), 'epochs': 3, 'keep_every': 1, 'ema': .9}), RunFolder.new('x'), make_engine(device='cpu'))
    said = P.room_needed(learn)
    learn.fit()
    size = lambda name: sum(f.stat().st_size for f in (learn.folder/'ckpt').glob(f'{name}/*'))
    took = 2*size('last') + size('best') + size('epoch*')
    assert .9*took < said < 1.3*took, (said, took)


def test_all_that_is_missing_is_said_at_once(videos, outputs):
    "Captions of a blind test split, a split that is not there, weights that are not there"
    table = videos(row=lambda i, s: f'{i}.mp4,{"" if s == "test" else "clip"},{s}')
    with pytest.raises(ValueError, match="3 things are missing or wrong") as e: run(make_config(**{**CLIPS, 'data_path': table, 'val_split': 'dev', 'start': 'nowhere'}))
    assert all(w in str(e.value) for w in ("unknown split 'dev'", "no row has caption", "start 'nowhere'"))


@pytest.mark.parametrize('split', ['train', 'test'])
def test_times_behind_the_end(videos, outputs, split, capsys):
    "In training such clips are left out and counted; an evaluation names them before the first step"
    table = videos('path,text,start,end,split', lambda i, s: f'{i}.mp4,clip {i},{9 if i in (0, 8) and s == split else 0},{10 if i in (0, 8) and s == split else .4},{s}')
    cfg = make_config(**{**CLIPS, 'data_path': table, 'batch_size': 3 if split == 'train' else 2})
    if split == 'train':
        f = run(cfg)
        assert f.status()['state'] == 'done' and f.status()['step'] == 1 and '0.mp4' in (f/'unread.json').read_text()
    else:
        with pytest.raises(Exception, match=r'1 of 4 clips of the evaluation: .*8\.mp4.*no frame lies within 9'): run(cfg)


@pytest.mark.parametrize('labels,task,said', [(['0.5', '1.5'], 'recognition', 'numbers with a fraction'), (['0 1', '2'], 'same_class', 'several of a clip'), (['0.5', '1'], 'same_class', 'fraction')])
def test_labels_of_another_kind(videos, labels, task, said):
    table = videos('path,label,split', lambda i, s: f'{i}.mp4,{labels[i%2]},{s}')
    base = {**CLASSES, 'data_path': table, 'classes': '3', 'task': task}
    if task == 'same_class': base = {**CLIPS, 'data_path': table, 'classes': '3', 'task': task}
    from vidlab.build import all_rows
    with pytest.raises(ValueError, match=said): all_rows(make_config(**base))


def test_a_contrastive_batch_of_one_is_refused(videos, outputs):
    with pytest.raises(ValueError, match='batch_size to 2'): run(make_config(**{**CLIPS, 'data_path': videos(), 'batch_size': 1}))
    assert 'trying a batch of training' in folder_of(outputs).status()['reason']


def test_a_long_evaluation_by_itself_is_tried_first(videos, outputs, monkeypatch):
    "What fails in the score, fails before all clips are decoded; a short one goes straight on"
    from vidlab.tasks import RetrievalTask
    from vidlab.train import run_eval
    seen = []
    def eval_step(self, batch, real=RetrievalTask.eval_step):
        seen.append(len(batch['sid'])); return real(self, batch)
    def score(self, parts, expected=None): raise ZeroDivisionError('no numbers')
    monkeypatch.setattr(RetrievalTask, 'eval_step', eval_step); monkeypatch.setattr(RetrievalTask, 'score', score)
    table = videos(row=lambda i, s: f'{i}.mp4,clip {i},test')
    for size, steps in ((1, 4), (4, 6)):
        seen.clear()
        with pytest.raises(ZeroDivisionError): run_eval(make_config(**{**CLIPS, 'data_path': table, 'eval_batch_size': size}))
        assert len(seen) == steps, seen


def test_a_rate_that_no_file_has_says_so(videos, outputs):
    "Frames a second above those of every file: the reason, and not a batch that cannot be filled"
    with pytest.raises(Exception, match=r'4 of 4 clips cannot be read, more than bad_limit.*rate 30 is more frames per second than the video has'):
        run(make_config(**{**CLIPS, 'data_path': videos(), 'sampler': 'grid', 'rate': 30}))
