"A run of the published code goes on here: from files in its form the next epoch is that of the unbroken run; what cannot be carried over is refused."
import copy, random, sys, types
from collections import OrderedDict
import pytest, torch
from safetensors.torch import save_file
from vidlab.build import build_learner
from vidlab.config import make_config
from vidlab.core import RunFolder, seed_everything
from vidlab.data.shapes import make_shapes
from vidlab.learner import make_engine
from vidlab.takeover import take_over
from vidlab.train import run

TEXT = dict(model_type='distilbert', vocab_size=128, dim=64, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64, dropout=0., attention_dropout=0.)
COMMON = dict(max_frames=4, max_words=16, batch_size=4, epochs=3, workers=0, device='cpu', val_split='', test_split='', clip_grad=1., log_every=100, check=False)
WORDS = dict(
    clip4clip=dict(model='clip4clip', preset='tiny', head='seqTransf', freeze=0, optimizer='bertadam', groups='clip4clip', schedule='warmup_cosine', warmup=.1, lr=1e-3, coef_lr=.1, betas=[.9, .98], eps=1e-6,
                   weight_decay=.2, sampler='grid', rate=2),
    tvts=dict(model='tvts', preset='tiny', task='sorting', kind='narrated', pieces=4, text=TEXT, sampler='segment', segments='tvts', max_frames=8, min_chars=0, optimizer='hf_adamw', schedule='multistep',
              milestones=[1/3, 2/3], warmup=0., lr=1e-3, eps=1e-6, weight_decay=0., batch_size=2))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('s'), kinds=('clips', 'narrated'), sizes=dict(clips=dict(train=8, val=1, test=1), narrated=dict(train=4, val=1, test=1)))


def unbroken(cfg, folder, epochs=1):
    "State after so many epochs; weights after one more"
    seed_everything(cfg.seed)
    learn = build_learner(cfg, RunFolder(folder), make_engine('fp32', 'cpu'))
    learn.cbs = []
    for _ in range(epochs): learn.one_epoch(lambda: None)
    model, opt = learn.raw_task.model, learn.opt.optimizer
    names = [n for n, _ in model.named_parameters()]
    where = {n: p for n, p in model.named_parameters()}
    mid = dict(weights={n: p.detach().clone() for n, p in where.items()}, state={n: copy.deepcopy(dict(opt.state[p])) for n, p in where.items() if p in opt.state},
               lr={n: g['lr'] for g in opt.param_groups for n in g['names']}, base={n: g['base_lr'] for g in opt.param_groups for n in g['names']}, batches=len(learn.train))
    random.Random(1).shuffle(names)                             # the order of the official code is not ours
    learn.one_epoch(lambda: None)
    return names, mid, {n: p.detach().clone() for n, p in where.items()}


def numbered(groups, mid, settings):
    "`state_dict` of an optimiser with these groups of names"
    ids = {n: i for i, n in enumerate(n for g in groups for n in g)}
    return dict(state={ids[n]: s for n, s in mid['state'].items()}, param_groups=[dict(params=[ids[n] for n in g], **settings(g)) for g in groups])


def clip4clip_files(d, cfg, names, mid, epochs=1):
    "pytorch_model.bin.N, pytorch_opt.bin.N"
    torch.save(OrderedDict((n, mid['weights'][n]) for n in names), d/f'pytorch_model.bin.{epochs - 1}')
    still = [n for n in names if 'bias' in n or 'LayerNorm.weight' in n]
    groups = [[n for n in names if (n in still) == bare and ('clip.' in n) == clip] for bare in (False, True) for clip in (True, False)]
    total = (mid['batches'] + cfg.accum - 1)/cfg.accum*cfg.epochs
    def settings(g):
        lr = mid['base'][g[0]] if g else 1.
        return dict(lr=lr, schedule='warmup_cosine', warmup=.1, t_total=total, b1=.9, b2=.98, e=1e-6, weight_decay=0. if g and g[0] in still else .2, max_grad_norm=1.)
    torch.save(dict(epoch=epochs - 1, optimizer_state_dict=numbered(groups, mid, settings), loss=.5), d/f'pytorch_opt.bin.{epochs - 1}')
    return dict(start=str(d/f'pytorch_model.bin.{epochs - 1}'), start_state=str(d/f'pytorch_opt.bin.{epochs - 1}'))


def tvts_files(d, cfg, names, mid, epochs=1):
    "checkpoint-epochN.pth with its configuration object"
    made = types.ModuleType('parse_config_dist_multi')
    made.ConfigParser = type('ConfigParser', (), dict(__module__='parse_config_dist_multi'))
    config = made.ConfigParser()
    config.resume = None
    settings = lambda g: dict(lr=mid['lr'][g[0]], betas=(.9, .999), eps=1e-6, weight_decay=0., correct_bias=True)
    what = dict(arch='DistributedDataParallel', epoch=epochs, state_dict=OrderedDict(('module.' + n, mid['weights'][n]) for n in names), optimizer=numbered([names], mid, settings),
                monitor_best=.25, config=config)
    sys.modules['parse_config_dist_multi'] = made
    try: torch.save(what, d/f'checkpoint-epoch{epochs}.pth')
    finally: del sys.modules['parse_config_dist_multi']
    return dict.fromkeys(('start', 'start_state'), str(d/f'checkpoint-epoch{epochs}.pth'))


FILES = dict(clip4clip=clip4clip_files, tvts=tvts_files)

def config(system, shapes, **more): return make_config(**{**COMMON, **WORDS[system], 'data_path': str(shapes), **more})


@pytest.mark.parametrize('system,epochs', [('clip4clip', 1), ('clip4clip', 2), ('tvts', 1), ('tvts', 2)])
def test_the_next_epoch_is_that_of_the_unbroken_run(system, epochs, shapes, outputs, tmp_path, capsys):
    cfg = config(system, shapes)
    names, mid, want = unbroken(cfg, tmp_path/'whole', epochs)
    words = FILES[system](tmp_path, cfg, names, mid, epochs)
    cfg = config(system, shapes, **words)
    learn = build_learner(cfg, RunFolder.new('x'), make_engine('fp32', 'cpu'))
    take_over(learn, cfg)
    assert (learn.epoch, learn.step) == (epochs, epochs*mid['batches'])
    learn.cbs = []
    learn.one_epoch(lambda: None)
    got = dict(learn.raw_task.model.named_parameters())
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert f'goes on after epoch {epochs} at step' in capsys.readouterr().out


@pytest.fixture(scope='module')
def files(shapes, tmp_path_factory):
    "Files of both systems after one epoch"
    made = {}
    for s in FILES:
        d = tmp_path_factory.mktemp(s)
        names, mid, _ = unbroken(config(s, shapes), d/'whole')
        made[s] = FILES[s](d, config(s, shapes), names, mid)
    return made


def test_a_whole_run_goes_on_and_is_resumed(files, shapes, outputs, capsys):
    "`run` takes over once; a resumed run goes on from its own checkpoint"
    f = run(config('clip4clip', shapes, **files['clip4clip'], epochs=3))
    assert f.status()['state'] == 'done' and f.status()['step'] == 6 and capsys.readouterr().out.count('goes on after epoch 1') == 1
    run(config('clip4clip', shapes, **files['clip4clip'], epochs=3), resume=str(f.path))
    assert 'goes on after' not in capsys.readouterr().out


@pytest.mark.parametrize('system,more,said', [
    ('clip4clip', dict(epochs=5), 't_total 6.0 there and 10.0 here'), ('clip4clip', dict(lr=2e-3), 'lr 0.00.* there and 0.00.* here'), ('clip4clip', dict(warmup=.2), 'warmup 0.1 there and 0.2 here'),
    ('clip4clip', dict(schedule='cosine'), "schedule 'warmup_cosine' there and 'cosine' here"), ('clip4clip', dict(betas=[.9, .999]), 'b2 0.98 there and 0.999 here'),
    ('clip4clip', dict(optimizer='adamw'), "its optimiser is 'bertadam' and that of the run 'adamw'"), ('clip4clip', dict(batch_size=2), '2 steps in 1 epochs, and 1 epochs of this run have 4'),
    ('clip4clip', dict(epochs=1), 'nothing is left to train'), ('clip4clip', dict(freeze=2), 'parameters that learned there are frozen here'), ('clip4clip', dict(head='seqLSTM'), 'are not as in the file'),
    ('clip4clip', dict(groups='standard'), 'there and'),
    ('tvts', dict(lr=2e-3), 'lr 0.001 there and 0.002 here'), ('tvts', dict(eps=1e-8), 'eps 1e-06 there and 1e-08 here'), ('tvts', dict(batch_size=1), '2 steps in 1 epochs'),
    ('tvts', dict(optimizer='adamw'), "its optimiser is 'hf_adamw'")])
def test_what_is_not_the_same_run_is_refused(system, more, said, files, shapes, outputs):
    with pytest.raises(ValueError, match=said.replace('(', r'\(')): run(config(system, shapes, **files[system], **more))


def test_files_that_do_not_belong_together(files, shapes, outputs, tmp_path):
    start, state = files['clip4clip'].values()
    with pytest.raises(ValueError, match='belongs to weights: name them by start'): config('clip4clip', shapes, start_state=state)
    with pytest.raises(ValueError, match='no epoch and optimizer_state_dict in it'): run(config('clip4clip', shapes, start=start, start_state=start))
    with pytest.raises(ValueError, match='no epoch and optimizer in it'): run(config('tvts', shapes, **{**files['tvts'], 'start_state': state}))
    save_file({k: v.contiguous() for k, v in torch.load(start).items()}, tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='the order of the parameters is lost'): run(config('clip4clip', shapes, start=str(tmp_path/'w.safetensors'), start_state=state))
    d = torch.load(state)
    d['optimizer_state_dict']['param_groups'][0]['params'].pop()
    torch.save(d, tmp_path/'less')
    with pytest.raises(ValueError, match='weights and optimiser are of different models'): run(config('clip4clip', shapes, start=start, start_state=str(tmp_path/'less')))
    other = dict(COMMON, model='videomamba', preset='tiny', task='recognition', sampler='segment', data_path=str(shapes))
    first = run(make_config(**{**other, 'epochs': 1}))
    with pytest.raises(ValueError, match='no file of the published optimiser of videomamba is known; start takes its weights alone'):
        run(make_config(**other, start=str(first.path), start_state=state))


def test_what_has_no_state_is_said(files, shapes, outputs, tmp_path, capsys):
    start, state = files['clip4clip'].values()
    d = torch.load(state)
    d['optimizer_state_dict']['state'].pop(0)
    torch.save(d, tmp_path/'less')
    run(config('clip4clip', shapes, start=start, start_state=str(tmp_path/'less')))
    assert '1 parameters have no state there and begin anew' in capsys.readouterr().out
