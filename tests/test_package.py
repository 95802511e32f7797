"Wheel and sdist: what they hold, that the sdist builds the same wheel, and that an installed copy works without a checkout."
import configparser, os, shutil, subprocess, sys, tarfile, zipfile
from email import message_from_bytes
from pathlib import Path
import pytest
from vidlab.data.names import SHIPPED
from conftest import encode

pytest.importorskip('build')
ROOT = Path(__file__).resolve().parents[1]
KEPT = ('vidlab', 'nbs', 'data_tools', 'tests', 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'Makefile', 'constraints.txt')


def settings():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    return cfg['DEFAULT']


def build(what, source, out):
    r = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', f'--{what}', '--outdir', str(out), str(source)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    file, = out.glob('*.whl' if what == 'wheel' else '*.tar.gz')
    return file


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A copy of the checkout, its sdist and its wheel: nothing is written beside the sources"
    top = tmp_path_factory.mktemp('package')
    (top/'copy').mkdir()
    for name in KEPT:
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, top/'copy'/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(ROOT/name, top/'copy'/name)
    return top, build('sdist', top/'copy', top/'sdist'), build('wheel', top/'copy', top/'wheel')


@pytest.fixture(scope='module')
def site(made):
    "A folder with the package as pip installs it"
    to = made[0]/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps', '--no-index', '--no-compile', '--target', to, made[2]], check=True)
    return to


def listed(wheel):
    with zipfile.ZipFile(wheel) as z: return sorted(n for n in z.namelist() if not n.endswith('RECORD'))


def test_the_wheel_holds_all_that_a_run_needs(made):
    inside = set(listed(made[2]))
    runs = ROOT/'nbs'/'runs'
    assert {f'vidlab/_pages/{p.relative_to(runs).as_posix()}' for p in [*runs.glob('*.ipynb'), *runs.glob('recipes/*.yaml')]} <= inside
    assert {p.relative_to(ROOT).as_posix() for d in ('vidlab', 'data_tools') for p in (ROOT/d).rglob('*.py')} | {'vidlab/py.typed'} <= inside
    assert {f'vidlab/_pages/classes/{w}.txt' for w in SHIPPED} <= inside
    assert {n.split('/')[0] for n in inside} == {'vidlab', 'data_tools', next(n for n in inside if 'dist-info' in n).split('/')[0]}


def test_metadata_is_that_of_the_settings(made):
    cfg = settings()
    with zipfile.ZipFile(made[2]) as z:
        meta = message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))))
        assert b'vidlab = vidlab.cli:main' in z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt')))
    assert (meta['Name'], meta['Version'], meta['Requires-Python']) == (cfg['lib_name'], cfg['version'], f'>={cfg["min_python"]}')
    assert meta['Summary'] == cfg['description'] and cfg['author'] in meta['Author'] + meta['Author-email']
    asked = {r.split(';')[0].strip() for r in meta.get_all('Requires-Dist') if 'extra ==' not in r}
    assert {r.split('>')[0].split('<')[0] for r in asked} == {r.split('>')[0].split('<')[0] for r in cfg['requirements'].split()}


def test_the_sdist_builds_the_same_wheel(made):
    top, sdist, wheel = made
    with tarfile.open(sdist) as t: t.extractall(top/'unpacked', **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    source, = (top/'unpacked').iterdir()
    assert listed(build('wheel', source, top/'again')) == listed(wheel)


def test_an_installed_copy_needs_no_checkout(site, tmp_path):
    here = tmp_path/'here'
    here.mkdir()
    (here/'settings.ini').write_text('[DEFAULT]\n')                 # a folder that merely looks like a project
    code = ('import pathlib, vidlab, vidlab.core as c\n'
            'from vidlab.config import list_recipes, recipes_dir\n'
            f'assert pathlib.Path(c.__file__).is_relative_to({str(site)!r}), c.__file__\n'
            'assert (c.pages_dir()/"train.ipynb").exists() and recipes_dir() == c.pages_dir()/"recipes"\n'
            'assert c.project_root() == pathlib.Path.cwd() and c.outputs_dir() == pathlib.Path.cwd()/"outputs"\n'
            'print(len(list_recipes()), vidlab.__version__)')
    env = {k: v for k, v in os.environ.items() if k != 'VIDLAB_OUTPUTS'} | {'PYTHONPATH': str(site)}
    r = subprocess.run([sys.executable, '-c', code], cwd=here, capture_output=True, text=True, env=env)
    from vidlab.config import list_recipes
    assert r.returncode == 0 and r.stdout.split() == [str(len(list_recipes())), settings()['version']], r.stderr


def test_an_installed_copy_reads_any_video(site, tmp_path):
    "From the wheel alone: class lists, the tool that checks videos, vectors of three files, the third half a file"
    here = tmp_path/'here'
    here.mkdir()
    for name, codec in (('a.mp4', 'libx264'), ('b c.avi', 'mpeg4')): encode(here/name, codec=codec)
    (here/'half.mp4').write_bytes((here/'a.mp4').read_bytes()[:600])
    code = ("import vidlab; from vidlab.data.tables import class_list\n"
            "m = vidlab.load('clip4clip', preset='tiny', weights='random', max_frames=2, device='cpu', on_bad='miss')\n"
            "v = m.embed_videos('.')\n"
            "print(len(class_list('kinetics400')), tuple(v.shape), v.isnan().any(1).tolist(), vidlab.__file__)")
    env = {k: v for k, v in os.environ.items() if k != 'VIDLAB_OUTPUTS'} | dict(PYTHONPATH=str(site), VIDLAB_CACHE=str(tmp_path/'cache'))
    r = subprocess.run([sys.executable, '-c', code], cwd=here, capture_output=True, text=True, env=env)
    assert r.stdout.splitlines()[-1:] == [f'400 (3, 64) [False, False, True] {site}/vidlab/__init__.py'], r.stdout + r.stderr[-2000:]
    r = subprocess.run([sys.executable, '-m', 'vidlab.cli', 'check_videos', '.'], cwd=here, capture_output=True, text=True, env=env)
    assert r.returncode == 1 and 'half.mp4' in r.stdout + r.stderr, r.stdout + r.stderr[-2000:]
