"Packaging from settings.ini, so that nbdev and pip read the same facts"
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
py_versions = '3.10 3.11 3.12 3.13'.split()
extras = {o: cfg[f'{o}_requirements'].split() for o in ('encoders','cluster','gpus','explorer')}
tested = [r for o in ('cluster','gpus','explorer') for r in extras[o]] # what the tests run, too

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=['Development Status :: ' + statuses[int(cfg['status'])], 'Intended Audience :: Science/Research',
                 'Natural Language :: English'] + [f'Programming Language :: Python :: {v}' for v in py_versions],
    packages=find_packages(include=['crossfusion*']),
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']),
    extras_require={**extras, 'dev': cfg['dev_requirements'].split() + tested},
    entry_points={'console_scripts': [s.strip() for s in cfg['console_scripts'].split('\n') if s.strip()],
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
