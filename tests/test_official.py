"Every recipe starts on the data that its owners publish: miniatures in their forms, towers of a few layers, a batch of training and an evaluation."
import pytest
import official
from vidlab.config import fits, read_recipe, read_tables
from vidlab.core import read_json
from vidlab.train import config_from, launch, load_manifest, run, run_eval

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


def form_of(cfg):
    folder = (cfg.data_path or cfg.video_root).split('/')[1]
    for k in (cfg.recipe.split('+')[0], f'{folder}_{cfg.model}', f'{folder}_{cfg.data}', folder):
        if k in FORMS: return FORMS[k]


def small(recipe, mini, form=None, **more):
    "The recipe on a miniature, with a model that a CPU trains in a moment"
    cfg = config_from(recipe)
    words = mini(form or form_of(cfg))
    if not cfg.data_path: words.pop('data_path')
    if cfg.more: words['more'] = [dict(cfg.more[0], **words['more'])]
    if cfg.eval_data: words |= dict(zip(('eval_path', 'eval_root'), mini(FORMS[cfg.eval_data]).values()))
    tower = dict(TOWER[cfg.model])
    if cfg.options.get('depth', 1) and cfg.model in ('stan', 'mugstan'): tower['depth'] = 1
    if 'image_size' not in cfg.options: tower.pop('image_size', None)
    frames = dict(max_frames=4, eval_frames=0, max_words=16, eval_words=0)
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


def firsts():
    "A recipe of each table and data set"
    seen = {}
    for n in RECIPES: seen.setdefault((ROWS[n].table, form_of(config_from(n))), n)
    return list(seen.values())


def joins():
    "Every add-on with the first recipe that it is for"
    keys = {n: read_recipe(n) for n in RECIPES}
    return [f'{next(n for n, d in keys.items() if set(ROWS[a].to) <= set(d) and fits(ROWS[a], d))}+{a}' for a in ADDONS]


@pytest.mark.parametrize('recipe', firsts())
def test_starts(recipe, mini): dry_run(recipe, mini)

@pytest.mark.slow
@pytest.mark.parametrize('recipe', [n for n in RECIPES if n not in firsts()])
def test_starts_too(recipe, mini): dry_run(recipe, mini)

@pytest.mark.slow
@pytest.mark.parametrize('recipe', joins())
def test_starts_with_an_addon(recipe, mini): dry_run(recipe, mini)

@pytest.mark.parametrize('form', OTHERS)
def test_other_forms(form, mini): dry_run(OTHERS[form], mini, form)
