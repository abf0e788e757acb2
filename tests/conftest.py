"What tests share: the repository, and the programs of this environment run as a user runs them"
import os, signal, subprocess, sys
from pathlib import Path

import pytest
from filelock import FileLock

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
os.environ.setdefault('MPLBACKEND', 'agg')


class Shell:
    "Console scripts of this environment, each in a process group of its own, as from a terminal"
    def command(self, name, *args): return [str(Path(sys.executable).with_name(name)), *map(str, args)]

    def start(self, cmd, **kwargs):
        "Ctrl-C has its usual meaning, even if these tests run in the background where it is ignored"
        env = {**os.environ, **kwargs.pop('env', {})}
        return subprocess.Popen(cmd, env=env, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kwargs)

    def run(self, cmd, timeout=300, **kwargs):
        p = self.start(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
        try: out, err = p.communicate(timeout=timeout)
        finally:
            if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(cmd, p.returncode, out, err)


@pytest.fixture(scope='session')
def shell(): return Shell()


@pytest.fixture(scope='session')
def quick_demo(shell, tmp_path_factory):
    "The folder of one undisturbed `crossfusion_demo --quick`, made once for all that test side by side; do not change it"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with FileLock(shared/'quick.lock'):
        if not (shared/'quick'/'done').exists():
            r = shell.run(shell.command('crossfusion_demo', '--quick', '--out', shared/'quick'/'demo'))
            assert r.returncode == 0, r.stderr
            (shared/'quick'/'done').touch()
    return shared/'quick'/'demo'
