"""Is this Python one that vidlab can be installed with? One line and exit code 1 if not. Runs on any Python.

which_python.py [any] [apart]     any: also one that is newer than the tested ones; apart: not for this checkout's .venv
"""
import os, re, sys

here = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
with open(os.path.join(here, 'constraints.txt')) as f:
    tested = re.match(r'# Python 3\.(\d+) to 3\.(\d+); [\d.]+: (.*)', f.readline())
oldest, newest, why = int(tested.group(1)), int(tested.group(2)), tested.group(3)
this, name = sys.version_info[:2], '%s (%s)' % (sys.version.split()[0], sys.executable)
advice = 'Name one from 3.%d to 3.%d, e.g. make PYTHON=python3.%d' % (oldest, newest, newest)
own = os.path.join(here, '.venv', 'pyvenv.cfg')
if this < (3, oldest):
    sys.exit('vidlab needs Python 3.%d or newer, and this is %s. %s' % (oldest, name, advice))
if this > (3, newest) and 'any' not in sys.argv[1:]:
    sys.exit('Python %s is too new: %s yet. %s; or try all the same: make NEWEST=1' % (name, why, advice))
if os.path.exists(own) and 'apart' not in sys.argv[1:]:
    with open(own) as f:
        made = re.search(r'version\s*=\s*(\d+\.\d+)', f.read())
    if made and made.group(1) != '%d.%d' % this:
        sys.exit('.venv was made with Python %s, and this is %s: remove it (rm -r .venv), or name that Python: make PYTHON=python%s' % (made.group(1), name, made.group(1)))
