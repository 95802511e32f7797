"Maps of the input against loops and against Captum, and the measures of maps against loops and made-up cases."
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from vidlab.contract import Card, VideoModel
from vidlab.core import rng
from vidlab.data.shapes import FPS, masks, scene_item, truth_rows
from vidlab.explain import _fewer, blank, default_method, integrated, looking, methods_of, occlusion, patch_maps
from vidlab.pointing import (alike, best_method, blanking_order, case_of, estimate, mass, measure, pointing, shuffled,
                             table, verdict)
from vidlab.registry import create_model
from vidlab.tasks import RecognitionTask, RetrievalTask


class Bent(VideoModel):
    "A small model that is not linear; `neighbours` frames belong to each position"
    def __init__(self, neighbours=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten(), nn.Linear(32, 2))
        self.card = Card('bent', 8, 4, neighbours=neighbours, classes=2, mean=(.5,)*3, std=(.5,)*3)
    def forward(self, batch): return dict(logits=5*self.net(batch['video'].transpose(1, 2)))

def clips(n=2, frames=4, size=8):
    g = torch.Generator().manual_seed(1)
    return dict(video=torch.randint(0, 256, (n, frames, 3, size, size), dtype=torch.uint8, generator=g), video_mask=torch.ones(n, frames).bool(), sid=torch.arange(n), label=torch.arange(n) % 2)


@pytest.mark.parametrize('neighbours', [1, 2])
def test_occlusion_is_what_a_loop_says(neighbours, monkeypatch):
    task = RecognitionTask(Bent(neighbours), ['a', 'b'])
    b = clips(frames=4*neighbours)
    got = patch_maps(task, b, 'occlusion')
    assert got.shape == (2, 4, 8, 8)
    with looking(task, b) as (model, x), torch.no_grad():
        for i, t, r, c in ((0, 0, 0, 0), (1, 2, 4, 7), (1, 3, 7, 1)):
            grid = _fewer((4, 8, 8), 256)
            assert grid == (4, 8, 8)
            v = x['video'][i:i + 1].clone()
            v[:, t*neighbours:(t + 1)*neighbours, :, r, c] = x['video'][i].transpose(0, 1).flatten(1).median(1).values
            score = lambda v: model(dict(video=v))['logits'][0, b['label'][i]]
            assert got[i, t, r, c] == pytest.approx(max(0., float(score(x['video'][i:i + 1]) - score(v))), abs=1e-5)


def test_integrated_gradients_add_up():
    task, b = RecognitionTask(Bent(), ['a', 'b']), clips()
    with looking(task, b) as (model, x):
        got = integrated(task, x, 64)
        start = blank(x).expand_as(x['video'])
        own = lambda v: model(dict(video=v))['logits'].gather(1, b['label'][:, None])[:, 0]
        assert torch.allclose(got.sum((1, 2, 3)), own(x['video']) - own(start), atol=1e-3)
        assert (got < 0).any() and (patch_maps(task, b, 'integrated') >= 0).all()


@pytest.mark.parametrize('name', ['IntegratedGradients', 'Occlusion'])
def test_captum_agrees(name):
    attr = pytest.importorskip('captum.attr')
    task, b = RecognitionTask(Bent(), ['a', 'b']), clips()
    with looking(task, b) as (model, x):
        f, start = lambda v: model(dict(video=v))['logits'], blank(x).expand_as(x['video']).contiguous()
        if name == 'Occlusion': want = attr.Occlusion(f).attribute(x['video'], (1, 3, 1, 1), (1, 3, 1, 1), start, target=b['label'])[:, :, 0]
        else: want = attr.IntegratedGradients(f).attribute(x['video'], start, target=b['label'], n_steps=256).sum(2)
        got = occlusion(task, x) if name == 'Occlusion' else integrated(task, x, 256)
    assert torch.allclose(got, want.detach().float(), atol=2e-3)


def test_the_likeliest_class_stays_the_question():
    "Without a label the class is chosen once, not anew for each version of the clip"
    task, b = RecognitionTask(Bent(), ['a', 'b']), clips()
    with looking(task, b) as (model, x), torch.no_grad(): top = task.logits(x).argmax(1)
    silent = {k: v for k, v in b.items() if k != 'label'}
    for m in ('occlusion', 'integrated', 'relevance'): assert torch.allclose(patch_maps(task, silent, m), patch_maps(task, {**b, 'label': top}, m), atol=1e-6), m


def test_a_model_names_its_method():
    task = RetrievalTask(create_model('clip4clip', clip='random', head='meanP'))
    b = dict(clips(size=64), text=torch.randint(1, 60, (2, 8)))
    for best in ('legrad', 'rollout', 'occlusion'):
        type(task.model).explained_by, old = best, type(task.model).explained_by
        try:
            assert default_method(task, b) == methods_of(task, b)[-1] == best and torch.equal(patch_maps(task, b), patch_maps(task, b, best))
        finally: type(task.model).explained_by = old
    with pytest.raises(ValueError, match='occlusion'): patch_maps(task, b, 'oclusion')


# ---------------------------------------------------------------------------------------------------------------- measures
def maps_and_mask(seed):
    g = np.random.default_rng(seed)
    mask = np.zeros((3, 64, 64), np.float32)
    for f in mask:
        y, x = g.integers(0, 44, 2)
        f[y:y + 18, x:x + 14] = 1
    return torch.tensor(g.random((3, 4, 4)).round(1), dtype=torch.float32), mask

@pytest.mark.parametrize('seed', range(5))
def test_pointing_and_mass_are_what_loops_say(seed):
    m, mask = maps_and_mask(seed)
    want, inside = [], 0.
    for t in range(3):
        tops, hits = 0, 0
        for i in range(4):
            for j in range(4):
                inside += float(m[t, i, j])*mask[t, 16*i:16*i + 16, 16*j:16*j + 16].mean()
                if m[t, i, j] < m[t].max(): continue
                tops += 1
                y, x = 16*i + 8, 16*j + 8
                hits += bool(mask[t, max(0, y - 4):y + 5, max(0, x - 4):x + 5].any())
        want.append(hits/tops)
    assert pointing(m, mask).tolist() == pytest.approx(want) and mass(m, mask) == pytest.approx(inside/float(m.sum()), rel=1e-4)

def test_quantus_agrees():
    quantus = pytest.importorskip('quantus')
    g = np.random.default_rng(0)
    m, mask = torch.tensor(g.random((12, 64, 64)), dtype=torch.float32), np.concatenate([maps_and_mask(s)[1] for s in range(4)])
    m *= torch.tensor(1 + .003*mask)                                # about half of the maps point at the thing
    of = dict(a_batch=m.numpy()[:, None], s_batch=mask[:, None])
    hit = quantus.PointingGame(disable_warnings=True).evaluate_batch(**of)
    inside = quantus.RelevanceMassAccuracy(disable_warnings=True).evaluate_batch(**of)
    assert pointing(m, mask, 0).tolist() == hit.tolist() and 0 < hit.sum() < 12
    assert [mass(x[None], y[None]) for x, y in zip(m, mask)] == pytest.approx(inside.tolist(), rel=1e-4)


def test_blanking_takes_the_brightest_first():
    m, _ = maps_and_mask(0)
    o = blanking_order(m, 4)
    for k in range(5):
        n = round(48*k/4)
        assert o[k].sum() == n and (o[5 + k] == ~o[k]).all()
        if 0 < n < 48: assert m[o[k]].min() >= m[~o[k]].max()

def questions(n=6):
    out = []
    for i in range(n):
        frames, row = scene_item(i, rng(5, i))
        truth = pd.DataFrame(truth_rows(dict(row, id=str(i)), row['things'], FPS))
        b = dict(video=torch.from_numpy(frames[::2].copy()).permute(0, 3, 1, 2)[None], video_mask=torch.ones(1, 8).bool(), frame_time=torch.arange(8)[None]*2/FPS, sid=torch.tensor([i]))
        out += [(b, truth, k, t) for k, t in enumerate(row['things'])]
    return out

def test_truth_of_a_case_is_that_of_its_frames():
    for b, truth, k, t in questions(3):
        c = case_of(RecognitionTask(Bent(), ['a', 'b']), b, truth, masks, k)
        assert c.thing.shape == (8, 64, 64) and np.allclose(c.thing, masks(truth, range(0, 15, 2))[k]) and np.allclose(c.rival, masks(truth, range(0, 15, 2))[1 - k])
        assert c.when.tolist() == truth[truth.thing == k].moves.to_numpy()[::2].tolist()
    with pytest.raises(ValueError, match='padding'): case_of(RecognitionTask(Bent(), ['a', 'b']), {**b, 'video_mask': torch.tensor([[True]*7 + [False]])}, truth, masks, 0)

class Reds(VideoModel):
    "Counts pixels of a colour, in the first half of the clip alone"
    def __init__(self):
        super().__init__()
        self.fc, self.card = nn.Linear(3, 3), Card('reds', 64, 8, classes=3, mean=(.5,)*3, std=(.5,)*3)
        self.fc.weight.data = torch.tensor([[2., -1, -1], [-1, 2, -1], [-1, -1, 2]])
    def forward(self, batch): return dict(logits=self.fc(batch['video'][:, :4].mean((1, 3, 4))))

def test_measures_know_a_good_map_from_a_bad_one():
    names = ['red', 'green', 'blue']
    task, cases = RecognitionTask(Reds(), names), []
    for b, truth, k, t in questions():
        c = case_of(task, {**b, 'label': torch.tensor([names.index(t.color)])}, truth, masks, k)
        c.when = np.arange(8) < 4
        cases.append(c)
    rows = measure(task, cases, ['integrated', 'occlusion'], twins=2)
    got = lambda m, k: estimate(rows[rows.method == m], k).value
    for m in ('integrated', 'occlusion'):
        assert got(m, 'told') == 100 and got(m, 'deletion') < 25 < 75 < got(m, 'insertion') and got(m, 'when') == 100 and got(m, 'when_mass') > 99
        assert got(m, 'frames_out') < got('random', 'frames_out') - 10 and got(m, 'alike') < 95
    assert got('random', 'deletion') == pytest.approx(got('random', 'insertion'), abs=25) and got('centre', 'told') == 50 == got('centre', 'when')
    assert got('truth', 'pointing') > 95 and got('random', 'pointing') < 40
    assert len(table(rows)) == 5 and {'pointing', 'told', 'when', 'frames_in'} <= set(table(rows)) and rows.group.nunique() == len(cases)/2
    assert best_method(rows)[0] in ('integrated', 'occlusion')

def test_shuffling_keeps_the_numbers():
    task = RetrievalTask(create_model('clip4clip', clip='random', head='meanP'))
    twin = shuffled(task)
    for a, b in zip(task.parameters(), twin.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values) and (a.ndim < 2 or a.numel() < 8 or a.unique().numel() < 2 or not torch.equal(a, b))
    assert alike(torch.arange(8.).view(2, 2, 2), torch.arange(8.).view(2, 2, 2)**3) == pytest.approx(1) and alike(torch.ones(2, 2, 2), torch.rand(2, 2, 2)) == 0

def made_up(**mean): # method -> (pointing, seconds)
    g = np.random.default_rng(0)
    return pd.DataFrame([dict(case=i, group=str(i//2), method=m, seconds=s, pointing=np.clip(p + .05*g.standard_normal(), 0, 1)) for m, (p, s) in mean.items() for i in range(40)])

def test_the_fastest_of_the_best_is_shown_first():
    nan = float('nan')
    rows = made_up(occlusion=(.80, 5.), integrated=(.80, 1.), raw=(.3, .1), centre=(.4, nan))
    assert best_method(rows)[0] == 'integrated' and verdict(rows).startswith('integrated: points')
    rows = made_up(occlusion=(.90, 5.), integrated=(.80, 1.), raw=(.3, .1), centre=(.4, nan))
    assert best_method(rows)[0] == 'occlusion'
    assert verdict(made_up(raw=(.3, .1), rollout=(.25, .1), centre=(.4, nan))).startswith('none beats the centre: the best, raw')
