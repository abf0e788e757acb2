"Extraction under bad luck: killed and restarted, many workers, bad files, full disks. Same bytes, clear words."
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from crossfusion.bag import read_bag
from crossfusion.core import CrossFusionError, error_line
from crossfusion import cli
from crossfusion.wsi import extract as module
from crossfusion.wsi.extract import extract, extract_slide

n_slides = 6
small = dict(patch_px=64, input_px=32)   # the real path, at a sixteenth of the work
real = Path(__file__).parents[2]/'shared/data/slides'


def write_slide(path, seed=0, px=768, mpp=.5, tissue=True):
    "Pink noise on glass, a tiled TIFF"
    r = np.random.default_rng(seed)
    im = np.full((px,px,3), 243)
    if tissue: im[px//8:, px//8:] = np.array([225,160,195]) + r.integers(-30, 30, (px-px//8,px-px//8,1))
    scale = dict(resolution=(1e4/mpp,)*2, resolutionunit='CENTIMETER') if mpp else {}
    tifffile.imwrite(path, (im + r.integers(-3, 4, im.shape[:2] + (1,))).astype(np.uint8), tile=(256,256), photometric='rgb', compression='deflate', **scale)
    return path


@pytest.fixture(scope='module')
def slides(tmp_path_factory):
    "Slides of nine cells, enough of them to be stopped in the middle"
    folder = tmp_path_factory.mktemp('slides')
    for i in range(n_slides): write_slide(folder/f's{i:02d}.tif', i)
    return folder


@pytest.fixture(scope='module')
def undisturbed(slides, tmp_path_factory):
    "Their bags, made without any trouble by one worker"
    out = tmp_path_factory.mktemp('undisturbed')
    assert (extract(slides, out, n_workers=1, **small).status == 'done').all()
    return bag_bytes(out)


def zero_tile(path, i):
    "Overwrite the pixels of one JPEG tile, as a failing disk would"
    with tifffile.TiffFile(path) as t: offset,size = t.pages[0].dataoffsets[i], t.pages[0].databytecounts[i]
    with open(path, 'r+b') as f:
        f.seek(offset); start = f.read(size).index(b'\xff\xda') + 14
        f.seek(offset + start); f.write(bytes(size - start - 2))


def bag_bytes(folder): return {p.name: p.read_bytes() for p in sorted(folder.glob('*.h5'))}


class Sums:
    "An encoder whose answers are exact, whoever computes them; it waits, as for a GPU"
    name,n_features = 'sums', 3
    def __call__(self, images):
        time.sleep(.01)
        return np.asarray(images)[:, ::7, ::5].astype(np.float32).sum((1,2))/1000


fork = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_extract import Sums, bag_bytes, extract
slides, out = Path({slides!r}), Path({out!r})
import openslide, PIL.Image, scipy.ndimage, skimage.filters, tifffile # not anew by each child
sys.stderr = open(os.devnull, 'w')

def start(folder, log=None):
    "Extract in a process of its own, which has imported everything already"
    pid = os.fork()
    if pid: return pid
    try:
        table = extract(slides, folder, Sums(), patch_px=64)
        if log: log.write_text(table.to_json())
    finally: os._exit(0)
"""

def forked(code, slides, out):
    "Run code that forks, in a fresh process that has computed nothing yet; what it prints as JSON"
    r = subprocess.run([sys.executable, '-c', fork.format(tests=str(Path(__file__).parent), slides=str(slides), out=str(out)) + code], capture_output=True, text=True, timeout=200)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp('few')
    for i in range(3): write_slide(folder/f's{i}.tif', i, px=512)
    return folder


def test_killed_at_twenty_moments(few, tmp_path):
    "From the first breath to the last: what stands there is whole, and the second run ends with the bytes of an undisturbed one"
    code = """
random.seed(0)
for name in ('warm', 'undisturbed'): begin = time.time(); os.waitpid(start(out/name), 0); whole = time.time() - begin
wanted, before, locks = bag_bytes(out/'undisturbed'), [], 0
for k in range(20):
    folder = out/str(k)
    pid = start(folder); time.sleep((k + random.random())/20*whole); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    found = bag_bytes(folder)
    assert all(wanted[n] == b for n,b in found.items()), k
    before.append(len(found)); locks += len(list(folder.glob('.*.lock')))
    os.waitpid(start(folder), 0)
    assert bag_bytes(folder) == wanted and not list(folder.glob('.*')), (k, sorted(folder.iterdir()))
print(json.dumps([before, locks]))
"""
    before,locks = forked(code, few, tmp_path)
    assert len(before) == 20 and len(set(before)) > 2 and locks, (before, locks)   # the kills fell into different moments, and left claims behind


def test_two_processes_one_folder(few, tmp_path):
    "Every slide is done once, by either; both know in the end how all are"
    code = """
both = [start(out/'bags', out/f'{i}.json') for i in range(2)]
for pid in both: os.waitpid(pid, 0)
os.waitpid(start(out/'alone'), 0)
print(json.dumps([json.loads((out/f'{i}.json').read_text())['status'] for i in range(2)] + [bag_bytes(out/'bags') == bag_bytes(out/'alone'), [p.name for p in (out/'bags').glob('.*')]]))
"""
    a,b,same,left = forked(code, few, tmp_path)
    assert same and not left
    assert all(sorted((a[i], b[i])) == ['done', 'skipped'] for i in a)
    log = pd.read_csv(tmp_path/'bags'/'extract.csv')
    assert len(log) == 3 and (log.seconds > 0).all() and (log.n_white == 0).all()


def test_readers_in_processes(few, tmp_path):
    "An encoder that lives here, and two processes that read for it: the bytes of one process"
    for n in (1,2): extract(few, tmp_path/str(n), Sums(), patch_px=64, n_workers=n)
    assert bag_bytes(tmp_path/'1') == bag_bytes(tmp_path/'2') != {}


def test_number_of_workers_does_not_matter(slides, undisturbed, tmp_path):
    extract(slides, tmp_path, n_workers=2, **small)
    assert bag_bytes(tmp_path) == undisturbed


def test_one_slide_alone(slides, undisturbed, tmp_path):
    extract_slide(slides/'s03.tif', tmp_path, **small)
    assert bag_bytes(tmp_path) == {'s03.h5': undisturbed['s03.h5']}


def test_ctrl_c(shell, slides, tmp_path):
    code = ('from crossfusion.core import shell_errors\nwith shell_errors():\n'
            f'    from crossfusion.wsi.extract import extract; extract({str(slides)!r}, {str(tmp_path)!r}, n_workers=1, **{small})')
    p = shell.start([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'s00.h5').exists() and p.poll() is None: time.sleep(.005)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode == 130 and err.splitlines()[-1].startswith('crossfusion: stopped by Ctrl-C') and 'Traceback' not in err
    status = pd.read_csv(tmp_path/'extract.csv').status.tolist()
    assert status[0] == 'done' and 'waiting' in status


def test_bad_slides_do_not_stop_the_others(slides, undisturbed, tmp_path):
    bad = tmp_path/'slides'; bad.mkdir()
    (bad/'empty_file.svs').touch()
    (bad/'text.svs').write_text('not a slide')
    write_slide(bad/'glass.tif', tissue=False)
    write_slide(bad/'no_mpp.tif', mpp=None)
    write_slide(bad/'screen.tif', mpp=352.8)
    whole = write_slide(bad/'cut.tif').read_bytes()
    (bad/'cut.tif').write_bytes(whole[:len(whole)//2])
    log = extract([*bad.iterdir(), slides/'s01.tif'], tmp_path/'bags', n_workers=1, **small).set_index('slide')
    assert log.status.to_dict() == dict(cut='failed', empty_file='failed', glass='failed', no_mpp='failed', s01='done', screen='failed', text='failed')
    for name,words in dict(cut='damaged', empty_file='OpenSlide', glass='tissue', no_mpp='--mpp', screen='352.8', text='OpenSlide').items():
        assert words in log.reason[name] and name in log.reason[name] and '\n' not in log.reason[name]
    assert bag_bytes(tmp_path/'bags') == {'s01.h5': undisturbed['s01.h5']}


def test_hole_is_not_tissue(tmp_path):
    "A tile of zeros in a JPEG file decodes to grey without an error: its cell is left out"
    r = np.random.default_rng(0)
    im = (np.array([225,160,195]) + r.integers(-30, 30, (1024,1024,1))).astype(np.uint8)
    path = tmp_path/'hole.tif'
    tifffile.imwrite(path, im, tile=(256,256), photometric='rgb', compression='jpeg', resolution=(2e4,2e4), resolutionunit='CENTIMETER')
    zero_tile(path, 5)
    log = extract(path, tmp_path/'bags', n_workers=1, **small)
    assert log.status.tolist() == ['done'] and log.n5.tolist() == [15]
    assert 'one flat grey' in log.note[0]
    assert [256,256] not in read_bag(tmp_path/'bags/hole.h5').coords[5].tolist()


def test_full_disk_stops_everything(slides, tmp_path, monkeypatch):
    def full(path, bag): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    monkeypatch.setattr(module, 'write_bag', full)
    with pytest.raises(OSError) as e: extract(slides, tmp_path, n_workers=1, **small)
    assert error_line(e.value)[1] == 2 and 's00.h5' in error_line(e.value)[0]
    assert not bag_bytes(tmp_path)


def test_no_folder_to_write_to(slides, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError) as e: extract(slides, tmp_path/'file'/'bags', n_workers=1, **small)
    assert error_line(e.value)[1] == 2


def test_one_encoder_per_folder(slides, undisturbed, tmp_path):
    (tmp_path/'s00.h5').write_bytes(undisturbed['s00.h5'])                   # a bag without its folder's settings
    with pytest.raises(CrossFusionError, match='a bag with encoder efficientnet_lite0_64px, found efficientnet_lite0_32px'):
        extract(slides, tmp_path, n_workers=1, patch_px=64, input_px=64)


def test_encoder_without_numbers_stops_everything(slides, tmp_path):
    class NaN:
        name,n_features = 'nan', 2
        def __call__(self, images): return np.full((len(images),2), np.nan)
    with pytest.raises(CrossFusionError, match='encoder nan: expected features that are numbers'): extract(slides, tmp_path, NaN(), patch_px=64)


@pytest.mark.skipif(not real.exists(), reason='no real slides here')
def test_real_slides(tmp_path):
    log = extract(real, tmp_path, n_workers=1, input_px=32).set_index('slide')
    assert log.status.to_dict() == {'CMU-1-Small-Region':'done', 'TCGA-CR-7395-01A-01-TS1':'failed', 'broken':'failed', 'small':'failed'}
    assert 'Give it with mpp=' in log.reason['TCGA-CR-7395-01A-01-TS1'] and 'broken.svs' in log.reason['broken'] and 'tissue' in log.reason['small']
    bag = read_bag(tmp_path/'CMU-1-Small-Region.h5')
    assert bag.mpp == .499 and all(np.bincount(bag.parents(m)).tolist() == [4]*len(bag.coords[m//2]) for m in (10,20))
    assert {p.stem for p in (tmp_path/'pictures').iterdir()} == {'CMU-1-Small-Region', 'small'}


@pytest.mark.skipif(not real.exists(), reason='no real slides here')
def test_scale_from_the_shell(tmp_path, capsys):
    "A JPEG 2000 slide without mpp: refused with status 2 and what to do, then done by a number, then by a table"
    slide,table = real/'TCGA-CR-7395-01A-01-TS1.svs', tmp_path/'mpp.csv'
    table.write_text('wsi,mpp\nTCGA-CR-7395-01A-01-TS1.svs,0.5\nanother.svs,0.25\n')
    run = lambda out, **kwargs: cli.extract(str(slide), str(tmp_path/out), input_px=32, n_workers=1, **kwargs)
    with pytest.raises(SystemExit) as stop: run('none')
    said = capsys.readouterr()
    assert stop.value.code == 2 and 'Give it with mpp=' in said.err.splitlines()[-1] and '1 failed' in said.out
    for out,mpp,source in (('number','0.5','given'), ('table',str(table),'table')):
        run(out, mpp=mpp)
        log = pd.read_csv(tmp_path/out/'extract.csv')
        assert log.status.tolist() == ['done'] and log.mpp.tolist() == [.5] and log.mpp_source.tolist() == [source] and log.n20[0] == 16*log.n5[0] == 208
    assert bag_bytes(tmp_path/'number') == bag_bytes(tmp_path/'table')
    with pytest.raises(SystemExit): run('number', mpp='250')
    assert 'expected 0.05 to 20 micrometres per pixel, found 250' in capsys.readouterr().err


@pytest.mark.skipif(not real.exists(), reason='no real slides here')
def test_damaged_in_the_middle(tmp_path):
    "A slide that opens but cannot be read to the end fails alone, and leaves no bag"
    path = tmp_path/'damaged.svs'
    path.write_bytes((real/'CMU-1-Small-Region.svs').read_bytes())
    zero_tile(path, 45)
    log = extract(path, tmp_path/'bags', n_workers=1, input_px=32)
    assert log.status.tolist() == ['failed'] and 'damaged' in log.reason[0] and 'damaged.svs' in log.reason[0]
    assert not bag_bytes(tmp_path/'bags')
