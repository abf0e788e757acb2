"Features of other tools, their tables, and what is wrong with them, at the shell"
import json, pickle, re, shutil
from pathlib import Path

import h5py, numpy as np, pandas as pd, pytest, torch
from crossfusion.data.bags import open_bags
from crossfusion.data.cohort import read_cohort
from crossfusion.simulate.bags import simulate_cohort, write_cohort
from test_faults import said

data = Path(__file__).resolve().parent.parent.parent/'shared'/'data'
needs_tcga = pytest.mark.skipif(not (data/'tcga').exists(), reason='no data in ../shared/data/tcga')
TRAIN = ['--model', 'amil_all', '--embed_dim', 16, '--n_epoch', 2, '--n_folds', 3]


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    "30 patients, 32 slides in our own files"
    folder = tmp_path_factory.mktemp('ours')
    table, bags = simulate_cohort(30, '20x', n_second=2, seed=4)
    write_cohort(folder, table, bags)
    return folder, table, bags


def as_published(folder, bags):
    "The published program's layout: a .pt file for each slide and magnification, and CLAM's coordinates"
    for s, b in bags.items():
        for m in b.mags:
            for k in ('pt_files', 'patches'): (folder/'simulated'/f'x{m}'/k).mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(b.features[m]).float(), folder/'simulated'/f'x{m}'/'pt_files'/f'{s}.pt')
            with h5py.File(folder/'simulated'/f'x{m}'/'patches'/f'{s}.h5', 'w') as h:
                h['coords'] = b.coords[m].astype(np.int64)
                h['coords'].attrs.update(patch_size=int(b.sizes[m]), downsample=(1., 1.), level_dim=(b.width, b.height), name=s)


def as_trident(folder, bags):
    "TRIDENT's: float32, chunks of one row, columns before rows"
    for s, b in bags.items():
        for m in b.mags:
            where = folder/f'{m}x_256px_0px_overlap'/'features_simulated'
            where.mkdir(parents=True, exist_ok=True)
            order = np.lexsort((b.coords[m][:, 1], b.coords[m][:, 0]))
            with h5py.File(where/f'{s}.h5', 'w') as h:
                h.create_dataset('features', data=b.features[m][order].astype(np.float32), chunks=(1, b.n_features)).attrs.update(name=s, encoder='simulated')
                h.create_dataset('coords', data=b.coords[m][order].astype(np.int64))
                h['coords'].attrs.update(patch_size=256, patch_size_level0=int(b.sizes[m]), level0_width=b.width, level0_height=b.height, name=s)


def test_the_same_training_whoever_made_the_files(shell, ours, tmp_path):
    "Ours, the published program's and TRIDENT's files of the same features give the same predictions, byte for byte"
    folder, _, bags = ours
    as_published(tmp_path/'published', bags); as_trident(tmp_path/'trident', bags)
    for name, where in (('ours', folder), ('published', tmp_path/'published'), ('trident', tmp_path/'trident')):
        r = shell.run(shell.command('crossfusion_train', folder/'cohort.csv', where, tmp_path/f'run_{name}', *TRAIN))
        assert r.returncode == 0, r.stderr
    first = (tmp_path/'run_ours'/'predictions.csv').read_bytes()
    assert all((tmp_path/f'run_{n}'/'predictions.csv').read_bytes() == first for n in ('published', 'trident'))
    assert len(pd.read_csv(tmp_path/'run_ours'/'predictions.csv')) == 30


def test_a_magnification_from_the_shell(ours, tmp_path):
    "The shell gives 20.0: a fold trains on CLAM's folder, with the predictions that our own files give"
    from crossfusion.data.cohort import make_folds
    from crossfusion.training.crossval import cross_validate
    from crossfusion.training.learner import recipe_named
    folder, table, bags = ours
    as_published(tmp_path, bags)
    how = dict(model='amil', folds=make_folds(table, 2), recipe=recipe_named(n_epoch=1), embed_dim=16)
    for name, where, mag in (('ours', folder, None), ('clam', tmp_path/'simulated'/'x20'/'pt_files', 20.), ('x20', tmp_path/'simulated'/'x20', None)):
        cross_validate(table, open_bags(where, mags=(20,), mag=mag), tmp_path/name, **how)
    first, *others = ((tmp_path/n/'predictions.csv').read_bytes() for n in ('ours', 'clam', 'x20'))
    assert others == [first]*2


def test_slides_without_places_are_no_fault(shell, ours, tmp_path):
    "Plain .pt files, as SurvPath keeps them: the magnification is asked for in a line; then all can be used, none has places"
    _, _, bags = ours
    for s, b in list(bags.items())[:3]: torch.save(torch.from_numpy(b.features[20]).float(), tmp_path/f'{s}.pt')
    r = shell.run(shell.command('crossfusion_bags', tmp_path))
    assert r.returncode == 2 and said(r.stderr).endswith('expected a magnification (these files do not hold it), found none. Name it: mag=20, at the shell --mag 20.')
    r = shell.run(shell.command('crossfusion_bags', tmp_path, '--mag', 20, '--read', '--json'))
    assert r.returncode == 0, r.stderr
    found = json.loads(r.stdout)
    assert found['problems'] == {} and found['summary']['slides'] == {'20x': 3} and found['summary']['with places'] == {'20x': 0}


def poison(path):
    with h5py.File(path, 'r+') as h: h['x10/features'][3, 2] = np.inf


class Boom:
    def __reduce__(self): return Path('code-has-run').touch, ()


def test_every_fault_is_named(shell, ours, tmp_path):
    "A cut file, a poisoned one, another slide's: listed by name with status 2; training goes on without the first, stops at the second"
    folder, table, _ = ours
    shutil.copytree(folder, tmp_path/'bags')
    cut, poisoned, other = (tmp_path/'bags'/f'P000{i}-1.h5' for i in (3, 4, 5))
    cut.write_bytes(cut.read_bytes()[:5000]); poison(poisoned); shutil.copy(tmp_path/'bags'/'P0009-1.h5', other)
    r = shell.run(shell.command('crossfusion_bags', tmp_path/'bags', '--read'))
    assert r.returncode == 2 and '3 of 32 slides cannot be used' in said(r.stderr)
    for line in ('P0003-1: not whole', 'P0004-1: with NaN or infinity at 10x', 'P0005-1: holding the slide P0009-1'): assert line in r.stdout
    r = shell.run(shell.command('crossfusion_train', folder/'cohort.csv', tmp_path/'bags', tmp_path/'run', *TRAIN))
    assert r.returncode == 2 and 'P0004-1 10x: expected finite features, found 1 that are NaN' in said(r.stderr)
    shutil.copy(folder/poisoned.name, poisoned)
    r = shell.run(shell.command('crossfusion_train', folder/'cohort.csv', tmp_path/'bags', tmp_path/'run2', *TRAIN))
    assert r.returncode == 0 and '28 of 30 patients scored' in r.stdout
    missing = pd.read_csv(tmp_path/'run2'/'missing.csv').set_index('slide').reason
    assert missing['P0003-1'].startswith('not whole') and missing['P0005-1'] == 'holding the slide P0009-1'


def test_code_in_a_pickle_does_not_run(shell, ours, tmp_path, monkeypatch):
    folder, _, bags = ours
    as_published(tmp_path/'pt', {s: bags[s] for s in list(bags)[:4]})
    bad = tmp_path/'pt'/'simulated'/'x20'/'pt_files'/'P0001-1.pt'
    torch.save(Boom(), bad)
    for content in (bad.read_bytes(), pickle.dumps(Boom())):
        bad.write_bytes(content)
        r = shell.run(shell.command('crossfusion_bags', tmp_path/'pt'), cwd=tmp_path)
        assert r.returncode == 2 and re.search(r'P0001-1: 20x (holding code|not whole)', r.stdout), r.stdout
        assert not (tmp_path/'code-has-run').exists()


def test_two_encoders(shell, ours, tmp_path):
    _, _, bags = ours
    as_published(tmp_path, {s: bags[s] for s in list(bags)[:3]})
    shutil.copytree(tmp_path/'simulated', tmp_path/'other')
    r = shell.run(shell.command('crossfusion_bags', tmp_path))
    assert r.returncode == 2 and "expected features of one encoder, found other, simulated. Name one: encoder='other'" in said(r.stderr)
    assert shell.run(shell.command('crossfusion_bags', tmp_path, '--encoder', 'other')).returncode == 0
    for m in (5, 10, 20): torch.save(torch.zeros(4, 7), tmp_path/'other'/f'x{m}'/'pt_files'/f'{list(bags)[1]}.pt')
    r = shell.run(shell.command('crossfusion_bags', tmp_path, '--encoder', 'other'))
    assert r.returncode == 2 and 'expected bags of one kind, found n_features' in said(r.stderr)


def test_tables_of_others(shell, ours, tmp_path):
    "STAMP's two tables, in days, one in Excel; a patient without follow-up and one without a slide are missing, not lost"
    folder, table, _ = ours
    p = table.drop_duplicates('patient')
    clini = pd.DataFrame(dict(PATIENT=p.patient, days=p.duration*365.25/12, dead=p.event.map({True: 'Dead', False: 'Alive'})))
    clini.loc[clini.PATIENT == 'P0007', 'days'] = np.nan
    clini = pd.concat([clini, pd.DataFrame(dict(PATIENT=['X1'], days=[100.], dead=['Alive']))])
    clini.to_excel(tmp_path/'clini.xlsx', index=False)
    table.rename(columns=dict(patient='PATIENT', slide='FILENAME'))[['PATIENT', 'FILENAME']].to_csv(tmp_path/'slides.csv', index=False)
    r = shell.run(shell.command('crossfusion_train', tmp_path/'clini.xlsx', folder, tmp_path/'run', *TRAIN, '--slides', tmp_path/'slides.csv', '--duration', 'days', '--event', 'dead'))
    assert r.returncode == 0 and '29 of 31 patients scored' in r.stdout, r.stderr
    deaths = int(p.event[p.patient != 'P0007'].sum())
    for line in (f'clini.xlsx: 31 patients, {deaths} deaths, median follow-up ', '1 patients without a duration or an event are listed as missing (P0007)',
                 'slides of the table are used; no follow-up in the table: '): assert line in r.stderr
    missing = pd.read_csv(tmp_path/'run'/'missing.csv').set_index('patient').reason.to_dict()
    assert missing == {'P0007': 'no follow-up in the table', 'X1': 'no slide in the table'}
    assert shell.run(shell.command('crossfusion_report', tmp_path/'run')).returncode == 0


@pytest.mark.parametrize('text,why', [
    ('patient,slide,duration,event\nA,a,3,perhaps\n', 'row 2, event: expected 0, 1, True, False, Alive or Dead, found perhaps'),
    ('patient,slide,duration,event\nA,a,3,1\nA,b,4,1\n', r'patient A: expected one duration and event, found rows that contradict each other \(2, 3\)'),
    ('patient;slide;duration;event\nA;a;3,5;1\n', 'row 2, patient A: expected a duration of 0 or more, found 3,5. Write a decimal point, not a comma'),
    ('patient,slide,duration,event\nA,a,-3,1\n', 'row 2, patient A: expected a duration of 0 or more, found -3'),
    ('patient,slide,months,event\nA,a,3,1\n', 'expected a column duration'),
    ('', 'expected a table')])
def test_bad_tables(shell, tmp_path, text, why):
    (tmp_path/'t.csv').write_text(text)
    r = shell.run(shell.command('crossfusion_folds', tmp_path/'t.csv', tmp_path/'folds'))
    assert r.returncode == 2 and re.search(why, said(r.stderr)), r.stderr


@needs_tcga
def test_folds_of_tcga(shell, tmp_path):
    "Folds by patient and by hospital at the shell; written, read back, and no hospital on both sides"
    for flag, shared in (((), True), (('--by_site',), False)):
        r = shell.run(shell.command('crossfusion_folds', data/'tcga'/'tcga_coad_all_clean.csv', tmp_path/f'folds{len(flag)}', *flag))
        assert r.returncode == 0 and '416 patients were recovered from 424 TCGA barcodes' in r.stderr, r.stderr
        rows = [line.split() for line in r.stdout.splitlines()[2:]]
        assert len(rows) == 5 and sum(int(x[2]) for x in rows) == 416 and any(int(x[5]) for x in rows) == shared
    assert len(list((tmp_path/'folds0').glob('splits_*.csv'))) == 5


def test_split_file_of_strangers(shell, ours, tmp_path):
    folder, table, _ = ours
    (tmp_path/'splits_0.csv').write_text(',train,val\n0,P0000,Q1\n1,Q2,Q3\n')
    r = shell.run(shell.command('crossfusion_train', folder/'cohort.csv', folder, tmp_path/'run', *TRAIN, '--splits', tmp_path))
    assert r.returncode == 2 and 'found 3 of 4 that it does not have (Q1, Q2, Q3)' in said(r.stderr)


@pytest.mark.skipif(not (data/'features').exists(), reason='no data in ../shared/data/features')
def test_the_real_slide_in_every_layout(shell):
    for name, options, patches in (('clam', (), {'5x': 5, '10x': 16, '20x': 50}), ('trident', (), {'5x': 2, '10x': 10, '20x': 39}),
                                   ('stamp', ('--mpp', .499), {'20x': 39}), ('slideflow', ('--mag', 20), {'20x': 39})):
        r = shell.run(shell.command('crossfusion_bags', data/'features'/name, '--read', *options))
        assert r.returncode == 0, r.stderr
        rows = {x[0]: int(x[2]) for x in (line.split() for line in r.stdout.splitlines()[3:])}
        assert rows == patches and f'layout {name}' in r.stdout


def test_memory_does_not_grow(ours):
    "Ten epochs over mapped bags leave no file open and nothing mapped behind"
    import psutil
    from crossfusion.data.loaders import patient_loader
    folder, table, _ = ours
    cuts, p = [0, 10, 20, 40, np.inf], table.patient.unique()
    bags, me = open_bags(folder), psutil.Process()
    def epoch(): return [x[0][0][20].float().sum().item() for x in patient_loader(table, bags, p, cuts)]
    first, open_files, maps = epoch(), len(me.open_files()), len(me.memory_maps(grouped=False))
    for _ in range(10): assert epoch() == first
    assert len(me.open_files()) <= open_files and len(me.memory_maps(grouped=False)) <= maps + 5


def test_arrays_of_either_numpy(tmp_path):
    "TRIDENT saves numpy arrays; numpy 1 and 2 call their maker by different names, and both are on the list"
    import zipfile
    from crossfusion.data.layouts import _load_pt
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    torch.save(x, tmp_path/'a.pt')
    for name in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        with zipfile.ZipFile(tmp_path/'a.pt') as z, zipfile.ZipFile(tmp_path/'b.pt', 'w') as out:
            for f in z.namelist(): out.writestr(f, z.read(f).replace(b'numpy._core.multiarray', name).replace(b'numpy.core.multiarray', name))
        assert np.array_equal(_load_pt(tmp_path/'b.pt').numpy(), x)


def test_benchmark(shell, ours, tmp_path):
    "Two models at the shell: table, Markdown and figure; stopped and run again, nothing is trained twice; a model that cannot be trained is told"
    folder, *_ = ours
    command = shell.command('crossfusion_benchmark', folder/'cohort.csv', folder, tmp_path, '--models', 'amil,dsmil', '--reference', 'amil', '--small', '--n_epoch', 2, '--n_folds', 2)
    assert (r := shell.run(command)).returncode == 0, r.stderr
    assert r.stdout.startswith('| model |') and len(r.stdout.strip().splitlines()) == 4
    t, stamps = pd.read_csv(tmp_path/'comparison.csv'), {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    assert set(t.model) == {'amil', 'dsmil'} and t.p.notna().sum() == 1 and (t.seconds > 0).all() and len(stamps) == 4
    assert (tmp_path/'comparison.md').read_text() == r.stdout.rstrip('\n') + '\n' and (tmp_path/'comparison.png').stat().st_size > 5000
    assert shell.run(command).returncode == 0 and {p: p.stat().st_mtime_ns for p in stamps} == stamps
    r = shell.run(shell.command('crossfusion_benchmark', folder/'cohort.csv', folder, tmp_path, '--models', 'amil,resnet'))
    assert r.returncode == 2 and "found 'resnet'" in said(r.stderr)
