"Every recipe starts on the data that its owners publish: miniatures in their forms, towers of a few layers, a batch of training and an evaluation."
from pathlib import Path
import pytest
import official
from vidlab.config import as_written, fits, further_set, read_recipe, read_tables
from vidlab.core import read_json
from vidlab.data.names import shipped_names
from vidlab.expects import sources_of
from vidlab.registry import layout_of
from vidlab.results import eval_table, load_eval
from vidlab.train import build_task, class_names, config_from, launch, load_manifest, run, run_eval

ROWS = {r.name: r for t in read_tables().values() if t.name not in ('shapes', 'own') for r in t.recipes}
RECIPES = [n for n, r in ROWS.items() if not r.to]
ADDONS = [n for n, r in ROWS.items() if r.to]
# folder that a recipe names -> form; where systems have their own forms, theirs
FORMS = dict(msrvtt='msrvtt', msvd='msvd', lsmdc='lsmdc', activitynet='activitynet', didemo='didemo', yttemporal='yttemporal', webvid='webvid', cc3m_webvid_tvts='webvid_cc3m',
             ssv1='something1', ssv2='something2', ssv2_list='something2_lists', k400='kinetics_mmaction', k400_videomamba='kinetics_videomamba', k400_videomamba_pretrain='kinetics_videomamba',
             k400_tvts_classifier='kinetics_videomae', ucf101='ucf101', hmdb51='hmdb51', breakfast='breakfast', coin='coin', lvu='lvu')
# forms beside those, each with a recipe
OTHERS = dict(kinetics_owners='k400_videomamba_ti_f8', kinetics_videomae='k400_stan_b16', kinetics_mmaction='k400_tdsclip_b16', something2_frames='ssv2_videomamba_ti_f8', something2_lists='ssv2_stan_b16',
              didemo_stan='didemo_stan_b32', webvid_shards='webvid10m_stan_b32')
TEXT = dict(model_type='distilbert', vocab_size=128, dim=128, n_layers=2, n_heads=2, hidden_dim=256, max_position_embeddings=64)
TOWER = dict(clip4clip=dict(preset='tiny', clip='tiny', weights='random', temporal_layers=1), stan=dict(preset='tiny', weights='random'), mugstan=dict(preset='tiny', weights='random'),
             tdsclip=dict(preset='tiny', weights='random', side_dim=64), videomamba=dict(preset='tiny', dim=32, depth=2, state=4, image_size=64),
             videomamba_pretrain=dict(preset='tiny', dim=32, depth=2, state=4, image_size=64, out_dim=64, teacher='tiny', teacher_weights='random'),
             tvts=dict(preset='tiny', weights='random', text=TEXT, text_weights='random', tokenizer='shapes', projection_dim=64), tvts_classifier=dict(preset='tiny', weights='random'))

pytestmark = pytest.mark.usefixtures('outputs')


@pytest.fixture(scope='session')
def clips(tmp_path_factory): return official.make_clips(tmp_path_factory.mktemp('clips'))


@pytest.fixture(scope='session')
def mini(tmp_path_factory, clips):
    "Words of a recipe that name a miniature; each is written once"
    made = {}
    def make(form):
        if form not in made: made[form] = getattr(official, form)(tmp_path_factory.mktemp('data')/form, clips)
        return dict(made[form])
    return make


def form_of(recipe):
    d = ROWS[recipe.split('+')[0]].keys
    folder = (d['data_path'] or d['video_root']).split('/')[1]
    for k in (recipe.split('+')[0], f'{folder}_{d["model"]}', f'{folder}_{d["data"]}', folder):
        if k in FORMS: return FORMS[k]


def small(recipe, mini, form=None, **more):
    "The recipe on a miniature, with a model that a CPU trains in a moment"
    cfg = config_from(recipe)
    words = mini(form or form_of(recipe))
    if not cfg.data_path: words.pop('data_path')
    if cfg.more: words['more'] = [dict(cfg.more[0], **words['more'])]
    if cfg.eval_data: words |= dict(zip(('eval_path', 'eval_root'), mini(FORMS[cfg.eval_data]).values()))
    tower = dict(TOWER[cfg.model])
    if cfg.options.get('depth', 1) and cfg.model in ('stan', 'mugstan'): tower['depth'] = 1
    if 'image_size' not in cfg.options: tower.pop('image_size', None)
    frames = dict(max_frames=4, eval_frames=0, max_words=16, eval_words=0, eval_clips=min(cfg.eval_clips, 2))
    return config_from(recipe, **{**tower, **frames, **words, 'start': '', 'epochs': 1, 'batch_size': 2, 'eval_batch_size': 4, 'accum': 1, 'workers': 0, 'log_every': 1,
                                  'precision': 'fp32', 'device': 'cpu', **more})


def dry_run(recipe, mini, form=None, **more):
    "A batch of training and the numbers; of a recipe for evaluation the numbers"
    cfg = small(recipe, mini, form, **more)
    if ROWS[recipe.split('+')[0]].page == 'evaluate': f = run_eval(cfg)
    else:
        f = run(cfg)
        assert [r for r in f.metrics() if r['kind'] == 'step']
    assert f.status()['state'] == 'done'
    return read_json(f/'eval'/f'{cfg.test_split}.json') if cfg.test_split else None


# words that say how large a model is and how long and fast it learns: here they are all the same, or a number like another
SIZES = {'preset', 'clip', 'depth', 'start', 'image_size', 'max_frames', 'eval_frames', 'max_words', 'eval_words', 'eval_clips', 'epochs', 'batch_size', 'eval_batch_size', 'accum', 'lr', 'coef_lr',
         'lr_batch', 'weight_decay', 'warmup', 'warmup_start', 'min_factor', 'layer_decay', 'drop_path', 'wave', 'tau', 'short_side', 'augment', 'missing', 'variant'}

def chosen():
    "Recipes that show every table and every form once; those that differ in more than sizes"
    seen, fast, slow = set(), [], []
    for n in RECIPES:
        show, kind = {ROWS[n].table, form_of(n)}, str(sorted((k, str(v)) for k, v in ROWS[n].keys.items() if k not in SIZES)) + str(ROWS[n].keys.get('depth') == 0)
        if not show <= seen: fast.append(n)
        elif kind not in seen: slow.append(n)
        seen |= {*show, kind}
    return fast, slow

FAST, SLOW = chosen()


def joins():
    "Every add-on with the first recipe that it is for, or one that has splits of its own"
    first = dict(compat='activitynet_meanP_b32', stan_compat='didemo_stan_b32')
    return [f'{first.get(a) or next(n for n in RECIPES if set(ROWS[a].to) <= set(ROWS[n].keys) and fits(ROWS[a], ROWS[n].keys))}+{a}' for a in ADDONS] + ['k400_stan_b16+stan_compat']


@pytest.mark.parametrize('recipe', FAST)
def test_starts(recipe, mini): dry_run(recipe, mini)

@pytest.mark.long
@pytest.mark.parametrize('recipe', SLOW)
def test_starts_too(recipe, mini): dry_run(recipe, mini)

@pytest.mark.long
@pytest.mark.parametrize('table', sorted({ROWS[n].table for n in RECIPES}))
def test_every_recipe_finds_its_rows(table, mini):
    for n in (n for n in RECIPES if ROWS[n].table == table):
        cfg = small(n, mini)
        for split in {cfg.train_split if ROWS[n].page == 'train' else cfg.test_split, cfg.val_split, cfg.test_split} - {''}: assert len(load_manifest(cfg, split)), (n, split)

@pytest.mark.long
@pytest.mark.parametrize('recipe', joins())
def test_starts_with_an_addon(recipe, mini): dry_run(recipe, mini)

def every_join():
    "Each add-on with each kind of rows that it may be joined to"
    seen = set()
    for a, n in ((a, n) for a in ADDONS for n in RECIPES if set(ROWS[a].to) <= set(ROWS[n].keys) and fits(ROWS[a], ROWS[n].keys)):
        keys = read_recipe(f'{n}+{a}')
        kind = (a, form_of(n), *(str(keys.get(k)) for k in ('data', 'variant', 'train_split', 'val_split', 'test_split', 'topic', 'more', 'eval_data')))
        if kind not in seen: yield f'{n}+{a}'
        seen.add(kind)

def test_every_addon_finds_its_rows(mini):
    "No add-on asks for a list that nobody publishes"
    for j in every_join():
        cfg = small(j, mini)
        for split in {cfg.train_split if ROWS[j.split('+')[0]].page == 'train' else cfg.test_split, cfg.val_split, cfg.test_split} - {''}: assert len(load_manifest(cfg, split)), (j, split)

def spelled(name):
    "'{a,b}.json' -> a.json, b.json"
    head, brace, rest = name.partition('{')
    if not brace: return [name]
    inner, _, tail = rest.partition('}')
    return [head + o + tail for o in inner.split(',')]

@pytest.mark.parametrize('form', sorted({form_of(n) for n in RECIPES}))
def test_what_a_recipe_says_is_there(form, mini):
    "The annotation files that `vidlab recipes NAME` names lie in the folder as it is published"
    for n in (n for n in RECIPES if form_of(n) == form):
        words = mini(form)
        for s in sources_of(as_written(n)[1], ROWS[n].page)[:1]:
            files = layout_of(s.data, s.words).path
            if not isinstance(files, dict): continue
            gone = [k for k in files if not all((Path(words['data_path'])/f).exists() for f in spelled(k))]
            assert all(files[k].startswith('version') for k in gone) and len(gone) < len(files), (n, gone)

@pytest.mark.parametrize('form', OTHERS)
def test_other_forms(form, mini): dry_run(OTHERS[form], mini, form)

@pytest.mark.long
@pytest.mark.parametrize('recipe', ['msrvtt9k_meanP_b32', 'yttemporal_tvts', 'k400_videomamba_m_pretrain', 'ssv2_tdsclip_b16', 'lvu_videomamba_view_count'])
def test_starts_in_two_processes(recipe, mini, warm_ranks):
    "One of each task that trains"
    f = launch(small(recipe, mini), 2)
    assert f.status()['state'] == 'done' and [r for r in f.metrics() if r['kind'] == 'step']


def numbered(cfg, split): # class of each video in words, by its file's name; number of classes
    m = load_manifest(cfg, split)
    names, stem = class_names(cfg, m), lambda p: Path(p).stem
    return {stem(r['path']): (r['label'], names[r['label']]) for r in map(m.row, range(len(m)))}, names


def test_kinetics_counts_alike_in_every_form(mini):
    "Four classes of 400: none is renumbered, in no form and no split"
    forms = ('kinetics_owners', 'kinetics_videomamba', 'kinetics_videomae', 'kinetics_mmaction')
    for split in ('train', 'val'):
        found = [numbered(small('k400_videomamba_ti_f8', mini, f), split) for f in forms]
        assert all(f == found[0] for f in found) and len(found[0][1]) == 400 and len(found[0][0]) == 4
        assert set(found[0][0].values()) == {(shipped_names('kinetics400').index(c), c) for c in official.KINETICS} >= {(0, 'abseiling'), (399, 'zumba')}
    alone = load_manifest(small('k400_videomamba_ti_f8', mini, 'kinetics_owners', classes=''), 'val')
    assert alone.column('label').tolist() == [0, 1, 196, 399] and len(alone.classes) == 400


def test_something_keeps_its_order(mini):
    "Version 2 counts as its labels.json; version 1 as its owners do, and for TDS-CLIP in alphabetical order"
    two = [numbered(small(*o), 'val')[0] for o in (('ssv2_tdsclip_b16', mini), ('ssv2_videomamba_ti_f8', mini, 'something2_frames'), ('ssv2_tvts_ft', mini))]
    assert two[0] == two[1] == two[2] and [c for _, c in two[0].values()] == list(official.SOMETHING2)
    (tds, names), (own, owners) = (numbered(small('ssv1_tdsclip_b16', mini, **o), 'val') for o in ({}, dict(class_order='owners')))
    assert names == sorted(owners) != owners == shipped_names('something1')
    assert [c for _, c in tds.values()] == [c for _, c in own.values()] == list(official.SOMETHING1)
    assert sum(a != b for a, b in zip(names, owners)) == 173 and [i for i, _ in own.values()][0] == 0 != [i for i, _ in tds.values()][0]


@pytest.mark.parametrize('recipe,n', [('ucf101_zeroshot_stan_b16', 101), ('hmdb51_zeroshot_stan_b16', 51), ('ucf101_tvts_ft', 101), ('hmdb51_tvts_ft', 51), ('coin_videomamba_ti_f32', 180), ('breakfast_videomamba_ti_f32', 10)])
def test_classes_are_the_whole_list(recipe, n, mini):
    "Three or four classes have videos; the others are not forgotten"
    found, names = numbered(cfg := small(recipe, mini), cfg.test_split)
    assert len(names) == n and 2 <= len({c for _, c in found.values()}) <= 4 and len(build_task(cfg).classes) == n
    assert all(c.lower() in stem.lower() for stem, (_, c) in found.items()) or recipe.startswith('coin')


@pytest.mark.parametrize('form,recipe', [('activitynet', 'activitynet_meanP_b32'), ('kinetics_owners', 'k400_stan_b16'), ('coin', 'coin_videomamba_ti_f32'), ('yttemporal', 'yttemporal_tvts'), ('webvid', 'webvid10m_stan_b32'), ('lvu', 'lvu_videomamba_scene')])
def test_what_is_gone_is_said(form, recipe, mini):
    "A video that vanished: an error that says what the originals do, or without it, counted"
    m = load_manifest(small(recipe, mini, form, missing='drop'), 'train')
    assert len(m.report['missing']) == 1 and len(m) >= 2
    with pytest.raises(ValueError, match="1 of . videos are missing.*pass missing='drop' to go on without them.* The original code leaves them out"):
        load_manifest(small(recipe, mini, form, missing='error'), 'train')


def test_paragraphs_of_didemo(mini):
    "In the owners' form and in STAN's, also by `data: captions`"
    for o in (('didemo_stan_b32', mini), ('didemo_stan_b32', mini, 'didemo_stan'), ('didemo_meanP_b32', mini, 'didemo_stan')):
        assert load_manifest(small(*o), 'train').column('text').to_pylist() == [' '.join(official.ANSWERS[:2])]*3
    assert len(load_manifest(small('didemo_stan_b32', mini, 'didemo_stan', data='captions'), 'train')) == 3
    assert len(load_manifest(small('didemo_stan_b32', mini, paragraph=False), 'train')) == 6


def test_captions_of_tvts_are_whole(mini):
    "Quotation marks are part of them, pictures need no ending, places may hold the split"
    cfg = small('cc3m_webvid_tvts', mini)
    said = load_manifest(cfg, 'train').column('text').to_pylist()
    assert said == list(official.ANSWERS)
    m = load_manifest(further_set(cfg, 0), 'train')
    assert m.column('text').to_pylist()[1::2] == ['"the end" , said the sign', 'hills in the "morning'] and not any('.' in p for p in m.column('path').to_pylist())


def test_split_in_the_root_of_an_evaluation(mini):
    words = mini('webvid_tvts')
    m = load_manifest(small('webvid10m_stan_b32', mini, eval_data='pairs', eval_path=words['data_path'], eval_root=words['video_root']), 'val')
    assert len(m) == 4 and m.root.name == 'val'


def test_lists_of_any_two_names(mini, outputs):
    "data_path={split}: the splits are the lists themselves, wherever they lie; numbers stay in the run folder under the last part of the name"
    folder = mini('something2_lists')['data_path'].parent
    train, val = (str(folder/f'sthv2_{s}_list_videos.txt') for s in ('train', 'val'))
    cfg = small('ssv2_stan_b16', mini, 'something2_lists', data_path='{split}', train_split=train, val_split=val, test_split=val)
    f = run(cfg)
    assert [p.name for p in (f/'eval').glob('*.json')] == ['sthv2_val_list_videos.txt.json'] and not list(folder.glob('*.json'))
    assert load_eval(f, val)['metrics']['clips'] == 4 and len(eval_table([f], val)) == 1
    assert [len(load_manifest(cfg, s)) for s in (train, val)] == [4, 4]


def test_activitynet_has_no_test_of_its_own(mini):
    a, b = (load_manifest(small('activitynet_meanP_b32+compat', mini), s) for s in ('val', 'test'))
    assert a.hash() == b.hash() and len(a) == 2
