"TDS-CLIP: learning rates"
from goldens import close, kind, sub
from vidlab.optim import held, schedule_factor


def factor(c, e, per=1): # at a position in epochs, or in steps of which an epoch has `per`
    total, warmup = c['epochs']*per, c.get('warmup', 0)/c['epochs']
    if c.get('type', 'cosine') == 'cosine': return schedule_factor('cosine', e, total, warmup)
    assert c['type'] == 'multistep', f'unknown schedule {c["type"]}'
    return schedule_factor('multistep', e, total, warmup, milestones=[m/c['epochs'] for m in c['milestones']])


@kind('tdsclip', 'lr_schedule')
def lr_schedule(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(f'{i} {c["kind"]}'):
            if c['kind'] == 'value':
                for e, *rates in c['rows']: close(f'at {e}', [r*factor(c, e) for r in c['group_lrs']], rates, case['tolerance'])
            else:
                n = c['iters']
                for s in c['sequence']:
                    got = [c['lr']*factor(c, held(s['epoch']*n + j, n, 10), n) for j in range(len(s['lr']))]
                    close(f'epoch {s["epoch"]}', got, s['lr'], case['tolerance'])
