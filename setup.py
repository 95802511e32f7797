"Package metadata comes from settings.ini, so that nothing is written twice."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(HERE/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
STATUS = {'2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}


class WithPages(build_py):
    "An installed copy brings the run pages, their recipes and lists along; in a checkout they lie in nbs/runs alone"
    def run(self):
        super().run()
        if self.editable_mode: return
        runs, inside = HERE/'nbs'/'runs', Path(self.build_lib)/'vidlab'/'_pages'
        shutil.rmtree(inside, ignore_errors=True)
        for file in [*runs.glob('*.ipynb'), *runs.glob('*/*.yaml'), *runs.glob('*/*.txt'), *runs.glob('*/*.sh')]:
            to = inside/file.relative_to(runs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        (inside.parent/'py.typed').touch()


setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      author_email=cfg['author_email'], license='Apache-2.0', license_files=['LICENSE'], keywords=cfg['keywords'].split(),
      python_requires=f">={cfg['min_python']}",
      classifiers=[f"Development Status :: {STATUS[cfg['status']]}", f"Intended Audience :: {cfg['audience']}",
                   'Intended Audience :: Science/Research', f"Natural Language :: {cfg['language']}", 'Framework :: Jupyter',
                   'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                   'Typing :: Typed'],
      long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['vidlab', 'vidlab.*', 'data_tools']),
      cmdclass={'build_py': WithPages},
      entry_points={'console_scripts': ['vidlab = vidlab.cli:main']},
      install_requires=cfg['requirements'].split(),
      extras_require={'dev': cfg['dev_requirements'].split(), 'torchcodec': ['torchcodec'], 'browser': cfg['browser_requirements'].split(), 'app': cfg['app_requirements'].split(),
                      'tensorboard': ['tensorboard'], 'numba': ['numba>=0.61'], 'oracles': ['captum', 'quantus'], 'export': cfg['export_requirements'].split(),
                      'search': cfg['search_requirements'].split(), 'scenes': cfg['scenes_requirements'].split(),
                      **{k: cfg[f'{k}_requirements'].split() for k in ('s3', 'gs', 'http')},
                      'text': ['transformers>=4.40']})
