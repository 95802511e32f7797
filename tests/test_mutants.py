"The list of one-line faults fits the code (running them is a command of its own: `python tests/mutants.py`)."
import re
import pytest

from mutants import ROOT, Mutant, changed, guard, load, page_of

MUTANTS = load()
NAMED = ('ema-never-updated', 'validation-by-current-weights', 'accumulation-sums', 'temperature-never-clamped', 'rollout-wrong-order', 'old-checkpoint-deleted-first', 'split-hash-blind-to-captions')


def test_the_list():
    ids = [m.id for m in MUTANTS]
    assert len(set(ids)) == len(ids) >= 60 and set(NAMED) <= set(ids)
    assert all(re.fullmatch(r'[a-z0-9-]+', i) for i in ids) and all(m.why.strip() for m in MUTANTS)

@pytest.mark.parametrize('m', MUTANTS, ids=lambda m: m.id)
def test_the_right_line_is_there_once(m):
    "In its module and in its page; with the fault both are still Python; its guards exist"
    changed(m)
    for g in m.guards: assert (ROOT/'nbs'/g if g.endswith('.ipynb') else ROOT/g.split(' ')[0].split('::')[0]).exists(), g

def test_a_line_that_moved_is_an_error():
    with pytest.raises(ValueError, match='stands 0 times in vidlab.core'): changed(Mutant('x', 'core', 'no such line', '', 'w', ['page']))
    with pytest.raises(ValueError, match='not once'): changed(Mutant('x', 'core', 'return', 'pass', 'w', ['page']))
    m = MUTANTS[0]
    with pytest.raises(ValueError, match='changes nothing'): changed(Mutant(m.id, m.module, m.old, m.old, m.why, ['page']))
    with pytest.raises(ValueError, match='0 pages'): page_of('nowhere')

def test_a_guard_says_what_it_saw(tmp_path):
    (tmp_path/'test_x.py').write_text('import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(60)\n')
    assert guard('test_x.py::test_a', tmp_path, 60)[0] == 'passes'
    state, said = guard('test_x.py -k test_b', tmp_path, 60)
    assert state == 'fails' and 'assert 0' in said
    assert guard('test_x.py::test_c', tmp_path, 2)[0] == 'hangs'
