"""Every golden case of a folder: `pytest tests/test_golden.py --golden DIR`. The checks live in `tests/goldens/`."""
import json
from pathlib import Path

import pytest

import goldens

DIFFERS = Path(__file__).parent/'golden'/'differs.toml'


def read_differs(path=DIFFERS):
    "Entries (system, kind, sub, reason) of the list of known differences"
    try: import tomllib
    except ModuleNotFoundError: import tomli as tomllib          # pytest brings tomli along before Python 3.11
    entries = tomllib.loads(path.read_text(encoding='utf-8')).get('differs', []) if path.exists() else []
    for e in entries:
        if set(e) != {'system', 'kind', 'sub', 'reason'} or not all(str(v).strip() for v in e.values()):
            raise pytest.UsageError(f'{path}: an entry needs exactly system, kind, sub and reason, none empty: {e}')
    return entries


def find_cases(folder):
    "(path, case) of every JSON file under `folder` that has a `system` and a `kind`"
    folder = Path(folder)
    if not folder.is_dir(): raise pytest.UsageError(f'--golden {folder}: no such folder')
    found = []
    for p in sorted(folder.rglob('*.json')):
        try: case = json.loads(p.read_text(encoding='utf-8'))
        except ValueError as e: raise pytest.UsageError(f'{p}: not JSON: {e}')
        if isinstance(case, dict) and 'system' in case and 'kind' in case: found.append((p, case))
    if not found:
        raise pytest.UsageError(f'--golden {folder}: no golden cases (JSON files with "system" and "kind") in it')
    return found


def pytest_generate_tests(metafunc):
    if 'golden' in metafunc.fixturenames:
        goldens.load_kinds()
        cases = find_cases(metafunc.config.getoption('--golden'))
        ids = [f"{c['system']}/{c['kind']}/{c.get('case', p.stem)}" for p, c in cases]
        metafunc.parametrize('golden', cases, ids=ids)


def test_golden(golden):
    path, case = golden
    tensors = path.with_suffix('.safetensors')
    if tensors.exists():
        from safetensors.torch import load_file
        tensors = load_file(tensors)
    else: tensors = None
    differs = goldens.run_case(case, tensors, read_differs())
    if differs: pytest.xfail('; '.join(f'{sub}: {reason}' for sub, reason in differs))


def test_checks_import():
    goldens.load_kinds()
    assert not goldens.BROKEN, '\n'.join(goldens.BROKEN.values())


def test_differs_known():
    "An entry of differs.toml names a kind that exists"
    goldens.load_kinds()
    unknown = [e for e in read_differs() if (e['system'], e['kind']) not in goldens.KINDS]
    assert not unknown, f'differs.toml lists kinds without a check: {unknown}'


def test_runner_refuses(tmp_path):
    "Empty folders and unknown kinds fail; a listed sub-case is reported with its reason; `close` follows the rule"
    with pytest.raises(pytest.UsageError): find_cases(tmp_path)
    with pytest.raises(pytest.UsageError): find_cases(tmp_path/'nowhere')
    (tmp_path/'a').mkdir(); (tmp_path/'b.json').write_text('[1]')
    (tmp_path/'a'/'x.json').write_text('{"system": "s", "kind": "k"}')
    assert [c['kind'] for _, c in find_cases(tmp_path)] == ['k']
    with pytest.raises(AssertionError, match='no check'): goldens.run_case(dict(system='s', kind='nope'), None, [])
    try:
        @goldens.kind('s', 'k')
        def _check(case, tensors):
            with goldens.sub('odd'): assert case['odd']
            with goldens.sub('even'): assert case['even']
        listed = [dict(system='s', kind='k', sub='odd', reason='on purpose')]
        case = dict(system='s', kind='k', odd=False, even=True)
        assert goldens.run_case(case, None, listed) == [('odd', 'on purpose')]
        assert goldens.run_case(dict(case, odd=True), None, listed) == []
        with pytest.raises(AssertionError): goldens.run_case(case, None, [])
        with pytest.raises(AssertionError): goldens.run_case(dict(case, even=False), None, listed)
    finally: goldens.KINDS.pop(('s', 'k'), None)
    nan = float('nan')
    goldens.close('x', [1., nan, 100.], [1.05, nan, 100.], 1e-3)
    for bad in ([1., nan], [1.2, nan, 100.], [1., 1., 100.], [nan, nan, 100.]):
        with pytest.raises(AssertionError): goldens.close('x', bad, [1.05, nan, 100.], 1e-3)
    with pytest.raises(AssertionError): goldens.close_grad('g', [1e-3], [1.1e-3], 1e-2)
