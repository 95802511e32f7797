"TVTS: encoder, sort head, whole model, classifier, losses, files and texts against the official code"
import json, os, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from goldens import close, close_grad, kind, part, run_ranks, sub
from vidlab.ckpt import rename, state_dict_of
from vidlab.data.text import tokenize, write_vocab
from vidlab.layers import LayerNorm
from vidlab.losses import contrastive, gather, sort_loss
from vidlab.metrics import sorted_right
from vidlab.models.tvts import (PRETRAINED, SortHead, TVTS, TVTSClassifier, VideoEncoder, cosine, encoder_rules, load_encoder, read_tvts, text_tower)


def sizes(cfg):
    "Arguments of `VideoEncoder`"
    cfg = {**dict(embed_dim=768, depth=12, num_heads=12, img_size=224, patch_size=16, num_frames=16), **cfg}
    return dict(dim=cfg['embed_dim'], depth=cfg['depth'], heads=cfg['num_heads'], size=cfg['img_size'], patch=cfg['patch_size'], frames=cfg['num_frames'],
                tubelet=cfg.get('tubelet_size', 2), mlp_ratio=cfg.get('mlp_ratio', 4.), qkv_bias=cfg.get('qkv_bias', True))


def with_eps(model, cfg):
    assert cfg.get('act', 'gelu_exact') == 'gelu_exact', cfg['act']
    for m in model.modules():
        if isinstance(m, LayerNorm): m.eps = cfg.get('norm_eps', m.eps)
    return model.eval()


def check(found, tensors, tol):
    "Every output and gradient of the case"
    for name, want in tensors.items():
        if not name.startswith(('output/', 'grad/')): continue
        assert name in found, f'{name}: not computed; known: {", ".join(found)}'
        (close_grad if name.startswith('grad/') else close)(name, found[name], want, tol)


def grads(model): return {f'grad/{n}': p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------------- encoder
@kind('tvts', 'video_encoder_masked', 'video_encoder_short_clip')
def video_encoder(case, tensors):
    cfg, video, keep = case['config'], tensors['input/video'], tensors.get('input/keep_ind')
    enc = with_eps(VideoEncoder(**sizes(cfg)), cfg)
    enc.load_state_dict(part(tensors, 'weight/'))
    found, hooks = {}, []
    for i, b in enumerate(enc.blocks): hooks.append(b.register_forward_hook(lambda m, a, o, i=i: found.update({f'output/block{i}': o})))
    tokens = enc(video, keep)
    for h in hooks: h.remove()
    loss = (tokens*tensors['input/loss_weight']).mean(); loss.backward()
    found.update({'output/patch_embed': enc.patches(video).flatten(1, 2), 'output/tokens_in': enc.embed(video, keep), 'output/tokens': tokens, 'output/loss': loss}, **grads(enc))
    check(found, tensors, case['tolerance'])
    enc.grad_checkpointing = True; enc.train().zero_grad()
    (enc(video, keep)*tensors['input/loss_weight']).mean().backward()
    check({**found, **grads(enc)}, tensors, case['tolerance'])


@kind('tvts', 'downstream_classifier')
def downstream_classifier(case, tensors):
    cfg, video = case['config'], tensors['input/video'].transpose(1, 2)                # channel first there
    m = with_eps(TVTSClassifier(cfg['num_classes'], **sizes(cfg)), cfg)
    m.load_weights(part(tensors, 'weight/'), exact=True)
    out = m(dict(video=video))
    loss = F.cross_entropy(out['logits'], tensors['input/soft_target']); loss.backward()
    y, s = tensors['input/label'], cfg['label_smoothing']
    close('soft target', F.one_hot(y, cfg['num_classes'])*(1 - s) + s/cfg['num_classes'], tensors['input/soft_target'], 1e-6)
    check({'output/norm_tokens': VideoEncoder.forward(m, video), 'output/feature': out['video'], 'output/logits': out['logits'], 'output/loss': loss, 'output/loss_ce': F.cross_entropy(out['logits'], y),
           'output/loss_label_smoothing': F.cross_entropy(out['logits'], y, label_smoothing=s), **grads(m)}, tensors, case['tolerance'])
    probe = with_eps(TVTSClassifier(cfg['num_classes'], **sizes(cfg)), cfg)
    probe.load_weights(part(tensors, 'weight/')); probe.freeze('all')
    F.cross_entropy(probe(dict(video=video))['logits'], tensors['input/soft_target']).backward()
    assert set(grads(probe)) == {'grad/head.weight', 'grad/head.bias'}
    for k, g in grads(probe).items(): close_grad(k, g, m.get_parameter(k[5:]).grad, 1e-6)


@kind('tvts', 'imagemae_init')
def imagemae_init(case, tensors):
    cfg, w = case['config'], part(tensors, 'weight/')
    enc = with_eps(VideoEncoder(**sizes(cfg)), cfg)
    with tempfile.TemporaryDirectory() as d:
        torch.save({cfg['checkpoint_top_level_key']: w}, f'{d}/mae.pth')
        report = load_encoder(enc, enc, read_tvts(f'{d}/mae.pth'), 'mae.pth')
    assert (set(report.names('new')), set(report.names('dropped'))) == (set(cfg['missing_keys']), set(cfg['unexpected_keys'])), report.rows
    state = enc.state_dict()
    with torch.no_grad():
        found = {'output/tokens': enc(tensors['input/video'], tensors['input/keep_ind']), 'output/image_tokens': enc(tensors['input/image_as_video'], tensors['input/image_keep_ind'])}
        close('a picture', enc(tensors['input/image_as_video'][:, :1], tensors['input/image_keep_ind']), found['output/image_tokens'], 1e-6)
    check({**found, **{f'output/loaded/{k}': v for k, v in state.items()}}, tensors, case['tolerance'])


# ---------------------------------------------------------------------------------------------------------------- sorting
@kind('tvts', 'sort_transformer')
def sort_transformer(case, tensors):
    cfg, w = case['config'], part(tensors, 'weight/')
    head = with_eps(SortHead(cfg['embed_dim'], cfg['num_heads'], cfg['depth'], cfg['num_classes'], mlp_ratio=cfg.get('mlp_ratio', 4.)), cfg)
    head.load_state_dict(w)
    text, video, label = (tensors[f'input/{k}'].clone() for k in ('text', 'video_tokens', 'label'))
    text.requires_grad_(); video.requires_grad_()
    found = {}
    for i, b in enumerate(head.blocks): b.register_forward_hook(lambda m, a, o, i=i: found.update({f'output/block{i}': o}))
    logits = head(text, video)
    loss = 2*sort_loss(logits, label); loss.backward()
    if label.equal(torch.arange(label.shape[1]).expand_as(label)): close('labels in order', 2*sort_loss(logits), loss, 1e-6)
    found.update({'output/joint_in': head.join(text, video), 'output/logits': logits, 'output/loss_sort': loss, 'output/exact_match_count': sorted_right(logits, label).all(1).float().sum(),
                  'grad/input/text': text.grad, 'grad/input/video_tokens': video.grad}, **grads(head))
    check(found, tensors, case['tolerance'])


@kind('tvts', 'sort_accuracy')
def sort_accuracies(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(str(i)):
            logits, y = torch.tensor(c['logits']), torch.tensor(c['labels'])
            assert logits.argmax(-1).tolist() == c['pred']
            got = sorted_right(logits, y).all(1).float().mean()
            close('accuracy', got, c['accuracy'], case['tolerance']); close('exact_match', got*len(y), c['exact_match'], case['tolerance'])


# ---------------------------------------------------------------------------------------------------------------- whole model
def text_config(cfg, weights):
    t = cfg['text']
    if t['kind'] == 'distilbert': return dict(model_type='distilbert', **{k: t[k] for k in ('vocab_size', 'dim', 'n_layers', 'n_heads', 'hidden_dim', 'max_position_embeddings')})
    assert t['kind'] == 'bert', t['kind']
    return dict(model_type='bert', vocab_size=t['vocab_size'], hidden_size=t['dim'], num_hidden_layers=t['n_layers'], num_attention_heads=t['n_heads'], intermediate_size=t['hidden_dim'],
                max_position_embeddings=t['max_position_embeddings'], type_vocab_size=len(weights['text_model.embeddings.token_type_embeddings.weight']))


def build(cfg, weights):
    "A model of the case's sizes with the case's weights, through the reader of official files"
    enc = VideoEncoder(**sizes(cfg))
    model = TVTS(enc, text_tower(text_config(cfg, weights)), cfg.get('projection', 'minimal'), cfg.get('projection_dim', 256), transcripts=len(weights['pred_model.head.weight']),
                 sort_depth=cfg['sort']['depth'], sort_heads=cfg['sort']['num_heads'], tau=cfg.get('temperature', .05))
    model.load_weights({'module.' + k: v for k, v in weights.items()}, exact=True)
    return with_eps(model, cfg)


def batch_of(x, B, K): # official rows are transcript-major
    rows = lambda v: v.unflatten(0, (K, B)).transpose(0, 1) if K > 1 else v
    return dict(video=x['video'], keep=x.get('keep_ind'), text=rows(x['input_ids']), text_mask=rows(x['attention_mask']))


@kind('tvts', 'tvts_full_distilbert', 'tvts_full_bert')
def tvts_full(case, tensors):
    cfg, tol, B = case['config'], case['tolerance'], case['config']['batch']
    model, found = build(cfg, part(tensors, 'weight/')), {}
    losses = {}
    for name in sorted({k.split('/')[1] for k in tensors if k.startswith('input/')}):
        x = part(tensors, f'input/{name}/'); K = len(x['input_ids'])//B
        b = batch_of(x, B, K); out = model(b)
        sim = model.similarity(out['text'], out['video']).T
        align = contrastive(sim, directions='sum')
        got = dict(text_embeds=out['text'], video_embeds=out['video'], sim=sim/out['logit_scale'], loss_align=align, video_tokens=model.video_tokens(b['video'], keep=b['keep'])[0])
        got['text_hidden'] = model.text_model(input_ids=x['input_ids'], attention_mask=x['attention_mask']).last_hidden_state
        assert ('order' in out) == (K > 1)
        if K > 1: got.update(pred_order=out['order'], loss_sort=2*sort_loss(out['order'], x['label']))
        got['loss'] = losses[name] = align + got.get('loss_sort', 0)
        found.update({f'output/{name}/{k}': v for k, v in got.items()})
        if 'loss_sort' in got:
            model.zero_grad(); got['loss_sort'].backward(retain_graph=True)
            none = [n for n in cfg.get('params_without_gradient_from_sort_loss', []) if model.get_parameter(n).grad is not None]
            assert not none, f'the sorting loss reaches {none}'
            model.zero_grad(); got['loss'].backward(retain_graph=True); found.update(grads(model))
        close(f'{name}: encode_text', model.encode_text(b['text'], b['text_mask']), out['text'], 1e-6)
        close(f'{name}: encode_video', model.encode_video(b['video'], keep=b['keep']), out['video'], 1e-6)
    check(found, tensors, tol)


# ---------------------------------------------------------------------------------------------------------------- contrast
@kind('tvts', 'contrastive_loss')
def contrastive_loss(case, tensors):
    T = case['config'].get('temperature', .05)
    text, video = (tensors[f'input/{k}_embeds'].clone().requires_grad_() for k in ('text', 'video'))
    sim = cosine(video, text); sim.retain_grad()
    loss = contrastive(sim/T, directions='sum'); loss.backward()
    found = {'output/sim': sim, 'output/sim_text_video': cosine(text, video), 'output/loss': loss, 'grad/sim': sim.grad, 'grad/input/text_embeds': text.grad, 'grad/input/video_embeds': video.grad}
    if 'input/zero/a' in tensors: found['output/zero/sim'] = cosine(tensors['input/zero/a'], tensors['input/zero/b'])
    check(found, tensors, case['tolerance'])


def _rank_main(rank, world, folder):
    "One process of `contrastive_two_ranks`"
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    T, x, out = json.loads((folder/'config.json').read_text())['temperature'], part(load_file(folder/'case.safetensors'), f'input/rank{rank}/'), {}
    for how in ('official', 'full'):
        mine = {k: v.clone().requires_grad_() for k, v in x.items()}
        sim = cosine(gather(mine['video_embeds'], how), gather(mine['text_embeds'], how))
        loss = contrastive(sim/T, directions='sum'); loss.backward()
        out.update({f'{how}/{k}': v.grad for k, v in mine.items()}, **{f'{how}/loss': loss.detach().reshape(1), f'{how}/sim': sim.detach().contiguous()})
    save_file(out, folder/f'rank{rank}.safetensors')
    dist.barrier()
    os._exit(0)      # gloo threads can abort an ordinary exit on a busy machine; what is compared is saved


@kind('tvts', 'contrastive_two_ranks')
def contrastive_ranks(case, tensors):
    cfg, tol, W = case['config'], case['tolerance'], case['config']['world_size']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/'config.json').write_text(json.dumps(cfg)); save_file({k: v.contiguous() for k, v in tensors.items()}, tmp/'case.safetensors')
        run_ranks('goldens.tvts_model', W, tmp)
        ranks = [load_file(tmp/f'rank{r}.safetensors') for r in range(W)]
    x = {k: torch.cat([tensors[f'input/rank{r}/{k}'] for r in range(W)]).requires_grad_() for k in ('video_embeds', 'text_embeds')}
    single = contrastive(cosine(x['video_embeds'], x['text_embeds'])/cfg['temperature'], directions='sum'); single.backward()
    found, n = {}, cfg['batch_per_rank']
    for r, got in enumerate(ranks):
        close('sim', got['official/sim'], ranks[0]['official/sim'], 0)
        found.update({'output/sim': got['official/sim'], f'output/rank{r}/loss': got['official/loss'].reshape(())}, **{f'grad/rank{r}/{k}': got[f'official/{k}'] for k in x})
        for k, v in x.items(): close_grad(f'full gather, rank {r}, {k}: before the average over ranks', got[f'full/{k}'], W*v.grad[r*n:(r+1)*n], tol)
    close('one process', ranks[0]['official/loss'].reshape(()), single, tol)
    check(found, tensors, tol)


# ---------------------------------------------------------------------------------------------------------------- names and texts
@kind('tvts', 'checkpoint_keys')
def checkpoint_keys(case, tensors):
    bare = lambda names: [n.removeprefix('module.') for n in names]
    for i, c in enumerate(case['cases']):
        wrapped = c['checkpoint_keys'][0].startswith('module.')
        state = state_dict_of({k: torch.zeros(1) for k in c['checkpoint_keys']})
        with sub(f'{i}: renamed'):      # a model of ours never has the prefix
            assert list(rename(state, PRETRAINED)[0]) == bare(c['renamed_for_pretraining_model']) == bare(c['model_keys'])
        kept = list(rename(state, encoder_rules(state))[0])
        assert kept == [k[len('video_model.'):] for k in bare(c['checkpoint_keys']) if k.startswith('video_model.')]
        with sub('kept with module.' if wrapped else 'kept without module.'): assert kept == c['kept_for_downstream_encoder'], f'{kept}, officially {c["kept_for_downstream_encoder"]}'


@kind('tvts', 'tokenise')
def tokenise(case, tensors):
    for i, c in enumerate(case['cases']):
        with sub(str(i)), tempfile.TemporaryDirectory() as d:
            write_vocab(d, words=c['vocab'], letters=False)
            (Path(d)/'vocab.txt').write_text('\n'.join(c['vocab']) + '\n', encoding='utf-8')            # in the case's own order
            ids, mask = tokenize(c['texts'], c['max_length'], tokenizer=d)
            n = len(c['input_ids'][0])                                           # padded to the longest of the batch there, to `max_words` here
            assert ids[:, :n].tolist() == c['input_ids'] and mask[:, :n].tolist() == c['attention_mask']
            assert not mask[:, n:].any() and not (ids[:, n:] != c['vocab'].index('[PAD]')).any()


@kind('tvts', 'text_flatten_order')
def text_flatten_order(case, tensors):
    with tempfile.TemporaryDirectory() as d:
        for i, c in enumerate(case['cases']):
            folder = f'{d}/{i}'
            write_vocab(folder, c['flat'])
            B, K, L = len(c['samples']), len(c['samples'][0]), 16
            ids = tokenize([t for s in c['samples'] for t in s], L, tokenizer=folder)[0].view(B, K, L)        # as our batches have them
            with sub(f'{i}: rows'): assert ids.transpose(0, 1).flatten(0, 1).equal(tokenize(c['flat'], L, tokenizer=folder)[0])
            with sub(f'{i}: batch_of'): assert batch_of(dict(video=None, input_ids=tokenize(c['flat'], L, tokenizer=folder)[0], attention_mask=torch.ones(B*K, L)), B, K)['text'].equal(ids if K > 1 else ids[:, 0])
            with sub(f'{i}: label'): close('labels', sort_loss(logits := torch.randn(B, K, K)), sort_loss(logits, torch.tensor(c['label'])), 1e-6)


if __name__ == '__main__': _rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
