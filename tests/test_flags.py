"Every flag of the official scripts has its place: something that exists here, or a reason; the page shows all of them."
import json, re
from collections import Counter
from pathlib import Path

import pytest

from vidlab.flags import exists, flag_table, read_flags, systems

ROOT = Path(__file__).parents[1]
SYSTEMS = ('clip4clip', 'stan', 'tdsclip', 'tvts', 'videomamba')
ROWS = dict(clip4clip=56, stan=107, tdsclip=77, tvts=137, videomamba=164)      # a flag that is lost on the way is noticed


def test_the_systems(): assert tuple(systems()) == SYSTEMS

@pytest.mark.parametrize('system', SYSTEMS)
def test_every_flag_is_something_or_has_a_reason(system):
    about, flags = read_flags(system)
    assert len(flags) == ROWS[system] and ':' in about
    wrong = [f for f in flags if bool(f.ours) == bool(f.why.strip()) or f.ours and not exists(f.ours)]
    assert wrong == [], 'neither a name that exists nor a reason'
    assert [k for k, n in Counter((f.script, f.name) for f in flags).items() if n > 1] == []
    assert all(re.fullmatch(r'-{0,2}[A-Za-z][\w.-]*', f.name) for f in flags)

@pytest.mark.parametrize('system', SYSTEMS)
def test_no_flag_stands_twice_in_a_file(system):
    "YAML keeps the last of two equal keys and says nothing"
    text = (ROOT/'nbs'/'runs'/'flags'/f'{system}.yaml').read_text()
    assert len(re.findall(r'^  \S+?: ', text, re.M)) == ROWS[system]

def test_a_name_that_nobody_takes_is_found():
    for ours in ('mix_probability', 'train.resum', 'evaluate.nproc', 'page tests', 'tool zip', 'augment erase-fill=red', 'recipe nothing', 'nothing lr'): assert not exists(ours), ours
    assert exists('train.nproc') and exists('augment jitter') and exists('mix_prob') and exists('keep_every')

def test_what_a_reference_says_is_there():
    "A reason such as `as --show-dir` names a flag of the same script"
    for s in SYSTEMS:
        flags = read_flags(s)[1]
        for f in flags:
            for named in re.findall(r'(?:as|of) (--[\w-]+)$', f.why): assert any(o.name == named and o.script == f.script for o in flags), f

def test_the_page_shows_every_system():
    code = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/'tour'/'flags.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    assert {m for c in code for m in re.findall(r"show_flags\('(\w+)'\)", c)} == set(SYSTEMS)
    for s in SYSTEMS: assert len(flag_table(s)) == ROWS[s] and (flag_table(s)[['here', 'official']] != '').all().all()

def test_reasons_are_shown():
    t = flag_table('clip4clip').set_index('official')
    assert t.loc['--coef_lr', 'here'] == 'coef_lr' and t.loc['--margin', 'here'] == '–' and t.loc['--margin', 'remark'].startswith('of a loss')
