"""Options and paths shared by all tests."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for p in (HERE.parent, HERE):          # `vidlab` and `data_tools` from the checkout, `goldens` from here
    if str(p) not in sys.path: sys.path.insert(0, str(p))


def pytest_addoption(parser):
    parser.addoption('--golden', default=str(HERE/'golden'), metavar='DIR',
                     help='folder with golden cases: one system or the parent of several (default: tests/golden)')


def pytest_configure(config):
    config.addinivalue_line('markers', "slow: takes more than about seven seconds; `-m 'not slow'` runs the fast tests")
