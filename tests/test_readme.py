"""Every command that README.md prints, as printed, in a folder of one's own: those that train get a small data set, small models in the
place of public weights, and few steps; those that need public data are resolved. A command that no line of KNOWN describes is an error."""
import csv, json, os, re, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest
import yaml
import vidlab
from data_tools import make_manifest
from vidlab import cli
from vidlab.config import config_from
from vidlab.core import rng
from vidlab.data.shapes import clip_item, encode, make_shapes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
FIRST = ('make', 'pip', 'vidlab', 'papermill', 'source', 'python', 'pytest')


def prose(page):
    "The markdown of a page"
    cells = json.loads((ROOT/'nbs'/page).read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def printed(text):
    "Commands of the `sh` blocks and of `code` in the text, without their comments"
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M)
    inline = re.findall(r'`([^`\n]+ [^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M))
    lines = [l for b in blocks for l in b.splitlines() if l.strip()] + [c for c in inline if c.split()[0] in FIRST]
    return [shlex.join(shlex.split(l, comments=True)) for l in lines]


TINY = 'epochs=1 batch_size=12 eval_batch_size=12 max_frames=2 workers=0 device=cpu precision=fp32 preset=tiny'
SHAPES = 'data_path=shapes batch_size=8 eval_batch_size=8 workers=0 device=cpu weights=random'
KNOWN = [ # command (`*`: anything), words more; or how else it is tried
    ('make *', 'make'), ('pip install *', 'pip'), ('vidlab train msrvtt9k_seqTransf_b32 *', 'resolve'),
    ('source .venv/bin/activate', 'no'), ('vidlab app search my_videos', 'no'), ('vidlab attention', 'no'),
    ('vidlab train shapes_smoke', SHAPES), ('vidlab check_videos my_videos', ''), ('vidlab compress_videos my_videos small_videos', ''),
    ('vidlab train own_classes video_root=small_videos', f'{TINY} weights=random'),
    ('vidlab train own_captions data_path=my.csv', f'{TINY} weights=random clip=tiny max_words=16'),
    ('vidlab train own_videos video_root=small_videos', f'{TINY} image_size=64 out_dim=64 dim=32 depth=2 state=4 teacher=tiny teacher_weights=random mask_ratio=.5'),
    ('vidlab audit my_videos', ''), ('vidlab start my_videos', 'weights=tiny epochs=1 batch_size=12'),
    ('vidlab index my_videos', 'model=clip4clip "options={preset: tiny, weights: shapes}" device=cpu'), ("vidlab search my_videos 'a dog runs, then jumps'", 'device=cpu'), ('vidlab predict own_classes my_videos', 'device=cpu'),
    ('vidlab recipes *', ''), ('vidlab runs', ''), ('vidlab train --help', ''), ('vidlab train shapes_seqTransf epochs=2', SHAPES),
    ('vidlab evaluate shapes_seqTransf dsl=True', 'workers=0 device=cpu'), ('vidlab attention shapes_seqTransf sid=5', ''), ('vidlab attention shapes_seqTransf video=my.mp4', ''), ('vidlab time shapes_seqTransf', 'workers=0 device=cpu shuffles=1'),
    ('papermill nbs/runs/train.ipynb out.ipynb -p recipe shapes_seqTransf -p epochs 2', SHAPES)]

def lines_of(command): return [(p, more) for p, more in KNOWN if re.fullmatch(re.escape(p).replace(r'\*', '.*'), command)]

def line_of(command):
    "The first line of KNOWN that fits"
    found = lines_of(command)
    assert found, f'README prints `{command}`, and no line of KNOWN in tests/test_readme.py says how to try it'
    return found[0]

def tried(how): return [c for c in dict.fromkeys(printed(README)) if how in [more for _, more in lines_of(c)]]


def test_every_command_is_known_and_nothing_else():
    assert {line_of(c)[0] for c in printed(README)} == {p for p, _ in KNOWN}

def test_an_unknown_command_fails():
    text = 'See\n```sh\nmake run   # first\nvidlab dance video_root=x\n```\nor `vidlab train own_classes`.'
    assert printed(text) == ['make run', 'vidlab dance video_root=x', 'vidlab train own_classes']
    for c in printed(text)[1:]:
        with pytest.raises(AssertionError, match='no line of KNOWN'): line_of(c)
    for c, said in (('vidlab dance x', 'no page'), ('vidlab train msrvtt9k_seqtransf_b32', 'unknown recipe'), ('vidlab train shapes_stan dta_path=x', 'did you mean'),
                    ('vidlab make_manifest msrvt', 'did you mean'), ('vidlab make_manifest msrvtt --trin_csv x', 'no meaning')):
        with pytest.raises((AssertionError, ValueError), match=said): resolve(c)


def test_what_it_says_of_papers_and_version():
    "CITATION.cff names the papers of the README and the version of the package; the CHANGELOG leads there"
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cff) and cff['cff-version'] == '1.2.0'
    assert {r['url'] for r in cff['references']} == set(re.findall(r'https://arxiv.org/abs/[\d.]+', README))
    assert all(r['identifiers'][0]['value'] == 'arXiv:' + r['url'].rpartition('/')[2] and r['authors'] for r in cff['references'])
    version = re.search(r'^version = (.*)', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert cff['version'] == version and version in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

@pytest.mark.parametrize('command', tried('make'))
def test_make(command): subprocess.run(['make', '-n', *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)

@pytest.mark.parametrize('command', tried('pip'))
def test_pip(command, tmp_path):
    "The package is made from a copy of the checkout, and nothing is installed"
    words, here = shlex.split(command), tmp_path/'checkout'
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns('.git', '.venv', 'outputs', '__pycache__', 'tests', '*.egg-info', 'build'))
    flags = ['--quiet', '--dry-run', '--no-deps', '--no-index', '--no-build-isolation']
    r = subprocess.run([sys.executable, '-m', *words[:2], *flags, *words[2:]], cwd=here, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]


def resolve(command):
    "See that a command's page or tool, its words and its recipe are known, as far as that needs no data"
    _, what, *words = shlex.split(command)
    if what == 'make_manifest':
        if words != ['--help']: make_manifest.parse(words[0], words[1:])
        return
    if what in cli.TOOLS: return
    assert what in cli.run_pages(), f'no page {what}'
    values = cli.values_of(what, [w for w in words if '=' in w])
    known = {'data', 'data_path', 'video_root', 'eval_path', 'eval_root', 'start'}
    for recipe in [w for w in words if '=' not in w and '<' not in w]: config_from(recipe, **{k: v for k, v in values.items() if k in known})

@pytest.mark.parametrize('command', tried('resolve') + [c for page in ('tour/zoo.ipynb', 'tour/data_sets.ipynb') for c in printed(prose(page)) if c.split()[1] != 'recipes'])
def test_what_needs_public_data_is_resolved(command): resolve(command)


# ---------------------------------------------------------------------------------------------------- in a folder of one's own

START = dict(vidlab=['-c', 'import sys; from vidlab.cli import main; sys.exit(main())'], papermill=['-m', 'papermill', '--no-progress-bar'])

@pytest.fixture
def here(tmp_path):
    "A checkout of one's own, as far as running needs it"
    for d in ('vidlab', 'data_tools', 'nbs/runs'): shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/f, tmp_path/f)
    return tmp_path

def surroundings(here):
    env = {k: v for k, v in os.environ.items() if k != 'VIDLAB_OUTPUTS'}
    return {**env, 'PYTHONPATH': str(here), 'OMP_NUM_THREADS': '1', 'COLUMNS': '150'}

def go(here, command):
    "A command with its words more, as a process; what it said"
    first, *words = shlex.split(command)
    more = shlex.split(line_of(command)[1])
    if first == 'papermill': more = [w for m in more for w in ('-p', *m.split('='))]
    args = [sys.executable, *START[first], *words, *more]
    r = subprocess.run(args, cwd=here, capture_output=True, text=True, timeout=200, env=surroundings(here))
    assert r.returncode == 0, f'{command}\n{r.stdout[-3000:]}\n{r.stderr[-3000:]}'
    return r.stdout

def run_here():
    "The commands of the README that are run, but for those of its part about one's own videos"
    own = printed(re.search(r'^## Your own videos\n(.*?)(?=^## )', README, re.S | re.M)[1])
    runs = [c for c in dict.fromkeys(printed(README)) if line_of(c)[1] not in ('make', 'pip', 'resolve', 'no')]
    return [c for c in runs if c in own], [c for c in runs if c not in own]

def states(here):
    return {(p.parent.parent.name, json.loads(p.read_text())['state']) for p in (here/'outputs').glob('*/*/status.json')}

@pytest.mark.long
def test_videos_of_ones_own(here):
    "Its lines in their order, on a folder per class and a table beside it"
    rows = [('path', 'text')]
    for i in range(36):
        name = f'my_videos/{("left", "right")[i % 2]}/clip {i}.mp4'
        (here/name).parent.mkdir(parents=True, exist_ok=True)
        encode(here/name, clip_item(i, rng(0, i))[0])
        rows.append((name, f'clip number {i}'))
    with open(here/'my.csv', 'w', newline='') as f: csv.writer(f).writerows(rows)
    commands, _ = run_here()
    assert len(commands) == 10
    said = {c: go(here, c) for c in commands}
    assert '36 videos' in said['vidlab audit my_videos'] and 'picture' in said["vidlab search my_videos 'a dog runs, then jumps'"]
    assert len(list(here.glob('small_videos/*/*.mp4'))) == 36
    assert states(here) >= {(r, 'done') for r in ('own_classes', 'own_captions', 'own_videos', 'my_videos_probe', 'my_videos_tdsclip')} and {s for _, s in states(here)} == {'done'}

@pytest.mark.long
def test_training_evaluating_looking(here):
    "The other lines in their order, on a small embedded data set; then the newest run as a library takes it, where it can"
    made = make_shapes(here/'made', kinds=('clips',), sizes=dict(clips=dict(train=16, val=8, test=8)))
    made.rename(here/'shapes')
    shutil.copy(next(here.glob('shapes/clips/test/*.mp4')), here/'my.mp4')
    said = {c: go(here, c) for c in run_here()[1]}
    assert 'msrvtt9k_seqTransf_b32' in said['vidlab recipes msrvtt'] and 'shapes_seqTransf' in said['vidlab runs']
    assert (here/'out.ipynb').exists() and states(here) == {(r, 'done') for r in ('shapes_smoke', 'shapes_seqTransf')}
    code = re.findall(r'^```python\n(.*?)^```', README, re.S | re.M)
    assert code and all('vidlab.load' in c for c in code)
    if not hasattr(vidlab, 'load'): return
    shutil.copy(next(here.glob('shapes/clips/test/*.mp4')), here/'a.mp4')
    r = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=here, capture_output=True, text=True, env=surroundings(here))
    assert r.returncode == 0, r.stderr
