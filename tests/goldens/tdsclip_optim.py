"TDS-CLIP: learning rates"
from goldens import close, kind, sub
from vidlab.optim import held, schedule_factor


def factor(c, e): # at a position in epochs
    if c.get('type', 'cosine') == 'cosine': return schedule_factor('cosine', e, c['epochs'], c['warmup'] if c['warmup'] > 1 else c['warmup']/c['epochs'])
    return schedule_factor('multistep', e, c['epochs'], c['warmup'] if c['warmup'] > 1 else c['warmup']/c['epochs'], milestones=[m/c['epochs'] for m in c['milestones']])


@kind('tdsclip', 'lr_schedule')
def lr_schedule(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(f'{i} {c["kind"]}'):
            if c['kind'] == 'value':
                for e, *rates in c['rows']: close(f'at {e}', [r*factor(c, e) for r in c['group_lrs']], rates, case['tolerance'])
            else:
                n, total = c['iters'], c['epochs']*c['iters']
                for s in c['sequence']:
                    got = [c['lr']*schedule_factor('cosine', held(s['epoch']*n + j, n, 10), total, c['warmup']/c['epochs']) for j in range(len(s['lr']))]
                    close(f'epoch {s["epoch"]}', got, s['lr'], case['tolerance'])
