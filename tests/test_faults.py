"What a user may meet at the command line: Ctrl-C, no permission, a full disk, a missing package"
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest


def said(err):
    "The last line on stderr, the only one that is ours; bars may stand before it"
    lines = [o for o in err.splitlines() if o.strip()]
    assert 'Traceback' not in err, err
    assert lines and [o.startswith('crossfusion') for o in lines] == [False]*(len(lines) - 1) + [True], err
    return lines[-1]


def half_written(out, run):
    "Files of an unfinished run that are not as long as those of a finished one"
    size = lambda p: p.stat().st_size if p.exists() else None
    found = [p for p in out.rglob('*') if p.suffix in ('.tif', '.tiff', '.h5', '.safetensors') or p.name == 'predictions.csv']
    return [p for p in found if size(p) != size(run/p.relative_to(out))]


def last_moment(run, out, before):
    "A copy of a finished run as it was when its first file that fits `before` was about to be written"
    shutil.copytree(run, out)
    t = min(p.stat().st_mtime_ns for p in out.rglob(before))
    for p in [p for p in out.rglob('*') if p.is_file() and p.stat().st_mtime_ns >= t]: p.unlink()
    return out


def stop(shell, out, seen):
    "Start the demo, press Ctrl-C once it has made a file that `seen` finds; exit status and stderr, when no helper is left"
    log = out.with_name(out.name + '.log')
    with open(log, 'w') as f: p = shell.start(shell.command('crossfusion_demo', '--quick', '--out', out), stdout=f, stderr=f)
    end = time.time() + 180
    try:
        while not seen():
            assert p.poll() is None, f'ended too early:\n{log.read_text()}'
            assert time.time() < end, f'not so far in time:\n{log.read_text()}'
            time.sleep(.02)
        os.killpg(p.pid, signal.SIGINT)
        status = p.wait(timeout=30)
        for _ in range(100):
            try: os.killpg(p.pid, 0)
            except ProcessLookupError: return status, log.read_text()
            time.sleep(.1)
        raise AssertionError('a helper process still runs')
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass


# Ctrl-C

def test_stopped_and_resumed_is_the_same(shell, quick_demo, tmp_path):
    """Ctrl-C while slides are painted, once more while folds are trained: at the end all is as if nothing had happened.
    To be quick it begins with most slides and bags of a finished run, and its baseline"""
    out = tmp_path/'demo'
    unfinished = lambda folder, names: {'fold_0', 'fold_1', 'predictions.csv', 'metrics.json'} if folder.endswith('crossfusion') else {'report.html'}
    shutil.copytree(quick_demo, out, ignore=unfinished)
    slides = sorted(out.rglob('*.tif*'))[-3:]
    for p in [*slides, *(p for p in out.rglob('*.h5') if p.stem in {s.stem for s in slides})]: p.unlink()
    for seen in (lambda: any(p.exists() for p in slides), lambda: any(not p.name.startswith('.') for p in out.rglob('crossfusion/fold_*/*'))):
        status, err = stop(shell, out, seen)
        assert status == 130, err
        assert 'Ctrl-C' in said(err)
        assert not half_written(out, quick_demo)
    r = shell.run(shell.command('crossfusion_demo', '--quick', '--out', out))
    assert r.returncode == 0, r.stderr
    names = lambda folder: sorted(p.relative_to(folder) for p in folder.rglob('*') if p.is_file()) # hidden ones, too
    assert names(out) == names(quick_demo)
    same = [p for p in names(out) if p.suffix in ('.tif', '.tiff', '.h5', '.safetensors') or p.name == 'predictions.csv']
    assert len({p.suffix for p in same}) == 4
    for p in same: assert (out/p).read_bytes() == (quick_demo/p).read_bytes(), p


@pytest.mark.skipif(not Path('/proc').exists(), reason='there is no /proc to see processes in')
def test_workers_of_a_killed_program_end(tmp_path):
    "SIGKILL leaves no time to end them"
    script = f"""import os, time
from crossfusion.core import in_parallel
def work(i):
    open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()
    time.sleep(60)
with in_parallel(work, [(0,), (1,)], 2) as done: list(done)"""
    p = subprocess.Popen([sys.executable, '-c', script])
    running = lambda: [int(f.name) for f in tmp_path.iterdir() if Path(f'/proc/{f.name}').exists()]
    end = time.time() + 60
    try:
        while len(running()) < 2: assert p.poll() is None and time.time() < end; time.sleep(.1)
    finally: p.kill(); p.wait()
    end = time.time() + 20
    while running(): assert time.time() < end, 'workers go on'; time.sleep(.1)


# Places that cannot be written to

in_namespace = ['unshare', '--map-root-user', '--mount', 'sh', '-c'] # mounts that this process alone sees


@pytest.fixture(scope='session')
def may_mount(tmp_path_factory):
    "Skip where an unprivileged process may not mount a file system of its own"
    if not shutil.which('unshare'): pytest.skip('there is no unshare here')
    r = subprocess.run([*in_namespace, 'mount -t tmpfs tmpfs "$0"', str(tmp_path_factory.mktemp('mount'))], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'mounting is not permitted here: {r.stderr.strip()}')


def refused(r, name):
    assert r.returncode == 2, r.stderr
    assert name in said(r.stderr)


def test_folder_below_a_file(shell, tmp_path):
    (tmp_path/'file').write_text('not a folder')
    refused(shell.run(shell.command('crossfusion_demo', '--quick', '--out', tmp_path/'file'/'demo')), 'file')
    assert (tmp_path/'file').read_text() == 'not a folder'


def test_folder_without_permission(shell, tmp_path, request):
    (tmp_path/'locked').mkdir(mode=0o555)
    cmd = shell.command('crossfusion_demo', '--quick', '--out', tmp_path/'locked'/'demo')
    if os.geteuid() == 0: # root may write anywhere, but not to what is mounted read-only
        request.getfixturevalue('may_mount')
        cmd = [*in_namespace, 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"', str(tmp_path/'locked'), *cmd]
    refused(shell.run(cmd), 'locked')


@pytest.mark.parametrize('before', ['*.tif*', '*.h5', 'fold_*/*', 'report.html'])
def test_full_disk(shell, quick_demo, tmp_path, may_mount, before):
    "The disk is full when a file of this kind is to be written: one line, and what is there is whole"
    state, disk, kept = last_moment(quick_demo, tmp_path/'state', before), tmp_path/'disk', tmp_path/'kept'
    disk.mkdir()
    kib = sum(p.stat().st_size // 1024 + 8 for p in state.rglob('*')) + 100
    script = f'''mount -t tmpfs -o size={kib}k tmpfs "$0" && cp -a {state}/. "$0" || exit 99
        cat /dev/zero > "$0"/filler 2> /dev/null
        "$@"; status=$?
        rm "$0"/filler; cp -a "$0" {kept}; exit $status'''
    r = shell.run([*in_namespace, script, str(disk), *shell.command('crossfusion_demo', '--quick', '--out', disk)])
    assert r.returncode == 2, r.stderr
    assert 'No space left on device' in said(r.stderr)
    assert not half_written(kept, quick_demo)


# Packages that are not there

def without(tmp_path, package):
    "An environment in which importing a package fails as if it were not installed"
    (tmp_path/'shadow').mkdir()
    (tmp_path/'shadow'/f'{package}.py').write_text(f'raise ModuleNotFoundError("No module named {package!r}", name={package!r})\n')
    return dict(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path/'shadow'), os.environ.get('PYTHONPATH')])))


@pytest.mark.parametrize('package', ['h5py', 'tifffile', 'torch', 'lifelines'])
def test_missing_package(shell, tmp_path, package):
    "One line that names it, before any work is done"
    r = shell.run(shell.command('crossfusion_demo', '--quick', '--out', tmp_path/'demo'), env=without(tmp_path, package))
    refused(r, package)
    assert 'pip install' in r.stderr
    assert not (tmp_path/'demo').exists()


@pytest.mark.parametrize('package', ['openslide', 'efficientnet_lite_pytorch'])
def test_missing_package_of_extraction(shell, quick_demo, tmp_path, package):
    "What only slides need is missed when slides are read: one line as well, not one for each slide"
    out = last_moment(quick_demo, tmp_path/'demo', '*.h5')
    r = shell.run(shell.command('crossfusion_demo', '--quick', '--out', out), env=without(tmp_path, package))
    refused(r, package)
    assert 'pip install' in said(r.stderr) and said(r.stderr).count(package) <= 3
    assert not half_written(out, quick_demo)


def test_reader_who_has_seen_enough(shell, quick_demo):
    "As in `crossfusion_evaluate ... | head -0`: no complaint"
    p = shell.start(shell.command('crossfusion_evaluate', '--predictions', quick_demo/'crossfusion'/'predictions.csv'), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.stderr.read() == b'' and p.wait() == 1


def test_help_needs_no_package(shell, tmp_path):
    r = shell.run(shell.command('crossfusion_demo', '--help'), env=without(tmp_path, 'torch'))
    assert r.returncode == 0 and '--quick' in r.stdout, r.stderr
