"TVTS: groups, rates, steps of pretraining, fine-tuning and probe, merged views against the official code"
import tempfile

import torch

from goldens import close, kind, part, sub
from goldens.tvts_model import batch_of, build, sizes, with_eps
from goldens.videomamba_train import Batches, Head, groups_of, schedule, table, views
from vidlab.learner import Learner, make_engine
from vidlab.models.tvts import TVTSClassifier
from vidlab.optim import make_optimizer, schedule_factor
from vidlab.tasks import RecognitionTask, SortingTask


@kind('tvts', 'param_groups')
def param_groups(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub('other than 12 layers' if c['depth'] != 12 and c['layer_decay'] < 1 and not c['linear_probe'] else str(i)):
            model = TVTSClassifier(3, dim=8, depth=c['depth'], heads=2, size=8, patch=4, frames=4)
            if c['linear_probe']: model.freeze('all')
            want = {n: (g['lr_scale'], g['weight_decay']) for g in c['groups'] for n in g['params']}
            got = table(groups_of(model, 1., c['weight_decay'], c['layer_decay'], 'standard'), 1.)
            assert set(got) == set(want), f'other parameters: {sorted(set(got) ^ set(want))[:4]}'
            for n in want: close(n, got[n], want[n], case['tolerance'])


@kind('tvts', 'lr_schedules')
def lr_schedules(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(f'{i} {c["kind"]}'):
            if c['kind'] == 'pretrain_step':
                got = [c['base_lr']*schedule_factor('multistep', e, c['epochs'], milestones=[m/c['epochs'] for m in c['milestones']]) for e in range(c['epochs'])]
                close('rates', got, c['lr_used_in_epoch'], case['tolerance'], own=True)
            else:
                total, warmup = c['epochs']*c['iters_per_epoch'], c.get('warmup_epochs', 0)*c['iters_per_epoch']
                if warmup and c.get('warmup_steps', -1) > 0: warmup = c['warmup_steps']
                close('rates', schedule(c['base_value'], c['final_value'], total, warmup, 0.), c['values'], case['tolerance'], own=True)


def step_through(task, opt, batches, rates, lr, tensors, tol):
    "Steps of the loop; outputs of every one, and all parameters afterwards"
    seen = []
    task.register_forward_hook(lambda m, a, out: seen.append({k: v.detach() for k, v in out.items()}))
    with tempfile.TemporaryDirectory() as d:
        learn = Learner(task, opt, Batches(batches), d, 1, make_engine('fp32', 'cpu'), None if rates is None else lambda s: rates[s]/lr)
        task.eval()                                             # no dropout in these cases
        for b in batches: learn.one_step([b]); learn.step += 1
    out, state = part(tensors, 'output/'), task.model.state_dict()
    for name, want in out.items():
        if name.startswith('final/'): close(name, state[name[6:]], want, tol)
        else:
            step, what = name.split('/')
            got = seen[int(step[4:])]
            close(name, dict(loss=got['loss'], loss_align=got.get('align'), loss_sort=2*got['sort'] if 'sort' in got else torch.zeros(()))[what], want, 10*tol)


@kind('tvts', 'train_steps', 'train_steps_joint')
def train_steps(case, tensors):
    c, n = case['config'], len(case['config']['steps'])
    task = SortingTask(build(c, part(tensors, 'weight/')), drop_tokens=0.)          # the patches that stay come with the batch
    batches = []
    for s in range(n):
        x = part(tensors, f'input/step{s}/')
        batches.append(dict(batch_of(x, c['batch'], len(x['input_ids'])//c['batch']), sid=torch.arange(c['batch'])))
    assert c.get('correct_bias', True), 'the published trainers correct the bias'
    opt = make_optimizer('hf_adamw', [dict(params=list(task.model.parameters()), lr=c['lr'], weight_decay=c.get('weight_decay', 0.))], betas=tuple(c.get('betas', (.9, .999))), eps=c.get('eps', 1e-6))
    step_through(task, opt, batches, None, c['lr'], tensors, case['tolerance'])


@kind('tvts', 'finetune_steps', 'linear_probe_steps')
def downstream_steps(case, tensors):
    c = case['config']
    model = with_eps(TVTSClassifier(c['num_classes'], **sizes(c)), c)
    model.load_weights(part(tensors, 'weight/'), exact=True)
    if c['linear_probe']: model.freeze('all')
    task = RecognitionTask(model, [str(i) for i in range(c['num_classes'])])
    opt = make_optimizer(c['opt'], groups_of(model, c['lr'], c['weight_decay'], c['layer_decay'], 'standard'), lr=c['lr'])
    rates = schedule(c['lr'], c['min_lr'], c['epochs']*c['iters_per_epoch'], c['warmup_epochs']*c['iters_per_epoch'], 0.)
    close('lr_per_step', rates, c['lr_per_step'], 1e-7, own=True)
    batches = [dict(video=x['video'].transpose(1, 2), label=x['target'], sid=torch.arange(c['batch'])) for x in (part(tensors, f'input/step{s}/') for s in range(len(rates)))]
    step_through(task, opt, batches, rates, c['lr'], tensors, case['tolerance'])


@kind('tvts', 'multiview_merge')
def multiview_merge(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(str(i)):
            p = views(c['files'], lambda r: (r['id'], r['logits'], r['label'], int(r['chunk']), int(r['crop'])))
            n = p['logits'].shape[1]
            m = RecognitionTask(Head(n), [str(j) for j in range(n)], average='logits').score(dict(video=p))['metrics']
            for k in ('top1', 'top5'): close(k, m.get(k, 100.), c[k], case['tolerance'])
