"""Every recipe of the zoo resolves to what is written down in recipes.json, one line each, so that a change of a recipe is a deliberate one.

Renew the file after such a change with `python tests/test_recipes.py` and read its diff."""
import dataclasses, json, re
from pathlib import Path
import pytest
import yaml
from vidlab.config import FIELDS, WORDS, RunConfig, config_from, fits, flat, list_addons, list_recipes, make_config, read_recipe, read_tables
from vidlab.registry import KINDS, lookup, names, options
from vidlab.results import zoo, zoo_addons

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).with_name('recipes.json')
# the joins that pages and README speak of
JOINED = ['msrvtt9k_meanP_b32+compat', 'msrvtt9k_meanP_b32+patch3d', 'msrvtt9k_stan_b32+stan_compat', 'ssv2_tdsclip_b16+tdsclip_compat', 'ssv2_tdsclip_b16+unfrozen',
          'k400_videomamba_s_f8+videomamba_compat', 'k400_videomamba_m_pretrain+videomamba_pretrain_compat', 'lvu_videomamba_scene+lvu_windows', 'lvu_videomamba_like_ratio+lvu_windows',
          'yttemporal_tvts+tvts_compat']

def resolved(): return {n: read_recipe(n) for n in sorted([*list_recipes(), *list_addons(), *JOINED])}

def write(): STORED.write_text('{\n' + ',\n'.join(f'{json.dumps(n)}: {json.dumps(d, sort_keys=True)}' for n, d in resolved().items()) + '\n}\n', encoding='utf-8')

def test_recipes_resolve_as_written_down():
    stored, now = json.loads(STORED.read_text(encoding='utf-8')), resolved()
    assert sorted(stored) == sorted(now), 'recipes came or went: python tests/test_recipes.py'
    assert {n: {k: (stored[n].get(k), d.get(k)) for k in {*stored[n], *d} if stored[n].get(k) != d.get(k)} for n, d in now.items() if stored[n] != d} == {}

@pytest.mark.parametrize('table', [t.name for t in read_tables().values()])
def test_config_is_the_recipe_and_defaults(table):
    "Nothing of a recipe is lost on the way to its config, and nothing comes in"
    for r in (r for r in read_tables()[table].recipes if not r.to):
        cfg = flat(config_from(r.name))
        default = flat(make_config(**{k: r.keys[k] for k in ('model', 'task', 'data', 'eval_data', 'more') if k in r.keys}))
        assert {k: v for k, v in cfg.items() if k in r.keys} == r.keys
        assert {k: v for k, v in cfg.items() if k not in r.keys and k != 'recipe'} == {k: v for k, v in default.items() if k not in r.keys and k != 'recipe'}

def test_words_of_tables_are_no_keys():
    "A row's words and its keys stand side by side, so no field or option may have the name of a word"
    assert {w for words in WORDS.values() for w in words} & ({*FIELDS} | {o for k in KINDS for n in names(k) for o in options(k, n)}) == set()

@pytest.mark.parametrize('table', [t.name for t in read_tables().values()])
def test_table(table):
    "Every row says what it is, its numbers have a source and the names of our metrics, and no part is left over"
    t = read_tables()[table]
    d = yaml.safe_load((ROOT/'nbs'/'runs'/'recipes'/f'{table}.yaml').read_text(encoding='utf-8'))
    assert set(d.get('parts', {})) == {p for r in d.get('rows', {}).values() for p in r.get('use', [])} and t.what
    for r in t.recipes:
        assert r.what and (r.source or not r.paper) and set(r.paper) <= set(lookup('task', r.keys.get('task', RunConfig.task)).columns), r.name
        assert (ROOT/'nbs'/'runs'/f'{r.page}.ipynb').exists(), r.name
        assert r.to or read_recipe(r.name).get('model'), r.name

def test_zoo_page_shows_every_table():
    shown = re.findall(r"zoo\('(\w+)'\)", ''.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/'tour'/'zoo.ipynb').read_text(encoding='utf-8'))['cells']))
    assert sorted(shown) == sorted(t.name for t in read_tables().values() if not all(r.to for r in t.recipes))
    assert sorted(n for t in shown for n in zoo(t).index) == list_recipes() and sorted(zoo_addons().index) == sorted(list_addons())

def test_addons():
    "Listed apart, each fits some recipe, and alone or in the wrong place it says what it is for"
    addons = {r.name: r for t in read_tables().values() for r in t.recipes if r.to}
    assert set(addons) == set(list_addons()) and not set(addons) & set(list_recipes())
    keys = {n: read_recipe(n) for n in list_recipes()}
    for n, a in addons.items():
        assert any(set(a.to) <= set(d) and fits(a, d) for d in keys.values()), n
        with pytest.raises(ValueError, match=rf'{n!r} is an add-on for recipes of .*, e\.g\. \w+\+{n}; {n} alone is no recipe'): config_from(n)
    with pytest.raises(ValueError, match=r"e\.g\. \w+\+videomamba_compat; ssv2_tdsclip_b16\+videomamba_compat has model tdsclip"): config_from('ssv2_tdsclip_b16+videomamba_compat')
    with pytest.raises(ValueError, match='lvu_windows'): config_from('compat+lvu_windows')
    with pytest.raises(ValueError, match="did you mean 'lvu_windows'"): config_from('lvu_videomamba_scene+lvu_window')

def test_file_of_ones_own(tmp_path):
    "A YAML leaf with a base, alone and joined on either side; nothing but its path is needed"
    mine, more = tmp_path/'mine.yaml', tmp_path/'more.yaml'
    mine.write_text('base: msrvtt9k_meanP_b32\nepochs: 2\nlr: 1.0e-3\n'); more.write_text('epochs: 3\n')
    cfg = config_from(str(mine))
    assert (cfg.epochs, cfg.lr, cfg.data, cfg.recipe) == (2, 1e-3, 'msrvtt', 'mine')
    cfg = config_from(f'{mine}+compat+{more}')
    assert (cfg.epochs, cfg.lr, cfg.optimizer, cfg.recipe) == (3, 1e-4, 'bertadam', 'mine+compat+more')
    with pytest.raises(ValueError, match='mine.yaml.stan_compat has model clip4clip'): config_from(f'{mine}+stan_compat')
    mine.write_text(f'base: {more}\nhead: meanP\n')
    assert config_from(f'{mine}').epochs == 3
    mine.write_text('base: msrvtt9k_meanP_b32\nepocs: 2\n')
    with pytest.raises(ValueError, match=f"recipe {re.escape(str(mine))}: unknown parameter 'epocs'; did you mean 'epochs'"): config_from(str(mine))

def test_files_need_no_tables(tmp_path, monkeypatch):
    from vidlab import config
    def none(): raise FileNotFoundError('no tables here')
    monkeypatch.setattr(config, 'recipes_dir', none)
    for n in 'ab': (tmp_path/f'{n}.yaml').write_text(f'{dict(a="epochs", b="lr")[n]}: 3\n')
    cfg = config_from(f'{tmp_path}/a.yaml+{tmp_path}/b.yaml')
    assert (cfg.epochs, cfg.lr) == (3, 3.)

TOY = '''what: toy
common: {model: clip4clip}
parts:
  seq: {what: seqTransf, head: seqTransf}
rows:
  toy_seq: {use: [seq], epochs: 9}
addons:
  toy_add: {what: more, to: {model: clip4clip}, patch: 3d}
'''

@pytest.mark.parametrize('old,new,message', [
    ('epochs', 'epocs', "toy.yaml, toy_seq: unknown key 'epocs'; did you mean 'epochs'?"), ('head:', 'haed:', "toy.yaml, toy_seq: unknown key 'haed'; did you mean 'head'?"),
    ('use:', 'uses:', "toy.yaml, toy_seq: unknown key 'uses'; did you mean 'use'?"), ('[seq]', '[sequ]', "toy.yaml, row toy_seq: unknown part 'sequ'; did you mean 'seq'?"),
    ('[seq]', 'seq', "toy.yaml, row toy_seq: use: 'seq' is not a list"), ('model: clip4clip}\nparts', 'model: clip4clp}\nparts', "toy.yaml, toy_seq: unknown model 'clip4clp'; did you mean 'clip4clip'?"),
    ('common', 'comon', "toy.yaml: unknown word 'comon'; did you mean 'common'?"), ('to: {model: clip4clip}, ', '', 'toy.yaml, add-on toy_add: `to` is missing'), ('epochs: 9', 'epochs: 9, epochs: 8', "'epochs' stands twice")])
def test_what_is_wrong_with_a_table(old, new, message, tmp_path, monkeypatch):
    "File, row and nearest word; a table is read anew when its file has changed"
    folder = tmp_path; monkeypatch.setattr('vidlab.config.recipes_dir', lambda: folder)
    (folder/'toy.yaml').write_text(TOY)
    assert read_recipe('toy_seq+toy_add') == dict(model='clip4clip', head='seqTransf', epochs=9, patch='3d')
    assert old in TOY
    (folder/'toy.yaml').write_text(TOY.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)): config_from('toy_seq')

def test_one_name_in_two_tables(tmp_path, monkeypatch):
    folder = tmp_path; monkeypatch.setattr('vidlab.config.recipes_dir', lambda: folder)
    for n in ('one', 'two'): (folder/f'{n}.yaml').write_text(TOY)
    with pytest.raises(ValueError, match="'toy_seq' stands in one.yaml and in two.yaml"): list_recipes()

if __name__ == '__main__': write()
