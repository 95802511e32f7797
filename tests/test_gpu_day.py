"The day with a GPU: its table and its exit status with checks that fail, hang and have no time; with --long the whole of it, dry on the CPU."
import math, subprocess, time
from pathlib import Path

import pandas as pd
import pytest
import torch

import gpu_day
from gpu_day import Row, each
from vidlab.learner import make_engine

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device('cpu')


def good(device, left): yield Row('a step', 'STAN', 'bf16', 2., 'ms', 'fp32', 4., 'yes')

def bad(device, left): yield Row('loss', 'TVTS', 'bf16', 3., '', 'fp32', 2., 'no', 'off')

def broken(device, left):
    yield Row('before', ok='yes')
    raise RuntimeError('out of | memory')

def slow(device, left):
    yield Row('begun', ok='yes')
    while True:
        try: time.sleep(.02)
        except Exception: pass                  # the time of a check ends even where errors are swallowed


def day(monkeypatch, capsys, tmp_path, *args, **checks):
    monkeypatch.setattr(gpu_day, 'CHECKS', checks)
    code = gpu_day.main(['--device', 'cpu', '--out', str(tmp_path), *args])
    return code, pd.read_csv(tmp_path/'table.csv', keep_default_na=False), (tmp_path/'table.md').read_text(), capsys.readouterr().out


def test_the_table_and_the_exit_status(monkeypatch, capsys, tmp_path):
    code, table, text, said = day(monkeypatch, capsys, tmp_path, good=(good, 9))
    assert code == 0 and said.startswith('no CUDA device') and list(table) == list(gpu_day.COLUMNS)
    assert table.iloc[0].tolist() == ['a step', 'STAN', 'bf16', 2, 'ms', 'fp32', 4, .5, 'yes', ''] and table.iloc[1].what == 'good: all of it'
    assert '| a step | STAN | bf16 | 2 | ms | fp32 | 4 | 0.5 | yes |  |' in text and text in said and 'dry run' in text
    code, table, text, said = day(monkeypatch, capsys, tmp_path, bad=(bad, 9), broken=(broken, 9), slow=(slow, .05), good=(good, 9))
    assert code == 1 and table.ok.tolist().count('no') == 3
    no = table[table.ok == 'no'].set_index('what').note
    assert no['loss'] == 'off' and no['broken'] == 'failed: RuntimeError: out of | memory' and 'longer than its 0' in no['slow']
    assert {'a step', 'before', 'begun'} <= {*table.what}                   # what came before stays, and the checks go on
    widths = {l.count('|') for l in text.splitlines() if l.startswith('|')}
    assert widths == {len(gpu_day.COLUMNS) + 1} and 'NOT: loss TVTS bf16 off' in said
    assert day(monkeypatch, capsys, tmp_path, '--limit', '0', good=(good, 9))[0] == 1


def test_what_does_not_fit_is_not_begun():
    left = [9.]
    def f(s):
        left[0] -= 5
        yield Row('x', s, ok='yes')
    rows = list(each(['a', 'b', 'c'], 'x', lambda: left[0], f))
    assert [(r.system, r.ok) for r in rows] == [('a', 'yes'), ('b', 'not here'), ('c', 'not here')]
    def f(s):
        if s == 'a': raise ValueError('of a')
        yield Row('x', s)
    rows = list(each(['a', 'b'], 'x', lambda: 9., f))
    assert [(r.system, r.note) for r in rows] == [('a', 'failed: ValueError: of a'), ('b', '')]


def test_a_scale_that_overflows_and_a_batch_of_nan(tmp_path):
    "The rows that only a GPU makes in a day, with the scaler of a CPU"
    task, batch = gpu_day.built('CLIP4Clip', 'cpu')
    engine = make_engine('fp32', 'cpu')
    engine.scaler, engine.native_amp = torch.amp.GradScaler('cpu', init_scale=2.**125), True         # above what the gradients of fp32 hold
    learn = gpu_day.Learner(task, torch.optim.SGD(task.parameters(), lr=1e-3), gpu_day.Same(batch), tmp_path, 1, engine)
    learn.engine.state._mixed_precision = 'fp16'                            # the guard leaves gradients to the scaler
    try:
        losses, ms = gpu_day.stepped(learn, batch, 3)
        assert len(losses) == len(ms) == 3 and learn.skipped > 0 and losses[-1] < losses[0]
        row = gpu_day.overflow_row(learn, batch, 'CLIP4Clip', 'fp16', 3e38)
        assert (row.ok, row.value) == ('yes', 1)
        assert gpu_day.guard_row(learn, batch, 'CLIP4Clip', 'fp16').ok == 'yes'
        engine.scaler.update()                                              # the refused step has used up its own
        learn._guard = lambda batches: None
        assert gpu_day.guard_row(learn, batch, 'CLIP4Clip', 'fp16').ok == 'no'
    finally: make_engine('fp32', 'cpu')


@pytest.mark.parametrize('system', gpu_day.SYSTEMS)
def test_recipes_of_a_gpu_are_there(system):
    from vidlab.config import config_from
    big, small = (config_from(gpu_day.SYSTEMS[system][d][0]) for d in ('cuda', 'cpu'))
    assert (big.model, big.task) == (small.model, small.task)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_whole_day_dry(tmp_path):
    p = subprocess.run(['bash', 'tests/gpu_day.sh', '--device', 'cpu', '--out', str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-2000:]
    table = pd.read_csv(tmp_path/'table.csv', keep_default_na=False)
    ended = {w.split(':')[0] for w in table.what if w.endswith(': all of it')}
    assert ended == {*gpu_day.CHECKS} and not (table.ok == 'no').any() and (table.ok == 'yes').sum() > 60
    steps = table[table.what == 'step'].set_index(['system', 'precision']).value
    assert all(math.isfinite(float(steps[s, p])) for s in gpu_day.SYSTEMS for p in ('fp32', 'bf16'))
