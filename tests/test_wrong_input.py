"Every command, given what it cannot use: one line on stderr that names it, status 2, nothing left behind"
import os, sys

import pytest
from crossfusion import cli
from crossfusion.simulate.bags import simulate_cohort, write_cohort
from test_documents import commands

RUN = {'demo': '--out blocked/demo', 'simulate': 'new --n 6', 'extract': 'slides new', 'bags': 'bags', 'folds': 'cohort.csv new', 'train': 'cohort.csv bags new',
       'benchmark': 'cohort.csv bags new --models amil', 'evaluate': 'run', 'predict': 'run bags', 'heatmap': 'run slides/a.tiff bags', 'explorer': 'run slides bags', 'report': 'run'}
MISSING = {'demo': '--out blocked/demo', 'simulate': 'new --followup none.csv', 'extract': 'none new', 'bags': 'none', 'folds': 'none.csv new', 'train': 'none.csv bags new',
           'benchmark': 'cohort.csv none new', 'evaluate': 'none', 'predict': 'none bags', 'heatmap': 'run none.tiff bags', 'explorer': 'none slides bags', 'report': 'none'}
EMPTY = {'extract': 'empty new', 'bags': 'empty', 'train': 'cohort.csv empty new', 'benchmark': 'cohort.csv empty new', 'evaluate': 'empty', 'predict': 'empty bags',
         'heatmap': 'empty slides/a.tiff bags', 'explorer': 'empty slides bags', 'report': 'empty'}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A cohort, folders with nothing in them, and a file where a folder is wanted"
    d = tmp_path_factory.mktemp('wrong')
    table, bags = simulate_cohort(6, '20x')
    write_cohort(d/'bags', table, bags)
    (d/'bags/cohort.csv').rename(d/'cohort.csv')
    for name in ('empty', 'run', 'slides'): (d/name).mkdir()
    (d/'slides/a.tiff').write_bytes(b'II*\0 not a slide')
    (d/'blocked').write_text('a file, no folder')
    return d


def at_shell(name, line, place, monkeypatch, capsys):
    "Exit status and stderr of a command as its console script would run it, and what it left in the folder"
    before = sorted(p.relative_to(place) for p in place.rglob('*'))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, 'argv', [f'/bin/crossfusion_{name}', *line.split()])
    with pytest.raises(SystemExit) as stop: getattr(cli, name)()
    said = capsys.readouterr()
    left = [str(p) for p in sorted(p.relative_to(place) for p in place.rglob('*')) if p not in before]
    return stop.value.code, said.err, left


def check_line(name, line, *where):
    status, err, left = at_shell(name, line, *where)
    lines = [o for o in err.splitlines() if o.startswith(f'crossfusion_{name}: ')]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, err
    assert err.splitlines()[-1] == lines[0] and len(lines[0]) < 400, err
    assert not left, left
    return lines[0]


@pytest.mark.parametrize('name', sorted(commands))
def test_missing(name, place, monkeypatch, capsys):
    line = check_line(name, MISSING[name], place, monkeypatch, capsys)
    assert any(o in line for o in ('none', 'blocked', 'run')), line


@pytest.mark.parametrize('name', sorted(commands))
def test_an_option_that_does_not_exist(name, place, monkeypatch, capsys):
    assert 'Did you mean --help?' in check_line(name, f'{RUN[name]} --hlep', place, monkeypatch, capsys)


@pytest.mark.parametrize('name', sorted(commands))
def test_a_settings_file_of_something_else(name, place, monkeypatch, capsys):
    assert 'cohort.csv: expected TOML' in check_line(name, '--config cohort.csv', place, monkeypatch, capsys)


@pytest.mark.parametrize('name', sorted(EMPTY))
def test_an_empty_folder(name, place, monkeypatch, capsys):
    line = check_line(name, EMPTY[name], place, monkeypatch, capsys)
    assert any(o in line for o in ('empty', 'run', 'a.tiff')), line


@pytest.mark.parametrize('name', ['demo', 'simulate', 'extract', 'folds', 'train', 'benchmark'])
def test_a_file_where_the_folder_should_be(name, place, monkeypatch, capsys):
    assert 'blocked' in check_line(name, RUN[name].replace('new', 'blocked'), place, monkeypatch, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
@pytest.mark.parametrize('name', ['extract', 'bags', 'train', 'benchmark'])
def test_a_folder_that_may_not_be_read(name, place, monkeypatch, capsys):
    (place/'empty').chmod(0)
    try: assert 'empty' in check_line(name, EMPTY[name], place, monkeypatch, capsys)
    finally: (place/'empty').chmod(0o700)


def test_ours_is_status_1(place, monkeypatch, capsys):
    monkeypatch.setattr('crossfusion.simulate.bags.simulate_cohort', lambda *a, **k: 1/0)
    monkeypatch.setattr(sys, 'argv', ['crossfusion_simulate', str(place/'new')])
    with pytest.raises(ZeroDivisionError): cli.simulate()     # Python prints it, and ends with 1
    assert 'something that we should mend' in capsys.readouterr().err and not (place/'new').exists()
