"Several processes that train one model together, as several GPUs would; here on the CPU"
import subprocess, sys, time

import numpy as np
import pandas as pd
import psutil
import pytest

SCRIPT = '''import os, sys, torch
from pathlib import Path
from crossfusion.core import shell_errors
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.training.crossval import cross_validate
from crossfusion.training.learner import recipe_named
Path(sys.argv[1] + '.process' + os.environ.get('RANK', '')).touch()
table, bags = simulate_cohort(40, '20x', seed=3)
torch.nn.Dropout.forward = lambda self, x: x        # chance that processes do not share
protocol, n_epoch, gather, average = sys.argv[2], *map(eval, sys.argv[3:6])
with shell_errors(): cross_validate(table, bags, sys.argv[1], 'amil', protocol=protocol, embed_dim=16, n_workers=eval(sys.argv[6]),
                                    recipe=recipe_named(n_epoch=n_epoch, gather=gather, average=average, clip=0., lr=1e-2, schedule='constant'))
'''


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script')/'train.py'
    path.write_text(SCRIPT)
    return path


def launch(*args):
    "Two processes; with GPUs, `accelerate launch` does the same"
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *map(str, args)]


def test_one_step_is_the_same(shell, script, tmp_path):
    "An epoch of one step, over all 32 patients: each process has half of them, and the step is that of one process"
    args = ('fixed', 1, 32, 0., 1)
    for run, r in (('two', shell.run(launch(script, tmp_path/'two', *args))), ('one', shell.run([sys.executable, str(script), str(tmp_path/'one'), *map(str, args)]))):
        assert r.returncode == 0, r.stderr
    assert {p.name for p in tmp_path.glob('*.process*')} == {'two.process0', 'two.process1', 'one.process'}
    one, two = (pd.read_csv(tmp_path/o/'predictions.csv') for o in ('one', 'two'))
    assert (one.patient == two.patient).all() and one.risk.std() > 1e-4
    np.testing.assert_allclose(two.risk, one.risk, atol=2e-6)


def test_resumed_together(shell, script, tmp_path):
    "Killed in the middle and launched again: the bytes of an undisturbed training; the first process alone writes"
    args = ('nested', 4, 4, .9, 1)
    assert (r := shell.run(launch(script, tmp_path/'whole', *args))).returncode == 0, r.stderr
    p = shell.start(launch(script, tmp_path/'run', *args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while not list((tmp_path/'run').glob('fold_2/checkpoint.pt')): assert p.poll() is None and time.time() < end; time.sleep(.01)
    everyone = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]           # the processes are in sessions of their own
    for o in everyone: o.kill()
    p.wait(); psutil.wait_procs(everyone)
    assert len(everyone) >= 3
    assert (r := shell.run(launch(script, tmp_path/'run', *args))).returncode == 0, r.stderr
    names = {p.relative_to(tmp_path/'whole') for p in (tmp_path/'whole').rglob('*')}
    assert names == {p.relative_to(tmp_path/'run') for p in (tmp_path/'run').rglob('*')}
    for name in ('predictions.csv', 'fold_4/model.safetensors', 'fold_2/history.csv'): assert (tmp_path/'run'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes(), name


def test_not_both(shell, script, tmp_path):
    r = shell.run(launch(script, tmp_path/'run', 'nested', 1, 4, 0., 2))
    assert r.returncode != 0 and 'several processes for a fold, or several folds side by side' in r.stderr
