"`vidlab recipes NAME`: what a recipe is, what it expects where, and the command that starts it."
import re
import pytest
from vidlab.cli import recipes_for, show_recipes
from vidlab.config import as_written, fits, list_addons, list_recipes, read_recipe, read_tables
from vidlab.expects import files_of, show_recipe, sources_of
from vidlab.registry import layout_of

ROWS = {r.name: r for t in read_tables().values() for r in t.recipes}
RECIPES = list_recipes()
PUBLIC = [n for n in RECIPES if ROWS[n].table not in ('shapes', 'own')]


@pytest.mark.parametrize('recipe', RECIPES)
def test_it_says_what_is_needed(recipe):
    "Every split, file and published number, within 80 columns; a line without a space may be wider"
    text, keys = show_recipe(recipe, 80), ROWS[recipe].keys
    assert all(len(l) <= 80 or ' ' not in l.strip(' ├└') for l in text.splitlines())
    assert text.splitlines()[-1].startswith(f'vidlab {ROWS[recipe].page} {recipe}')
    said = ' '.join(text.split())
    for k, v in ROWS[recipe].paper.items(): assert f'{k} {v}' in said
    for w in ('data_path', 'video_root', 'eval_path', 'eval_root'):
        if keys.get(w): assert keys[w].split('{')[0] in text, w
    for w in ('start', 'teacher'): assert not keys.get(w) or f'{w}={keys[w]}' in said


@pytest.mark.parametrize('recipe', PUBLIC)
def test_public_sets_have_pages_and_places(recipe):
    for s in sources_of(as_written(recipe)[1], ROWS[recipe].page):
        assert layout_of(s.data, s.words).pages, s.data
        assert s.uses and all(what for _, what in files_of(s)) and len(files_of(s)) >= 1


def test_a_split_is_a_place():
    "Where places hold {split}, those that are read are written out, and no other"
    found = dict(files_of(sources_of(as_written('k400_tvts_ft')[1])[0]))
    assert [p for p in found if p.endswith('.csv')] == ['data/k400/train.csv', 'data/k400/val.csv', 'data/k400/test.csv']
    two = [p for s in sources_of(as_written('cc3m_webvid_tvts')[1]) for p, _ in files_of(s)]
    assert {'data/webvid/webvid_train.tsv', 'data/webvid/webvid_val.tsv', 'data/webvid/train', 'data/webvid/val', 'data/cc3m/cc3m_train.tsv', 'data/cc3m/training'} == set(two)


def test_options_choose_the_files():
    names = lambda r, **more: [p.strip('├└ ') for s in sources_of(as_written(r)[1] | more) for p, _ in files_of(s)]
    assert 'MSRVTT_train.9k.csv' in names('msrvtt9k_meanP_b32') and 'MSRVTT_train.7k.csv' in names('msrvtt7k_meanP_b32') and 'mine.csv' in names('msrvtt7k_meanP_b32', train_csv='mine.csv')
    assert 'trainlist02.txt' in names('ucf101_tvts_ft', fold=2) and 'scene/{train,val,test}.csv' in names('lvu_videomamba_scene')
    assert '78687/{:05d}.jpg' in names('ssv1_tdsclip_b16') and '78687.webm' in names('ssv2_tdsclip_b16')
    assert 'lvu_durations.csv' in names('lvu_videomamba_scene') and not [n for n in names('lvu_videomamba_scene', durations='none') if 'durations' in n]


def joins():
    for a in list_addons():
        for n in RECIPES:
            if set(ROWS[a].to) <= set(ROWS[n].keys) and fits(ROWS[a], ROWS[n].keys): yield f'{n}+{a}'

def test_joins_are_read_as_they_run():
    "What is shown without looking at models and tasks is what a run gets"
    places = ('data', 'data_path', 'video_root', 'train_split', 'val_split', 'test_split', 'eval_data', 'eval_path', 'eval_root', 'more', 'start', 'classes', 'missing')
    for j in joins():
        shown, real = as_written(j)[1], read_recipe(j)
        assert {k: shown.get(k) for k in places} == {k: real.get(k) for k in places}, j
        assert f'+{j.split("+")[1]}' in show_recipe(j, 80)

def test_an_addon_selects_on_the_rows_of_the_numbers():
    "stan_compat and compat choose the best epoch where the published code does: on the test of each set, whatever it is called"
    for j in joins():
        if j.endswith('compat') and j.split('+')[1] in ('compat', 'stan_compat'):
            keys = read_recipe(j)
            assert keys['val_split'] == keys.get('test_split', 'test'), j


def test_whole_names_and_others():
    assert recipes_for('shapes_stan').startswith('shapes_stan\n') and recipes_for('shapes_sta') == show_recipes('shapes_sta') and recipes_for() == show_recipes()
    assert recipes_for('compat').startswith('+compat\n') and recipes_for('+compat') == recipes_for('compat')
    with pytest.raises(ValueError, match="did you mean 'stan_compat'"): recipes_for('k400_stan_b16+stan_compta')
    with pytest.raises(ValueError, match='is an add-on for recipes of model clip4clip'): recipes_for('k400_stan_b16+compat')


def test_a_data_set_that_declares_nothing():
    "The comments beside its parameters stand in"
    text = show_recipe('own_captions', 80)
    assert re.search(r'data_path=\.\.\. +to be given: the table itself', text)


@pytest.mark.parametrize('recipe,more', [('own_captions', ' data_path=...'), ('own_classes', ' video_root=...'), ('ucf101_zeroshot_stan_b16', ' start=...'), ('ssv2_v2v_tvts', ''), ('k400_stan_b16', ''),
                                         ('shapes_stan', ''), ('shapes_tvts_v2v', '')])
def test_the_command_names_what_has_to_be_given(recipe, more):
    assert show_recipe(recipe, 80).splitlines()[-1] == f'vidlab {ROWS[recipe].page} {recipe}{more}'
