"Stored pages: every metric in their tables says how far it may be off"
import json, re
from html.parser import HTMLParser
from pathlib import Path
import pytest
from vidlab.profile import COLUMNS
from vidlab.registry import lookup, names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT/'nbs'/'tour').glob('*.ipynb'), *(ROOT/'nbs'/'runs').glob('*.ipynb'), ROOT/'nbs'/'index.ipynb'])
NUMBER = re.compile(r'-?\d+(\.\d+)?')


def metrics():
    "What heads a column or a row of a metric"
    columns = {k: c for t in names('task') for k, c in lookup('task', t).columns.items()}
    short = {k.split('/')[-1]: c for k, c in columns.items()}
    return {c.head(k) for k, c in {**columns, **short}.items()} | {*columns, *COLUMNS, 'within pair', 'accuracy', 'order alone decides'}


EXACT = {'guess', 'blind to order'}                  # columns that are known, not measured


class Tables(HTMLParser):
    "Rows of cells of all tables; a cell over several columns stands in each"
    def __init__(self):
        super().__init__()
        self.rows, self.cell = [], None
    def handle_starttag(self, tag, attrs):
        if tag == 'table': self.rows.append([])
        if tag == 'tr' and self.rows: self.rows[-1].append([])
        if tag in ('td', 'th'): self.cell, self.wide = '', int(dict(attrs).get('colspan', 1))
    def handle_data(self, data):
        if self.cell is not None: self.cell += data
    def handle_endtag(self, tag):
        if tag not in ('td', 'th') or self.cell is None: return
        self.rows[-1][-1] += [self.cell.strip()]*self.wide
        self.cell = None


def bare_in_rows(rows, known): # (column or row, number) of metrics without an interval
    heads, out = [], []
    for row in rows:
        if not any(NUMBER.match(c) for c in row):
            heads.append(row)
            continue
        of = [next((h[j] for h in heads if j < len(h) and h[j] in known), row[0] if row[0] in known else None) for j in range(len(row))]
        exact = [any(j < len(h) and h[j] in EXACT for h in heads) for j in range(len(row))]
        out += [(m, c) for m, c, known_so in zip(of, row, exact) if m and not known_so and NUMBER.fullmatch(c)]
    return out


def bare_in_text(text, known): # a table as `print` shows it: cells lie two spaces apart
    out, heads = [], []
    for line in text.splitlines():
        cells = re.split(r'\s{2,}', re.sub(r'(?<=[^\s]) (?=(?:[tv]2[tv]|within pair|alike|clips/s|peak MiB|train s)\b)', '  ', line.strip()))
        if sum(c in known for c in cells) > 1: heads = cells
        elif heads and len(cells) == len(heads) + 1: out += [(h, c) for h, c in zip(heads, cells[1:]) if h in known and NUMBER.fullmatch(c)]
    return out


def bare(page, known): # of a stored page
    out = []
    for c in json.loads(page.read_text(encoding='utf-8'))['cells']:
        for o in c.get('outputs', []):
            html = ''.join(o.get('data', {}).get('text/html', []))
            if '<table' in html:
                (t := Tables()).feed(html)
                for rows in t.rows: out += bare_in_rows(rows, known)
            out += bare_in_text(''.join(o.get('text', [])), known)
    return out


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_metrics_of_a_stored_page_have_their_interval(page):
    found = bare(page, metrics())
    assert not found, f'{page.name}: {len(found)} metrics without ±, such as {found[:5]}'


def test_what_has_no_interval_is_found():
    known = metrics()
    assert {'t2v R1', 'R1', 'top1', 'mse ↓', 'within pair', 't2v/R1'} <= known
    html = '<table><tr><th></th><th>top1</th><th>clips</th></tr><tr><th>a</th><td>50.0</td><td>3</td></tr><tr><th>b</th><td>50.0 ± 2.0</td><td>3</td></tr></table>'
    (t := Tables()).feed(html)
    assert bare_in_rows(t.rows[0], known) == [('top1', '50.0')]
    wide = [['', 'a', 'a'], ['', 'R1', 'within pair'], ['up', '1.0', '2.0 ± 1.0']]
    assert bare_in_rows(wide, known) == [('R1', '1.0')]
    assert bare_in_rows([['', 'before'], ['sorted', '93.8']], known) == [('sorted', '93.8')]
    assert bare_in_text('   top1  within pair clips/s\na  50.0 ± 1.0  48.6  12', known) == [('within pair', '48.6')]
