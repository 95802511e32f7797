"Every relative link of the pages and of the files that a newcomer reads leads somewhere, and every page can be reached from the start page."
import json, re
from pathlib import Path
from urllib.parse import unquote
import pytest

ROOT = Path(__file__).resolve().parents[1]
START = ROOT/'nbs'/'tour'/'start.ipynb'
INDEX = ROOT/'nbs'/'index.ipynb'                    # becomes README.md, so its links are written as they must stand there
PAGES = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
FILES = [ROOT/f for f in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
ABSOLUTE = re.compile(r'[a-z][a-z0-9+.-]*:|//', re.I)


def prose(file):
    "What a page or a file says outside of code"
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.ipynb':
        text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)


def links(file):
    "Targets of links and pictures that are not on the web"
    text = re.sub(r'`[^`\n]*`', lambda m: 'x'*len(m[0]), prose(file))
    found = re.findall(r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)', text)
    found += re.findall(r'''(?:href|src)=["']([^"']+)''', text) + re.findall(r'^\[[^\]]+\]:\s*(\S+)', text, re.M)
    return [t for t in found if not ABSOLUTE.match(t)]


def slugs(file):
    "Anchors of the headings, as the web names them and as JupyterLab does, in small letters"
    heads = re.findall(r'^#{1,6}\s+(.+?)\s*#*$', prose(file), re.M)
    plain = [re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', h).replace('`', '').lower() for h in heads]
    return {f(h).replace(' ', '-') for h in plain for f in (str, lambda h: re.sub(r'[^\w\- ]', '', h))}


def at(file, target):
    "The file behind a link"
    path = unquote(target.partition('#')[0])
    return ((ROOT if file == INDEX else file.parent)/path).resolve() if path else file


def broken(file):
    "Links that lead nowhere, with the reason"
    for t in links(file):
        to, anchor = at(file, t), unquote(t.partition('#')[2]).lower()
        if t.startswith('/'): yield f'{t}: begins at the root of a machine'
        elif not to.exists(): yield f'{t}: no such file'
        elif anchor and anchor not in slugs(to): yield f'{t}: no such heading'


def reached(start):
    "Every file that links lead to"
    seen, new = set(), [start]
    while new:
        file = new.pop()
        if file in seen or not file.exists(): continue
        seen.add(file)
        if file.suffix in ('.ipynb', '.md'): new += [at(file, t) for t in links(file)]
    return seen


@pytest.mark.parametrize('file', PAGES + FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(file):
    assert list(broken(file)) == []


def test_every_page_is_reached():
    lost = sorted(p.relative_to(ROOT).as_posix() for p in set(PAGES) - reached(START))
    assert lost == [], 'no way from nbs/tour/start.ipynb: give each a link there'


def test_tours_and_run_pages_know_their_neighbours():
    "Each leads back to the start page; the tour of a model leads to it and to the page that trains it, and the model to its tour and its tests"
    tours, runs = (sorted((ROOT/'nbs'/d).glob('*.ipynb')) for d in ('tour', 'runs'))
    to = {p: {at(p, t) for t in links(p)} for p in PAGES}
    for p in {*tours, *runs} - {START}: assert START in to[p], p.name
    for p in runs: assert {t.parent.name for t in to[p]} & {'runs', 'tour'} and len(to[p]) > 1, p.name
    for p in tours:
        model = next((m for m in PAGES if m.parent.name == 'models' and m.stem[3:] == p.stem), None)
        if model is None: continue
        assert {model, ROOT/'nbs'/'runs'/'train.ipynb'} <= to[p] and p in to[model], p.name
        assert any(t.parent.name == 'tests' for t in to[model]), model.name


PLANTED = [ # text, what is wrong with it
    ('[a](there.md)', []), ('[a](there.md#a-heading-with-code)', []), ('[a](#here)\n\n# Here', []), ('[a](https://x.org/y)', []),
    ('`[a](gone.md)`', []), ('```\n[a](gone.md)\n```', []), ('![p](there.md "title")', []), ('[a](a%20b.md)', []),
    ('[a](gone.md)', ['gone.md: no such file']), ('![p](gone.png)', ['gone.png: no such file']), ('<img src="gone.png">', ['gone.png: no such file']),
    ('[a]: gone.md', ['gone.md: no such file']), ('[a](there.md#other)', ['there.md#other: no such heading']), ('[a](/etc)', ['/etc: begins at the root of a machine'])]

@pytest.mark.parametrize('text,said', PLANTED, ids=lambda v: str(v))
def test_planted(text, said, tmp_path):
    (tmp_path/'there.md').write_text('# A heading, with `code`\n')
    (tmp_path/'a b.md').touch()
    (tmp_path/'x.md').write_text(text)
    assert list(broken(tmp_path/'x.md')) == said


def test_a_page_that_nobody_links_is_found(tmp_path):
    for name, text in dict(a='[b](b.md)', b='[a](a.md) [c](c.md)', c='', d='[a](a.md)').items(): (tmp_path/f'{name}.md').write_text(text)
    assert {p.stem for p in reached(tmp_path/'a.md')} == {'a', 'b', 'c'}
