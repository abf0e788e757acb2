"Training that is killed, resumed, or has nothing to learn from"
import multiprocessing, os, random, shutil, signal, time

import numpy as np
import pandas as pd
import pytest
import torch
from crossfusion.core import CrossFusionError, RunFolder
from crossfusion.data.cohort import make_folds
from crossfusion.simulate.bags import simulate_cohort, write_cohort
from crossfusion.training.crossval import cross_validate
from crossfusion.training.learner import recipe_named
from test_faults import in_namespace, may_mount, said

# Children come from a clean process: a fork of one whose OpenMP threads have run can wait for them forever
children = multiprocessing.get_context('forkserver')
children.set_forkserver_preload(['crossfusion.training.crossval', 'sklearn.model_selection'])      # what a run imports later, too
OPTIONS = dict(model='amil', embed_dim=16, recipe=recipe_named(n_epoch=6, average=.9))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "40 patients on disk: the folder, table and bags"
    folder = tmp_path_factory.mktemp('cohort')
    table, bags = simulate_cohort(40, '20x', seed=3)
    write_cohort(folder, table, bags)
    return folder, table, bags


@pytest.fixture(scope='module')
def undisturbed(cohort, tmp_path_factory):
    "A run that was never stopped, and the seconds it took"
    out, start = tmp_path_factory.mktemp('undisturbed')/'run', time.time()
    cross_validate(*cohort[1:], out, **OPTIONS)
    return out, time.time() - start


def same(run, other, names=('predictions.csv', *(f'fold_{k}/{f}' for k in range(5) for f in ('predictions.csv', 'history.csv', 'model.safetensors')))):
    for name in names: assert (run/name).read_bytes() == (other/name).read_bytes(), name
    assert {p.name for p in run.rglob('*')} == {p.name for p in other.rglob('*')}       # no checkpoint, no half-written file


def train(started, *args):
    "What the child does: it has started, now it trains"
    started.set()
    cross_validate(*args, **OPTIONS)


def test_killed_at_ten_moments(cohort, undisturbed, tmp_path):
    "SIGKILL, again and again, at moments that nobody chose; then to the end: the bytes of a run that was never killed"
    whole, seconds = undisturbed
    kills = []
    while len(kills) < 10:
        started, delay = children.Event(), random.SystemRandom().uniform(0, seconds/2)
        p = children.Process(target=train, args=(started, *cohort[1:], tmp_path/'run'))
        p.start(); started.wait(60); time.sleep(delay); p.kill(); p.join()
        if p.exitcode == 0: shutil.rmtree(tmp_path/'run')                               # it was done before its time came: start anew
        else: kills.append((round(delay, 2), p.exitcode, [f.parent.name for f in (tmp_path/'run').glob('*/checkpoint.pt')]))
    print(kills)
    assert all(status == -signal.SIGKILL for _, status, _ in kills) and any(checkpoint for *_, checkpoint in kills), kills
    cross_validate(*cohort[1:], tmp_path/'run', **OPTIONS)
    same(tmp_path/'run', whole)


def test_same_seed_same_bytes(cohort, undisturbed, tmp_path):
    "From scratch, and with two processes"
    cross_validate(*cohort[1:], tmp_path/'again', **OPTIONS, n_workers=2)
    same(tmp_path/'again', undisturbed[0])
    cross_validate(*cohort[1:], tmp_path/'other', **OPTIONS, n_workers=2, seed=1)
    assert (tmp_path/'other'/'predictions.csv').read_bytes() != (undisturbed[0]/'predictions.csv').read_bytes()


def test_full_disk_at_a_checkpoint(shell, cohort, tmp_path, may_mount):
    "There is room for one checkpoint, not for the next beside it: the first is kept, and training later goes on from it"
    folder, table, bags = cohort
    command = lambda out: shell.command('crossfusion_train', folder/'cohort.csv', folder, out, '--model', 'amil', '--embed_dim', 64, '--n_epoch', 3)
    options = dict(model='amil', embed_dim=64, recipe=recipe_named(n_epoch=3))
    p = children.Process(target=cross_validate, args=(table, bags, tmp_path/'measure'), kwargs=options)
    p.start()
    while not list((tmp_path/'measure').glob('*/checkpoint.pt')): assert p.is_alive(); time.sleep(.005)
    p.kill(); p.join()
    checkpoint = max(f.stat().st_size for f in (tmp_path/'measure').glob('*/checkpoint.pt'))
    others = sum(-(-f.stat().st_size//4096)*4 for f in (tmp_path/'measure').iterdir() if f.is_file())
    disk, kept = tmp_path/'disk', tmp_path/'kept'
    disk.mkdir()
    script = f'''mount -t tmpfs -o size={others + int(1.5*checkpoint/1024) + 24}k tmpfs "$0" || exit 99
        "$@"; status=$?; cp -a "$0" {kept}; exit $status'''
    r = shell.run([*in_namespace, script, str(disk), *command(disk/'run')])
    assert r.returncode == 2, r.stderr
    assert 'No space left on device' in said(r.stderr)
    good, = kept.glob('run/*/checkpoint.pt')
    assert torch.load(good, weights_only=True)['epoch'] == 0 and not list(kept.rglob('.*.part'))
    for out in (kept/'run', tmp_path/'whole'): assert (r := shell.run(command(out))).returncode == 0, r.stderr
    same(kept/'run', tmp_path/'whole')


def test_checkpoint_that_is_not_whole(cohort, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path/'run')
    (tmp_path/'run'/'fold_2'/'predictions.csv').unlink()
    (tmp_path/'run'/'fold_2'/'checkpoint.pt').write_bytes(b'PK half of it')
    with pytest.raises(CrossFusionError, match='fold_2/checkpoint.pt: expected a checkpoint.*Remove it'): cross_validate(*cohort[1:], tmp_path/'run', **OPTIONS)
    (tmp_path/'run'/'fold_2'/'checkpoint.pt').unlink()
    cross_validate(*cohort[1:], tmp_path/'run', **OPTIONS)
    same(tmp_path/'run', undisturbed[0])


# Nothing to learn from

def one_line(error):
    assert '\n' not in str(error.value), error.value
    return str(error.value)


def test_all_durations_equal(cohort, tmp_path):
    with pytest.raises(CrossFusionError) as error: cross_validate(cohort[1].assign(duration=12.), cohort[2], tmp_path/'run', **OPTIONS)
    assert 'fold 0' in one_line(error) and 'deaths at 4 different times' in str(error.value)


def test_one_patient(cohort, tmp_path):
    with pytest.raises(CrossFusionError) as error: cross_validate(cohort[1][:1], cohort[2], tmp_path/'run', **OPTIONS)
    assert 'patients: expected at least 5' in one_line(error)


def test_nobody_died(cohort, tmp_path):
    with pytest.raises(CrossFusionError) as error: cross_validate(cohort[1].assign(event=False), cohort[2], tmp_path/'run', **OPTIONS)
    assert 'found 0 deaths' in one_line(error)


def test_a_fold_without_deaths(cohort, tmp_path):
    "Its patients are scored; the folds that can be judged are"
    table = cohort[1].copy()
    alive, rest = table.patient[~table.event].tolist(), table.patient[table.event].tolist()
    folds = [dict(train=rest + alive[4:], test=alive[:4]), dict(train=alive + rest[8:], test=rest[:8])]
    m = cross_validate(table, cohort[2], tmp_path/'run', folds=folds, **OPTIONS)
    assert m['folds_without_pairs'] == [0] and np.isfinite(m['c_index']['value']) and m['n_scored'] == 12
    with pytest.raises(CrossFusionError) as error:                                       # nobody among them can choose an epoch by C-index
        cross_validate(table, cohort[2], tmp_path/'published', folds=folds, protocol='published', model='amil', embed_dim=16, recipe=recipe_named('published', n_epoch=2))
    assert 'fold 0: training: expected validation patients of whom one died before another' in one_line(error)


def test_poisoned_slide(cohort, tmp_path):
    "Not a number in the features: the slide is named, and nothing of the fold is left that looks whole"
    from dataclasses import replace
    slide = cohort[1].slide[7]
    bag = cohort[2][slide]
    f = bag.features[20].copy(); f[0, 0] = np.nan
    with pytest.raises(CrossFusionError) as error: cross_validate(cohort[1], cohort[2] | {slide: replace(bag, features=bag.features | {20: f})}, tmp_path/'run', **OPTIONS)
    assert slide in one_line(error)
    assert not list((tmp_path/'run').rglob('predictions.csv')) and not list((tmp_path/'run').rglob('*.part'))


def test_repeats_are_an_ensemble(cohort, tmp_path):
    "Two repeats: every patient is scored twice, by two models that have not seen them"
    folds = [f for r in range(2) for f in make_folds(cohort[1], 3, seed=r)]
    m = cross_validate(*cohort[1:], tmp_path/'run', folds=folds, model='amil', embed_dim=16, recipe=recipe_named(n_epoch=1))
    t = pd.read_csv(RunFolder(tmp_path/'run')/'predictions.csv')
    assert (t.patient.value_counts() == 2).all() and m['n_scored'] == m['n_expected'] == 40 and m['c_index']['n'] == 40
    from crossfusion.training.crossval import predict
    assert predict(tmp_path/'run', cohort[2], [cohort[1].slide[0]]).folds.tolist() == [2]
