"Intervals, paired tests and what the tasks make of them: against scipy, by invariances, and by the metrics themselves"
import math
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats as scipy_stats
from vidlab.core import RunFolder, read_json, write_json
from vidlab.data.manifest import Manifest
from vidlab.evaluate import save_eval
from vidlab.registry import lookup
from vidlab.results import Shown, alike, eval_table, run_names
from vidlab.stats import (choice_interval, detectable, holm, interval, letters, linked, mean_interval, median_interval, needed, not_told_apart, over_seeds, paired, share_interval)
from vidlab.tasks.base import Evaluation


@pytest.fixture
def gen():
    "Numbers of its own for each test: none depends on which tests ran before it"
    return np.random.default_rng(0)


@pytest.mark.parametrize('kind', ['share', 'mean', 'median', np.std])
@pytest.mark.parametrize('copies', [2, 5])
def test_copies_say_nothing_new(kind, copies, gen):
    "Every item several times, as one group: the interval of the items alone, but for the quantile where nothing is wrong"
    x = gen.random(200) < .3 if kind == 'share' else gen.exponential(size=200)
    one, many = interval(x, kind), interval(np.repeat(x, copies), kind, np.repeat(np.arange(200), copies))
    assert (many.n, many.groups) == (200*copies, 200)
    assert [many.low, many.high] == pytest.approx([one.low, one.high], abs=.08*(one.high - one.low))
    assert interval(np.repeat(x, copies), kind).half < .9*one.half                    # forgetting the groups promises too much


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_shares_are_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    theirs = scipy_stats.binomtest(k, n).proportion_ci(method='wilson')
    ours = share_interval(np.arange(n) < k)
    assert [ours.low, ours.high] == pytest.approx([100*theirs.low, 100*theirs.high], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=2, max_size=60))
def test_any_share_in_any_groups(rows):
    a, b, g = map(np.array, zip(*rows))
    for x in (a, b):
        at = share_interval(x, g)
        assert 0 <= at.low <= at.value + 1e-9 and at.value - 1e-9 <= at.high <= 100 and at.half > 0
    d, back = paired(a, b, 'share', g), paired(b, a, 'share', g)
    assert d.value == pytest.approx(-back.value) and d.p == pytest.approx(back.p, abs=.05) and 0 < d.p <= 1
    assert [d.low, d.high] == pytest.approx([-back.high, -back.low]) and d.low <= d.value <= d.high


def test_one_item_and_one_group():
    assert mean_interval([3.]).low == -math.inf and mean_interval([3., 4.], [0, 0]).high == math.inf
    one = share_interval([True])
    assert 0 < one.low < 100 and one.high == 100
    with pytest.raises(ValueError, match='no items'): interval([])
    with pytest.raises(ValueError, match='3 groups for 2 items'): interval([1, 2], 'mean', [1, 2, 3])


@pytest.mark.parametrize('kind', ['share', 'mean'])
def test_exchange_is_the_exact_test(kind, gen):
    "All exchanges of eight groups, written out"
    a, b = (gen.random((2, 16)) < [[.4], [.7]]).astype(float) if kind == 'share' else gen.normal(size=(2, 16))
    g, d = np.arange(16)//2, np.bincount(np.arange(16)//2, b - a)
    signs = np.array(np.meshgrid(*[[-1, 1]]*8)).reshape(8, -1)
    want = (abs(signs.T @ d) >= abs(d.sum()) - 1e-9).mean()
    assert paired(a, b, kind, g).p == pytest.approx(want, abs=.01)


def test_mcnemar_of_single_items():
    a, b = np.arange(100) < 60, (np.arange(100) >= 5) & (np.arange(100) < 74)
    assert paired(a, b, 'share').p == pytest.approx(scipy_stats.binomtest(5, 19).pvalue) and paired(a, b, 'share').disagree == .19


def test_median_ranks_are_compared(gen):
    a, b = np.ceil(gen.exponential(5, 200)), np.ceil(gen.exponential(9, 200))
    assert paired(a, b, 'median').p < .05 < paired(a, a[::-1].copy(), 'median').p
    at, theirs = median_interval(a), scipy_stats.quantile_test(a, p=.5).confidence_interval()
    assert abs(at.low - theirs.low) <= 1 and abs(at.high - theirs.high) <= 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(p):
    "The k-th smallest times the number of those not smaller, never below a smaller one's"
    want = [min(1, max(sorted(p)[j]*(len(p) - j) for j in range(sorted(p).index(x) + p[:i].count(x) + 1))) for i, x in enumerate(p)]
    assert holm(p).max() == pytest.approx(max(want)) and holm(p).min() == pytest.approx(min(want))


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 7), st.data())
def test_letters_say_who_is_apart(n, data):
    names = [f'm{i}' for i in range(n)]
    every = [(a, b) for i, a in enumerate(names) for b in names[i+1:]]
    apart = data.draw(st.sets(st.sampled_from(every)))
    said = letters(names, apart)
    for a, b in every: assert bool(set(said[a]) & set(said[b])) == ((a, b) not in apart)
    sets = not_told_apart(names, apart)
    assert not any(s < t for s in sets for t in sets)


def test_linked_by_networks():
    keys = [['a', 'a', None, 'b', 'c', ''], [1, 2, 2, 3, float('nan'), 3]]
    assert linked(*keys).tolist() == [0, 0, 0, 1, 2, 1]


def test_seeds_widen(gen):
    "Seeds that agree add nothing; seeds that scatter widen the interval"
    one = gen.random(300) < .6
    same, apart = np.repeat(one[None], 3, 0), np.stack([gen.random(300) < p for p in (.4, .6, .8)])
    assert over_seeds(same, 'share').half == pytest.approx(100*1.97*one.std()/math.sqrt(300), rel=.02) and over_seeds(same, 'share').deviation == 0
    assert over_seeds(np.ones((3, 30)), 'share').low < 95
    assert over_seeds(apart, 'share').half > 3*over_seeds(same, 'share').half and over_seeds(apart, 'share').deviation > 15


def test_power_by_the_rule():
    "More items for smaller differences and more disagreement; a worked value (Connor 1987)"
    z = scipy_stats.norm.ppf([.975, .8])
    assert needed(10, .3) == math.ceil(((z[0]*math.sqrt(.3) + z[1]*math.sqrt(.29))/.1)**2)
    assert needed(1, .1) > needed(2, .1) > needed(2, .05) and needed(detectable(400, .2), .2) <= 401
    with pytest.raises(ValueError, match='disagree'): needed(5, .01)


def clips(n): return torch.arange(n)

def measured_tasks():
    "Task, parts of an evaluation of 40 clips of which one could not be read"
    n = 40
    sid, view, logits, label = clips(n - 1), clips(n - 1)*0, torch.randn(n - 1, 6, generator=torch.manual_seed(0)), torch.arange(n - 1) % 6
    class Same(torch.nn.Module):
        card = type('Card', (), dict(classes=0))()
        def similarity(self, text, video, *rest, **kw): return text @ video.T
    def of(name, **kw):
        cls = lookup('task', name)
        t = cls.__new__(cls)
        torch.nn.Module.__init__(t)
        t.model = Same()
        t.model.w = torch.nn.Parameter(torch.zeros(1))
        for k, v in kw.items(): setattr(t, k, v)
        return t
    video = torch.nn.functional.normalize(logits, dim=1)
    text = torch.cat([video + .6*torch.randn(n - 1, 6, generator=torch.manual_seed(i)) for i in (1, 2)])
    sides = dict(video=dict(sid=sid, view=view, video=video, video_mask=view), text=dict(sid=sid.repeat(2), view=clips(2) .repeat_interleave(n - 1), text=text, text_mask=sid.repeat(2)))
    order = sides['text']['sid'].argsort(stable=True)
    sides['text'] = {k: v[order] for k, v in sides['text'].items()}
    kw = dict(average='softmax', mean_ap=True)
    yield of('retrieval', dsl=False, more_recalls=(50,)), sides, n
    yield of('retrieval', dsl=True, more_recalls=()), sides, n
    yield of('recognition', **kw), dict(video=dict(sid=sid, view=view, logits=logits, label=label)), n
    yield of('recognition', **kw), dict(video=dict(sid=sid, view=view, logits=logits, label=(torch.rand(n - 1, 6, generator=torch.manual_seed(3)) < .3).long())), n
    yield of('regression'), dict(video=dict(sid=sid, view=view, logits=logits[:, :1], target=logits[:, 0] + logits[:, 1])), n
    yield of('same_class'), dict(video=dict(sid=sid, view=view, label=label, video=video)), n
    pairs = dict(sid=sid, view=view, text=text[order][::2], video=video, right=torch.rand(n - 1, 4, generator=torch.manual_seed(4)) < .7)
    yield of('sorting', more_recalls=()), dict(pairs=pairs), n
    yield of('masked'), dict(video=dict(sid=sid, view=view, align=logits[:, 0].abs())), n


@pytest.mark.parametrize('case', range(8))
def test_every_metric_of_every_task_has_its_interval(case, tmp_path):
    task, parts, n = list(measured_tasks())[case]
    res = dict(task.score(parts, {k: n for k in parts}), seconds=0.)
    for i in range(n): (tmp_path/f'{i}.mp4').touch()
    rows = Manifest.build(dict(id=[f'c{i}' for i in range(n)], path=[f'{i}.mp4' for i in range(n)], source=[f's{i//4}' for i in range(n)]), tmp_path)
    save_eval(RunFolder(tmp_path), 'test', res, dict(task=lookup_name(task)), rows)
    said = read_json(tmp_path/'eval'/'test.json')
    shown = {k for k in type(task).columns if k in res['metrics']}
    assert shown and shown <= set(said['intervals']), shown - set(said['intervals'])
    for k in shown:
        i, v = said['intervals'][k], res['metrics'][k]
        assert i['low'] <= v + 1e-6 and v - 1e-6 <= i['high'] and i['low'] < i['high'] and i['groups'] == 10, (k, v, i)


def lookup_name(task):
    from vidlab.registry import names
    return next(n for n in names('task') if lookup('task', n) is type(task))


def test_what_an_evaluation_is_worth_stays_when_its_interval_fails(tmp_path, monkeypatch):
    "A task from outside whose numbers per clip fail: its metrics are kept"
    cls = lookup('task', 'recognition')
    monkeypatch.setattr(cls, 'per_clip', classmethod(lambda c, e: 1/0))
    monkeypatch.setattr(cls, 'items', classmethod(lambda c, e, m: 1/0))
    with pytest.raises(ZeroDivisionError): save_eval(RunFolder(tmp_path), 'test', dict(metrics=dict(top1=1.), arrays=dict(sid=clips(3)), seconds=0.), dict(task='recognition'))
    assert read_json(tmp_path/'eval'/'test.json')['metrics'] == dict(top1=1.) and (tmp_path/'eval'/'test.safetensors').exists()


@pytest.mark.parametrize('pairs,ties,right', [(54, 0., .6), (54, .5, .5), (54, .9, .5), (20, .3, .9), (200, .2, .95)])
def test_choices_within_pairs_are_where_they_are_said_to_be(pairs, ties, right, gen):
    "2,000 evaluations of pairs whose two captions often answer alike: 95 of 100 intervals hold the truth"
    truth, found, both = 100*(ties/2 + (1 - ties)*right), 0, np.repeat(np.arange(pairs), 2)
    for _ in range(2000):
        alike, (u, v) = np.repeat(gen.random(pairs) < .5, 2), gen.random((2, 2*pairs))
        u, v = (np.where(alike, np.repeat(x[::2], 2), x) for x in (u, v))
        at = choice_interval(np.where(u < ties, .5, v < right), both)
        found += at.low - 1e-9 <= truth <= at.high + 1e-9
    assert .935 < found/2000, found/2000
    assert found/2000 < .999


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, .5, 1]), min_size=1, max_size=60))
def test_any_choices(x):
    at, turned = choice_interval(x), choice_interval(1 - np.array(x))
    assert 0 <= at.low <= at.value <= at.high <= 100 and at.half > 0
    assert [turned.low, turned.high] == pytest.approx([100 - at.high, 100 - at.low])


def test_numbers_of_a_table():
    x = Shown(57.4, 9.23)
    assert str(x) == '57.4 ± 9.2' and float(x) == x == 57.4 < 60 and str(Shown(.123456, .0234, None)) == '0.1235 ± 0.023'


def test_runs_of_one_recipe_are_rows_with_their_seed(tmp_path):
    places = [tmp_path/'a'/f't{i}' for i in range(3)] + [tmp_path/'b'/'t']
    for i, p in enumerate(places):
        p.mkdir(parents=True)
        write_json(p/'config.json', dict(recipe='a', seed=i, lr=.1, device=f'cuda:{i}'))
    assert run_names(places) == ['a seed=0', 'a seed=1', 'a seed=2', 'b']
    write_json(places[1]/'config.json', dict(recipe='a', seed=0, lr=.1))
    assert run_names(places) == ['a t0', 'a t1', 'a seed=2', 'b']


def test_other_items_are_not_compared(tmp_path):
    "Letters are given to runs that answered the same items, and to no others"
    prob, runs = torch.eye(2)[torch.zeros(30, dtype=torch.long)], {}
    for name, n in dict(whole=30, half=15).items():
        runs[name] = RunFolder(tmp_path/name/'run')
        save_eval(runs[name], 'test', dict(metrics=dict(top1=100.), arrays=dict(prob=prob[:n], label=clips(n)*0, sid=clips(n)), seconds=0.), dict(task='recognition'))
    assert alike(runs) == {} and 'alike' not in eval_table(runs)


def test_many_equal_runs_are_one_group(tmp_path):
    "Twelve runs of equal skill: some pair differs by chance, and the table knows how many were looked at"
    runs, skill = {}, np.random.default_rng(2).random((12, 80)) < .5
    for i, right in enumerate(skill):
        y = torch.zeros(80, dtype=torch.long)
        runs[f'r{i}'] = RunFolder(tmp_path/f'r{i}'/'run')
        prob = torch.eye(2)[torch.as_tensor(right).long().logical_not().long()]
        save_eval(runs[f'r{i}'], 'test', dict(metrics=dict(top1=100*right.mean()), arrays=dict(prob=prob, label=y, sid=clips(80)), seconds=0.), dict(task='recognition'))
    assert min(paired(a, b, 'share').p for i, a in enumerate(skill) for b in skill[:i]) < .05
    assert set(alike(runs).values()) == {'a'}


def test_films_and_uploads_are_sources(tmp_path):
    "Clips of one video of the public sets are one group"
    from vidlab.data.manifest import Manifest
    from vidlab.registry import create
    names = dict(ucf101=['Archery/v_Archery_g01_c01.avi', 'Archery/v_Archery_g01_c02.avi', 'Archery/v_Archery_g02_c01.avi'],
                 hmdb51=['wave/50_FIRST_DATES_wave_f_cm_np1_fr_med_0.avi', 'wave/50_FIRST_DATES_wave_f_cm_np1_fr_med_1.avi', 'wave/Ariel_wave_u_nm_np1_fr_med_0.avi'])
    for p in sum(names.values(), []):
        (tmp_path/p).parent.mkdir(exist_ok=True)
        (tmp_path/p).touch()
    (tmp_path/'classInd.txt').write_text('1 Archery\n')
    (tmp_path/'trainlist01.txt').write_text(f'{names["ucf101"][0]} 1\n')
    (tmp_path/'testlist01.txt').write_text('\n'.join(names['ucf101']))
    (tmp_path/'wave_test_split1.txt').write_text('\n'.join(f'{p.split("/")[1]} 2' for p in names['hmdb51']))
    for name in names:
        m = create('data', name, path=tmp_path, root=tmp_path).split('test')
        assert m.related().tolist() == [0, 0, 1], name


def test_what_cannot_be_said_has_no_end():
    "Ranks without end, targets that do not differ: an interval without end, and no warning"
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert interval([math.inf]*5 + [1.], 'median').half == math.inf
        from vidlab.tasks.regression import _r2
        assert interval(np.array([[1., 1.], [2., 2.], [3., 2.], [4., 2.]]), _r2).half == math.inf
