"What a reader finds: links that lead somewhere, pages that exist, commands that run"
import json, os, re, shlex, shutil, subprocess, sys
from inspect import signature
from pathlib import Path

import check, pytest
from conftest import root

commands = set(re.findall(r'^(?:console_scripts = |\t)crossfusion_(\w+)=', (root/'settings.ini').read_text(), re.M))
fence = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)


def text_of(cells, kind): return [''.join(c['source']) for c in cells if c['cell_type'] == kind]


def prose():
    "Every document as path -> markdown, code of notebooks left out"
    pages = {f: '\n\n'.join(text_of(cells, 'markdown')) for f, cells in check.notebooks().items()}
    return pages | {f: (root/f).read_text() for f in check.files() if f.suffix == '.md'}


def slug(heading):
    "A heading's name in a link"
    plain = re.sub(r'`|\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower()
    return re.sub(r'[^\w\- ]', '', plain).strip().replace(' ', '-')


def anchors(text):
    return {slug(h) for h in re.findall(r'^#{1,6} +(.+?)\s*$', fence.sub('', text), re.M)} | {h.strip().replace(' ', '-') for h in re.findall(r'^#{1,6} +(.+?)\s*$', text, re.M)}


def dead_links(pages):
    "Relative links that lead to no file or to no heading of it, a line each"
    dead = []
    for f, text in pages.items():
        for target in re.findall(r'\]\((?![a-z]+:)([^)\s]+)\)', re.sub(r'`[^`\n]*`', '', fence.sub('', text))):
            path, _, anchor = target.partition('#')
            to = (root/f.parent/path).resolve() if path else root/f
            if path and not to.exists(): dead.append(f'{f}: {target}: there is no such file')
            elif anchor and (to.relative_to(root) not in pages or anchor not in anchors(pages[to.relative_to(root)])): dead.append(f'{f}: {target}: there is no such heading')
    return dead


def test_links_lead_somewhere():
    assert not (dead := dead_links(prose())), '\n'.join(dead)


def test_a_dead_link_is_found():
    pages = {Path('nbs/a.ipynb'): '# A title\n\n[core](00_core.ipynb#nowhere) [gone](99_gone.ipynb) [here](#a-title) [web](https://example.org)\n```sh\n[x](y)\n```', Path('nbs/00_core.ipynb'): '# core'}
    assert dead_links(pages) == ['nbs/a.ipynb: 00_core.ipynb#nowhere: there is no such heading', 'nbs/a.ipynb: 99_gone.ipynb: there is no such file']


def test_every_page_is_in_the_sidebar_once():
    listed = re.findall(r'- (\S+\.ipynb)$', (root/'nbs/sidebar.yml').read_text(), re.M)
    assert sorted(listed) == sorted(f.relative_to('nbs').as_posix() for f in check.notebooks())


def test_the_site_is_driven_from_the_top():
    assert (root/'nbs/_quarto.yml').is_symlink() and (root/'nbs/_quarto.yml').resolve() == (root/'_quarto.yml').resolve()
    settings = (root/'_quarto.yml').read_text()
    for wanted in ('metadata-files: [nbdev.yml, sidebar.yml]', 'search: true', 'css: styles.css'): assert wanted in settings
    assert (root/'nbs/styles.css').exists()


def test_make_docs_without_quarto_says_where_to_get_it():
    if shutil.which('quarto'): pytest.skip('Quarto is installed here')
    r = subprocess.run(['make', 'docs'], cwd=root, capture_output=True, text=True)
    assert r.returncode == 2 and 'https://quarto.org' in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr


def said():
    "Every command of ours that a document shows: (document, name, its words)"
    call = re.compile(r'(?<![\w./-])crossfusion_(\w+)(?![\w/])([^|;&#\n]*)')
    for f, text in prose().items():
        for block in [b for kind, b in fence.findall(text) if kind in ('sh', 'bash')]: yield from ((f, n, rest.split()) for n, rest in call.findall(block.replace('\\\n', ' ')))
        for code in re.findall(r'`([^`\n]+)`', fence.sub('', text)): yield from ((f, n, rest.split()) for n, rest in call.findall(code) if n in commands or '--' in rest)
    for f, cells in check.notebooks().items():
        for source in text_of(cells, 'code'):
            if re.match('%%(bash|sh)', source): yield from ((f, n, rest.split()) for n, rest in call.findall(source.replace('\\\n', ' ')) if n in commands or '--' in rest)


def test_commands_and_options_exist():
    from crossfusion import cli
    options = {n: {f'--{o}' for o in signature(getattr(cli, n)).parameters} | {'--config', '--help', '--version'} for n in commands}
    shown, wrong = set(), []
    for f, name, words in said():
        if name in options: shown.add(name)
        given = {w.split('=')[0] for w in words if w.startswith('--')}
        wrong += [f'{f}: crossfusion_{name} {o}' for o in given - options.get(name, set())] + ([f'{f}: crossfusion_{name}'] if name not in options else [])
    assert not wrong, '\n'.join(wrong)
    assert shown == set(options), f'no document shows {set(options) - shown}'


def test_tutorials_run_their_commands():
    "In tutorials a command of ours stands in a cell that is run, not in a fence"
    inside = [f'{f}: {line}' for f, text in prose().items() if f.parts[1:2] == ('tutorials',) for _, b in fence.findall(text) for line in b.splitlines() if 'crossfusion_' in line]
    assert not inside, '\n'.join(inside)


def test_examples_in_help():
    from crossfusion import cli
    from crossfusion.shell import _parsed, _parser
    for name in commands:
        f = getattr(cli, name)
        assert f.example, name
        _parsed(_parser(f, f'crossfusion_{name}', ''), shlex.split(f.example))


SMALL = {'extract': '--patch_px 128 --input_px 128 --n_workers 2', 'train': '--embed_dim 16 --n_epoch 1', 'folds': '--n_folds 3', 'simulate': '--n 12',
         'benchmark': '--small --n_epoch 1 --models crossfusion,amil'}


def test_readme_commands(shell, tmp_path):
    "Every line of README's shell, in its order, on painted slides; options that make it small come last and win"
    from crossfusion.simulate.slides import simulate_slides
    simulate_slides(tmp_path/'slides', n_patients=12, n_second=1, size=(1024, 1024), n_workers=2)
    (tmp_path/'slides'/'cohort.csv').rename(tmp_path/'cohort.csv')
    first = sorted((tmp_path/'slides').glob('*.tiff'))[0]
    (tmp_path/'new_slides').mkdir()
    shutil.copy(first, tmp_path/'new_slides'/'one.tiff')
    readme = (root/'README.md').read_text()
    lines = [o.split(' #')[0].strip() for b in re.findall(r'^```sh\n(.*?)^```', readme, re.M | re.S) for o in b.splitlines() if o.startswith('crossfusion_')]
    assert {o.split()[0].split('_', 1)[1] for o in lines} == commands - {'demo'}
    for line in lines:
        name, *args = shlex.split(line)
        args = [o.replace('slides/one.svs', f'slides/{first.name}') for o in args]
        r = shell.run(shell.command(name, *args, *shlex.split(SMALL.get(name.split('_', 1)[1], ''))), cwd=tmp_path)
        assert r.returncode == 0, f'{line}\n{r.stderr[-2000:]}'
    made = 'bags/run.toml folds/splits_0.csv run/run.toml run_amil/metrics.json run_pub/metrics.json run/report.html run/explorer.ipynb table/comparison.md new.csv sim/cohort.csv'
    for f in [*made.split(), f'run/figures/{first.stem}_attention.png']: assert (tmp_path/f).stat().st_size, f
    assert list((tmp_path/'one_maps').glob('*.geojson')) and len((tmp_path/'new.csv').read_text().splitlines()) == 2


def test_make_lines_of_readme_exist():
    targets = re.findall(r'^([a-z-]+):.*##', (root/'Makefile').read_text(), re.M)
    named = re.findall(r'(?:^|`)make ([a-z-]+)', '\n'.join(prose()[f] for f in (Path('README.md'), Path('CONTRIBUTING.md'))), re.M)
    assert {'demo', 'test', 'setup'} <= set(named) <= set(targets)
    plan = subprocess.run(['make', '-n', '--no-print-directory', 'demo'], cwd=root, capture_output=True, text=True).stdout
    assert plan.splitlines()[-1].split()[0].endswith('bin/crossfusion_demo')   # which every test run runs, with --quick


def test_the_site_prepares(tmp_path):
    "nbdev's step before Quarto, which runs exported cells and every cell with an import, in a copy"
    tree = check.copy_tree(tmp_path/'main')
    env = {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs\nif __name__ == "__main__": proc_nbs(n_workers=1)'], cwd=tree, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert {f.relative_to('nbs') for f in check.notebooks()} == {p.relative_to(tree/'_proc') for p in (tree/'_proc').rglob('*.ipynb')}
