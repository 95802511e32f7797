"Package metadata comes from settings.ini, the file nbdev reads, so that nothing is written twice."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      license='Apache-2.0', python_requires=f">={cfg['min_python']}",
      long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
      long_description_content_type='text/markdown',
      packages=find_packages(include=['vidlab', 'vidlab.*', 'data_tools']),
      install_requires=cfg['requirements'].split(),
      extras_require={'dev': cfg['dev_requirements'].split(), 'torchcodec': ['torchcodec'],
                      'tensorboard': ['tensorboard'],
                      'text': ['transformers>=4.40']})
