"A real Ray on this machine: two nodes and more, of one core each. Same bytes; lost machines lose nothing; clear words"
import os, re, secrets, signal, socket, subprocess, sys, tempfile, threading, time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock

# Ray reads this when it is imported: our clusters take work from nobody else
os.environ |= dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32))

from crossfusion import cluster
from crossfusion.cluster import connected, on_ray, workers
from crossfusion.core import CrossFusionError
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.training.crossval import cross_validate
from crossfusion.training.learner import recipe_named
from crossfusion.wsi.extract import extract
from test_extract import bag_bytes, small, write_slide

node = dict(num_cpus=1, object_store_memory=80*2**20) # a small one: shared memory may be scarce
soon = dict(health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_timeout_ms=3000, health_check_failure_threshold=2)


@pytest.fixture(scope='module', autouse=True)
def one_ray_at_a_time(tmp_path_factory):
    "Tests run side by side; these wait for one another"
    shared = tmp_path_factory.getbasetemp()
    with FileLock((shared.parent if 'PYTEST_XDIST_WORKER' in os.environ else shared)/'ray.lock'): yield


@pytest.fixture(scope='module')
def ray_cluster(one_ray_at_a_time):
    "Two nodes, one of them with a GPU that is none; join it by `.address`. Nodes that a test adds it removes as well"
    import ray.cloudpickle
    from ray.cluster_utils import Cluster
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__]) # jobs of this file, which workers cannot import
    with tempfile.TemporaryDirectory(prefix='ray', dir='/tmp', ignore_cleanup_errors=True) as d, pytest.MonkeyPatch.context() as m:
        m.setenv('RAY_TMPDIR', d)
        m.delenv('RAY_ADDRESS', raising=False)
        made = Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False, _system_config=soon))
        try:
            made.add_node(**node, num_gpus=1)
            yield made
        finally: made.shutdown()


def test_extraction(ray_cluster, tmp_path):
    "The bytes of one process; a bad slide is a line in the log; a cluster is not asked when nothing is to be done"
    (tmp_path/'slides').mkdir()
    for i in range(2): write_slide(tmp_path/'slides'/f's{i}.tif', i)
    (tmp_path/'slides'/'broken.svs').write_text('not a slide')
    here, there = (tmp_path/o for o in ('here', 'there'))
    log = extract(tmp_path/'slides', here, n_workers=1, **small)
    assert log.status.tolist() == ['failed', 'done', 'done']
    again = extract(tmp_path/'slides', there, ray=ray_cluster.address, **small)
    assert again.drop(columns='seconds').equals(log.drop(columns='seconds'))
    assert bag_bytes(there) == bag_bytes(here)
    assert extract([tmp_path/'slides'/f's{i}.tif' for i in range(2)], there, ray='nowhere:1', **small).status.tolist() == ['skipped']*2


def here():
    import ray
    return ray.get_runtime_context().get_node_id()


def until(seen, seconds=60):
    "Wait for something"
    end = time.time() + seconds
    while not seen(): assert time.time() < end; time.sleep(.02)


def marked(i, victim, folder):
    "On the victim: the first job ends with a result too large to be sent at once, the second sleeps. Elsewhere: wait for both"
    others = list(folder.glob(f'*.{victim}'))
    (folder/f'{i}.{here()}').touch()
    if here() == victim and others: time.sleep(600)
    if here() != victim: until(lambda: len(list(folder.glob(f'*.{victim}'))) == 2)
    return np.full(100_000, i)


def test_lost_node(ray_cluster, tmp_path):
    "A machine is switched off that holds a result that nobody has fetched and has a job in hand: both jobs are run again elsewhere"
    known = {n['NodeID'] for n in nodes(ray_cluster)}
    lost = ray_cluster.add_node(**node)
    victim, = {n['NodeID'] for n in nodes(ray_cluster)} - known
    with on_ray(marked, [(i, victim, tmp_path) for i in range(6)], ray_cluster.address) as results:
        until(lambda: len(list(tmp_path.glob(f'*.{victim}'))) == 2)
        ray_cluster.remove_node(lost, allow_graceful=False)
        assert sorted(r.mean() for r in results) == [0, 1, 2, 3, 4, 5]
    ran = sorted(int(p.stem) for p in tmp_path.iterdir())
    assert len(ran) == 8 and set(ran) == set(range(6))
    assert {int(p.stem) for p in tmp_path.glob(f'*.{victim}')} == {i for i in ran if ran.count(i) == 2}


def nodes(ray_cluster):
    with connected(ray_cluster.address) as ray: return [n for n in ray.nodes() if n['Alive']]


def devices(): return os.environ.get('CUDA_VISIBLE_DEVICES')


def test_gpus(ray_cluster):
    "A job sees the GPUs that it asked for, and no others; one that fits nowhere is not waited for in silence"
    for num_gpus, seen in ((0, ''), (.5, '0')):
        with on_ray(devices, [()]*2, ray_cluster.address, num_gpus=num_gpus) as found: assert set(found) == {seen}
    with pytest.warns(UserWarning, match='a job needs 1 CPUs and 2 GPUs, the largest machine has 1 CPUs and 1 GPUs. Waiting'):
        with on_ray(devices, [()], ray_cluster.address, num_gpus=2): pass


def no_tissue(path): raise CrossFusionError(f'{path}: expected tissue, found none.')


def test_error_of_a_job(ray_cluster):
    with pytest.raises(CrossFusionError) as e:
        with workers(ray='auto') as parallel, parallel(no_tissue, [('a.svs',), ('b.svs',)]) as results: list(results)
    assert type(e.value) is CrossFusionError and str(e.value) == 'a.svs: expected tissue, found none.'


def test_no_such_address(monkeypatch):
    "Nobody there, nobody who speaks, no such host: one line with the address, soon"
    monkeypatch.setattr(cluster, '_greets', partial(cluster._greets, patience=.5))
    start = time.time()
    with socket.socket() as closed, socket.create_server(('127.0.0.1', 0)) as silent:
        closed.bind(('127.0.0.1', 0))
        port = lambda s: s.getsockname()[1]
        for address in (f'127.0.0.1:{port(closed)}', f'127.0.0.1:{port(silent)}', f'ray://127.0.0.1:{port(silent)}', 'no_such_host', 'no_such_host.invalid:6379'):
            with pytest.raises(CrossFusionError) as e:
                with on_ray(pow, [(1, 2)], address): pass
            assert str(e.value).startswith(f'Ray at {address}: expected a cluster') and '\n' not in str(e.value)
    assert time.time() - start < 20


def test_ctrl_c(shell, tmp_path):
    "A Ray of our own, stopped in the middle: status 130, one line, no process and no file left"
    code = f"""import time
from pathlib import Path
from crossfusion.core import shell_errors
from crossfusion.cluster import on_ray
def work(i):
    (Path({str(tmp_path)!r})/str(i)).touch()
    time.sleep(600)
with shell_errors(), on_ray(work, [(i,) for i in range(9)]) as results: list(results)"""
    p = shell.start([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: p.poll() is not None or any(tmp_path.iterdir()))
        processes = psutil.Process(p.pid).children(recursive=True)
        raylet, = (q for q in processes if q.name() == 'raylet')
        folder = Path(re.search(r'/\S*/ray\w+(?=/session_)', ' '.join(raylet.cmdline()))[0])
        assert folder.is_dir()
        os.killpg(p.pid, signal.SIGINT)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert (p.returncode, out) == (130, '') and err.startswith('crossfusion: stopped by Ctrl-C') and err.count('\n') == 1, err
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert not folder.exists()


def training(out, **kwargs):
    "Five small folds"
    table, bags = simulate_cohort(40, '20x', seed=3)
    cross_validate(table, bags, out, 'amil', recipe=recipe_named(n_epoch=6), embed_dim=16, **kwargs)


@pytest.fixture(scope='module')
def trained_here(tmp_path_factory):
    "By two processes of this machine, without Ray"
    out = tmp_path_factory.mktemp('here')/'run'
    training(out, n_workers=2)
    return out


def same_run(run, other):
    files = {p.relative_to(run) for p in run.rglob('*')}
    assert files == {p.relative_to(other) for p in other.rglob('*')}
    for p in files: assert (run/p).is_dir() or p.name == 'config.json' or (run/p).read_bytes() == (other/p).read_bytes(), p


def test_training(ray_cluster, trained_here, tmp_path):
    "Five folds on two nodes: every file as without Ray"
    training(tmp_path/'run', ray=ray_cluster.address)
    same_run(tmp_path/'run', trained_here)


def test_training_with_a_killed_worker(ray_cluster, trained_here, tmp_path):
    "SIGKILL to a worker that has written a checkpoint: its fold is trained on from there, and nothing is different"
    killed = []
    def kill():
        until(lambda: list((tmp_path/'run').glob('fold_*/checkpoint.pt')), 120)
        busy = [p for p in psutil.process_iter(['cmdline']) if (p.info['cmdline'] or [''])[0].startswith('ray::_job')]
        for p in busy[:1]: p.kill(); killed.append(p.pid)
    killer = threading.Thread(target=kill); killer.start()
    training(tmp_path/'run', ray=ray_cluster.address)
    killer.join()
    assert len(killed) == 1
    same_run(tmp_path/'run', trained_here)
