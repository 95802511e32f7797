"One description of a run: whose each word is, what is refused and by whom, and that runs of before still read."
import dataclasses, inspect, json
import pytest
from vidlab import registry
from vidlab.config import FIELDS, changed, config_from, flat, load_config, make_config, options_of, parameters_cell, replaced, write_parameters
from vidlab.registry import KINDS, names, options, owners, register_model
from vidlab.train import evaluation_config, start_folder, unfinished_run

@pytest.fixture
def fresh(monkeypatch):
    "Registries that may be written to"
    for k in KINDS.values(): names(k.name)
    monkeypatch.setattr(registry, '_reserved', dict(registry._reserved))
    for k in KINDS.values(): monkeypatch.setattr(k, 'builders', dict(k.builders))

def test_every_word_has_one_kind_of_owner():
    "No option is a word of the run, and none has owners of two kinds"
    of = {}
    for k in KINDS:
        for n in names(k):
            for o in options(k, n).values():
                if not o.given: of.setdefault(o.name, set()).add(k)
    assert {w: k for w, k in of.items() if len(k) > 1 or w in FIELDS} == {}

def test_every_option_says_what_it_is():
    silent = [f'{k} {n}: {o.name}' for k in KINDS for n in names(k) for o in options(k, n, helps=True).values() if not o.given and not o.help]
    assert silent == []

def test_every_option_has_a_default():
    "So that a recipe may leave it out"
    assert [f'{k} {n}: {o.name}' for k in KINDS for n in names(k) for o in options(k, n).values() if not o.given and o.default is inspect.Parameter.empty] == []

@pytest.mark.parametrize('keys,said', [
    (dict(epcohs=1), "unknown parameter 'epcohs'; did you mean 'epochs'"),
    (dict(task='retrieval', smoothing=.1), "task retrieval has no option smoothing: it belongs to task recognition"),
    (dict(model='stan', patch='3d'), "model stan has no option patch: it belongs to model clip4clip"),
    (dict(data='ucf101', variant='7k'), "data ucf101 has no option variant: it belongs to data msrvtt"),
    (dict(data='ucf102'), "unknown data 'ucf102'; did you mean 'ucf101'"), (dict(task='retreival'), "did you mean 'retrieval'"),
    (dict(fold='two', data='ucf101'), "fold: 'two' is not an int"), (dict(gather=3), 'gather: 3 is not a str'),
    (dict(more=[dict(data='ucf101', kind='long')]), "more[0] {'data': 'ucf101', 'kind': 'long'}: unknown key 'kind'"),
    (dict(more=['ucf101']), "more[0] 'ucf101': a further training set is a dict")], ids=str)
def test_what_is_refused(keys, said):
    with pytest.raises(ValueError) as e: make_config(**keys)
    assert said in str(e.value)

def test_options_of_the_evaluation_set():
    "Training on one set and measuring on another: both bring their options"
    cfg = make_config(data='list', eval_data='ucf101', fold=2, label_offset=-1)
    assert (cfg.options['fold'], cfg.options['label_offset']) == (2, -1)
    assert 'fold' in options_of(dataclasses.replace(cfg, data='ucf101'), 'data') and 'fold' not in options_of(cfg, 'data')

def test_what_is_replaced_takes_its_options_along():
    keys = dict(data='msrvtt', variant='7k', model='clip4clip', head='seqTransf', lr=1.)
    assert replaced(keys, dict(data='manifest')) == dict(data='manifest', model='clip4clip', head='seqTransf', lr=1.)
    assert replaced(keys, dict(model='videomamba')) == dict(data='msrvtt', variant='7k', model='videomamba', lr=1.)
    assert replaced(keys, dict(model='stan'))['head'] == 'seqTransf', 'a word that both take stays, and the builder judges it'
    with pytest.raises(ValueError, match="no option fold"): make_config(**replaced(keys, dict(data='manifest', fold=1)))

def test_options_read_like_fields():
    import copy, pickle
    cfg = make_config(head='seqTransf')
    assert (cfg.head, cfg.gather, cfg.kind, cfg.lr) == ('seqTransf', 'full', 'clips', 1e-5)
    assert copy.deepcopy(cfg) == pickle.loads(pickle.dumps(cfg)) == cfg
    with pytest.raises(AttributeError, match="'mask' is neither a field nor an option of this run"): cfg.mask

def test_an_addon_says_only_what_the_task_takes():
    both, alone = config_from('k400_stan_b16+stan_compat'), config_from('msrvtt9k_stan_b32+stan_compat')
    assert alone.gather == 'official' and 'gather' not in both.options and both.optimizer == alone.optimizer

def test_a_config_written_down_is_read_back(outputs):
    for r in ('shapes_smoke', 'shapes_videomamba_pretrain', 'shapes_tvts', 'k400_videomamba_s_f8'):
        cfg = config_from(r)
        folder = start_folder(cfg)
        assert load_config(folder.path) == cfg, r
        assert set(changed(cfg)) - {'model', 'task', 'data', 'recipe'} <= set(flat(cfg))

def test_runs_of_before_still_read(outputs):
    "They hold the words of every task and data set, most of them nobody's in the run"
    folder = start_folder(make_config(recipe='old', head='seqTransf', directions='sum'))
    d = json.loads((folder/'config.json').read_text())
    opts = d.pop('options')
    old = {**d, 'options': dict(head='seqTransf'), **{w: opts[w] for w in options_of(load_config(folder.path), 'task')}, 'kind': 'clips', 'fold': 1, 'variant': '9k', 'fields': 'path label',
           'teacher': 'ViT-B-16', 'mask_ratio': .8, 'smoothing': 0., 'templates': ['{}']}
    (folder/'config.json').write_text(json.dumps(old))
    cfg = load_config(folder.path)
    assert (cfg.options['head'], cfg.options['directions'], cfg.options['kind'], 'teacher' in cfg.options) == ('seqTransf', 'sum', 'clips', False)
    assert start_folder(cfg, str(folder.path)).path == folder.path
    with pytest.raises(ValueError, match="other settings than the run has: directions 'sum' -> 'mean'"): start_folder(make_config(recipe='old', head='seqTransf', directions='mean'), str(folder.path))
    assert evaluation_config(dict(dsl=True), run=str(folder.path)).options['dsl'] is True
    (folder/'config.json').write_text(json.dumps({**old, 'epcohs': 3}))
    with pytest.raises(ValueError, match="unknown parameter 'epcohs'"): load_config(folder.path)

def test_half_weights_want_an_eps_that_fp16_has(outputs):
    from vidlab.build import build_optimizer
    from vidlab.registry import create_model
    model = create_model("clip4clip", preset="tiny", weights="random")
    with pytest.raises(ValueError, match="half_weights: eps 1e-08 is 0 in fp16"): build_optimizer(make_config(half_weights=True), model)
    assert build_optimizer(make_config(half_weights=True, eps=1e-6), model).param_groups

def test_two_owners_of_one_word_clash(fresh):
    def greedy(preset='tiny', gather='all'): pass
    with pytest.raises(ValueError, match="model 'greedy': option 'gather' is a word of task '(retrieval|sorting)': give it another name"): register_model(greedy)
    def grabbing(preset='tiny', epochs=3): pass
    with pytest.raises(ValueError, match="model 'grabbing': option 'epochs' is a word of the run"): register_model(grabbing)
    assert owners('gather') and not {'greedy', 'grabbing'} & set(KINDS['model'].builders)

def test_parameters_of_the_page(tmp_path):
    "Written twice they are the same, and what is the page's own stays"
    page = tmp_path/'page.ipynb'
    cell = dict(cell_type='code', id='a', metadata=dict(tags=['parameters']), source=['recipe:str = "x" # name\n', '# data\n', 'old:int = 1 # gone'], outputs=[], execution_count=None)
    page.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    write_parameters(page)
    once = page.read_text()
    write_parameters(page)
    assert page.read_text() == once
    source = ''.join(json.loads(once)['cells'][0]['source'])
    assert source.startswith('recipe:str = "x" # name\n# data\n') and source.endswith(parameters_cell()) and 'gone' not in source

def test_rates_count_optimiser_steps():
    "Ten batches, four to a step: three steps an epoch; the decay of the weights ends where it should"
    from vidlab.build import rates
    cfg = make_config(epochs=2, accum=4, schedule='linear', warmup=0., weight_decay=.1, weight_decay_end=.4)
    factor, decay = rates(cfg, 10)
    assert [round(factor(k), 6) for k in (0, 3, 6)] == [1., .5, 0.]
    assert round(decay(0), 6) == .1 and round(decay(6), 6) == .4 and rates(make_config(), 10)[1] is None


@pytest.mark.parametrize('epochs,every', [(30, 10), (25, 10), (20, 10), (7, 2), (3, 5)])
def test_a_rate_that_falls_again_and_again(epochs, every):
    "A period in epochs: a tenth at each multiple of it, at the very step; the same as the list of these epochs"
    from vidlab.build import rates
    cfg = make_config(epochs=epochs, schedule='multistep', fall_every=every, warmup=1/epochs)
    factor, _ = rates(cfg, 7)
    for k in range(7*epochs): assert factor(k) == pytest.approx(k/7 if k < 7 else .1**(k//(7*every)), rel=1e-9), k
    if not (falls := [m*every/epochs for m in range(1, epochs) if m*every < epochs]): return
    listed = make_config(epochs=epochs, schedule='multistep', milestones=falls, warmup=1/epochs)
    assert [rates(listed, 7)[0](k) for k in range(7*epochs)] == [factor(k) for k in range(7*epochs)]

@pytest.mark.parametrize('more', [dict(), dict(milestones=[.5], fall_every=2)])
def test_a_multistep_schedule_needs_one_list_of_falls(more):
    with pytest.raises(ValueError, match="schedule 'multistep' with milestones .* and fall_every .*: give one of them"): make_config(schedule='multistep', **more)

def test_a_run_of_algorithms_that_repeat():
    "deterministic reaches torch before anything is built, and the next run is free again"
    import torch
    from vidlab.core import seed_everything
    try:
        seed_everything(0, True)
        assert torch.are_deterministic_algorithms_enabled()
    finally: seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_choices_are_those_of_their_pages():
    "The words that a config knows are the words that the pages know"
    from vidlab.config import CHOICES, FIELDS, LEAST, MOST
    from vidlab.data import clips, manifest, sample, text, transforms
    from vidlab import learner, optim
    assert {*CHOICES, *LEAST, *MOST} <= set(FIELDS)
    assert set(CHOICES['schedule']) == set(optim.SCHEDULES) and set(CHOICES['groups']) == set(optim.RULES) and set(CHOICES['precision']) == set(learner.PRECISIONS)
    assert set(CHOICES['sampler']) == set(sample.SAMPLERS) and set(CHOICES['segments']) == {*sample.RULES, *sample.WINDOWS} and set(CHOICES['slice_framepos']) == set(sample.POSITIONS)
    assert set(CHOICES['train_frame_order']) == set(CHOICES['eval_frame_order']) == set(sample.ORDERS)
    assert set(CHOICES['cut']) == set(text.CUTS) and set(CHOICES['missing']) == set(manifest.MISSING) and set(CHOICES['mixing']) == set(clips.MIXES)
    assert set(CHOICES['resize']) == set(transforms.HOW)


@pytest.mark.parametrize('word,value', [('batch_size', 0), ('eval_batch_size', -1), ('epochs', -1), ('accum', 0), ('max_frames', 0), ('workers', -1), ('lr', -1.), ('lr', float('nan')), ('warmup', -.1),
                                        ('ema', 1.5), ('bad_limit', 2.), ('log_every', 0), ('betas', [.9]), ('betas', [.9, 1.]), ('stretch', [3]), ('val_crops', 4), ('layer_decay', 1.5)])
def test_values_that_no_run_can_have(word, value):
    with pytest.raises(ValueError, match=f'^{word} '): make_config(**{word: value})


def test_sgd_takes_its_momentum_from_betas():
    from vidlab.build import build_optimizer
    from vidlab.registry import create_model
    model = create_model('clip4clip', preset='tiny', weights='random')
    of = lambda **kw: build_optimizer(make_config(**kw), model).param_groups[0]['momentum']
    assert [of(optimizer=o, betas=[b, .999]) for o in ('sgd', 'timm:sgd', 'timm:rmsprop') for b in (.9, .5)] == [.9, .5]*3 and of(optimizer='sgd') == .9
