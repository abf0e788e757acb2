"The explorer: what a choice leads to, and the page that Voila serves, looked at by a real browser"
import base64, importlib.util, os, random, subprocess, sys
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np, pytest

from crossfusion.bag import Bag, write_bag
from crossfusion.core import CrossFusionError
from crossfusion.data.bags import open_bags
from crossfusion.data.cohort import make_folds
from crossfusion.simulate.slides import simulate_slides
from crossfusion.training.crossval import cross_validate
from crossfusion.training.learner import recipe_named
from crossfusion.viz.explorer import Explorer, RunSlides, as_bytes, family, family_images, patch_at, write_app
from crossfusion.viz.heatmaps import strongest
from crossfusion.wsi.extract import find_slides
from crossfusion.wsi.grid import patch_grid
from crossfusion.wsi.slides import Slide
from crossfusion.wsi.tissue import tissue_mask


def make_bag(path, px=128):
    with Slide(path) as s:
        g, r = patch_grid(s, tissue_mask(s.thumbnail()), patch_px=px), np.random.default_rng(0)
        return Bag(s.name, {m: r.normal(size=(len(c), 8)) for m, c in g.coords.items()}, dict(g.coords), 'random', s.width, s.height, s.mpp, px)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Slides, bags and two runs of a dozen patients"
    d = tmp_path_factory.mktemp('explorer')
    cohort = simulate_slides(d/'slides', n_patients=12, n_second=2, size=(1536, 1280), n_workers=1)
    for p in find_slides(d/'slides'): write_bag(d/'bags'/f'{p.stem}.h5', make_bag(p))
    for model in ('crossfusion', 'amil'):
        cross_validate(cohort, open_bags(d/'bags'), d/model, model, make_folds(cohort, 2), 'fixed', recipe_named(n_epoch=1), n_bins=2, embed_dim=16)
    return d


def test_every_click_finds_its_patch(place):
    "The middle of each patch, in pixels of the picture as a browser reports them, back to the patch"
    app = Explorer(place/'crossfusion', place/'slides', place/'bags')
    for stage in ('cross_5x', 'final', 'cross_20x'):
        app.stage.value = stage
        bag, mag = app.maps.bag, app.mag.value
        scale = app.maps.slide.width/app.maps.thumb.shape[1]
        for row in range(0, len(bag.coords[mag]), 7):
            x, y = (bag.coords[mag][row] + bag.patch_px_level0(mag)/2)/scale
            app.pick(round(x)*scale, round(y)*scale)
            assert app.row == row, (stage, row)


def test_families_agree_from_both_sides(place):
    "Whoever is a parent's child has that parent, and all children together are the finer scale"
    bag = open_bags(place/'bags')['P0000-1']
    for mag, finer in ((5, 10), (10, 20)):
        children = [family(bag, mag, row)[finer] for row in range(len(bag.coords[mag]))]
        assert sorted(np.concatenate(children)) == list(range(len(bag.coords[finer])))
        assert all(family(bag, finer, c)[mag] == [row] for row, some in enumerate(children) for c in some)


def test_any_order_of_choices(place):
    "Whatever is chosen in whatever order, the app shows what its controls say, and only one slide is open"
    r = random.Random(0)
    for run in ('crossfusion', 'amil'):
        app = Explorer(place/run, place/'slides', place/'bags', n=2, max_px=200)
        for _ in range(25):
            control = r.choice([app.patient, app.slide, app.stage, app.mag, app.threshold, 'pick'])
            if control == 'pick': app.pick(r.uniform(-50, 1600), r.uniform(-50, 1400))
            else: control.value = r.choice([v for _, v in control.options]) if hasattr(control, 'options') else r.randrange(100)
            assert app.slide.value.startswith(app.patient.value) and app.maps.slide.name == app.slide.value and app.maps is app.source.open
            assert app.mag.value in app.maps.attention[app.stage.value]
            assert app.slide.value in app.text.value and f'at {app.mag.value}x' in app.text.value
            assert app.row is None or f'patch at {app.mag.value}x' in ''.join(o.children[1].value for o in app.family.children)


def test_what_is_lacking(place, tmp_path):
    "Slides without a bag or a file are left out; a bag of another slide is told in the page"
    files = find_slides(place/'slides')
    bags = {s: b for s, b in open_bags(place/'bags').items() if s not in ('P0003-1', 'P0000-2')}
    found = RunSlides(place/'amil', files[:-1], bags).table
    assert set(found.slide) == {p.stem for p in files[:-1]} - {'P0003-1', 'P0000-2'}
    with pytest.raises(CrossFusionError, match='found none'): RunSlides(place/'amil', files[:1], {})
    app = Explorer(place/'amil', files, dict(bags) | {'P0001-1': bags['P0002-1']})
    app.patient.value = 'P0001'
    assert 'a bag of this slide' in app.text.value


def test_without_ipyevents(place, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipyevents', None)
    app = Explorer(place/'amil', place/'slides', place/'bags', n=3)
    assert not app.clicks and 'ipyevents' in app.family.children[0].value
    app.strongest.children[1].children[-1].click()
    assert len(app.family.children) > 1


def lacking():
    "What the browser test needs and does not find"
    found = {p: importlib.util.find_spec(p) for p in ('voila', 'ipyevents', 'websockets')}
    if found['websockets']:
        from browser import chromium
        found['chromium'] = chromium()
    return [k for k, v in found.items() if not v]


@pytest.fixture
def page(place, tmp_path):
    "The explorer's address, served by Voila"
    if lacking():
        print(f'not looked at by a browser: without {", ".join(lacking())}')
        pytest.skip(f'without {", ".join(lacking())}')
    from browser import free_port
    notebook, port = write_app(place/'crossfusion', place/'slides', place/'bags', tmp_path/'explorer.ipynb'), free_port()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **{f'JUPYTER_{k}_DIR': str(tmp_path/k) for k in ('DATA', 'CONFIG', 'RUNTIME')}}
    with open(tmp_path/'log', 'w') as log:
        p = subprocess.Popen([str(Path(sys.executable).with_name('voila')), notebook, '--no-browser', f'--port={port}'], env=env, stdout=log, stderr=log)
    yield f'http://127.0.0.1:{port}/', p
    p.terminate()
    p.wait(20)


def test_in_a_browser(page, place, tmp_path):
    "The page shows itself; a click on the map shows the very pixels of the patch under it; a control changes the map"
    from browser import Browser
    address, server = page
    def answers():
        assert server.poll() is None, (tmp_path/'log').read_text()
        try: return urlopen(address + 'voila/none')
        except HTTPError: return True
        except URLError: return False
    image = 'document.querySelectorAll("img")[{}]'
    data = lambda b, i: base64.b64decode(b.js(f'fetch({image.format(i)}.src).then(r => r.blob()).then(o => new Promise(done => {{'
                                              'const f = new FileReader(); f.onload = () => done(f.result.split(",")[1]); f.readAsDataURL(o)}))'))
    source = RunSlides(place/'crossfusion', place/'slides', place/'bags')
    maps = source.maps(source.table.slide[0])
    shown, n = f'{image.format(0)}?.naturalWidth > 0 && document.querySelectorAll("img").length == {{}}', len(maps.bag.coords[10])
    at_first = 2 + len(strongest(maps.bag, maps.scores('final', 10), 10, 6))   # map, curve, patches
    with Browser() as b:
        b.until(answers, 60)
        b.open(address)
        b.until(shown.format(at_first), 60)
        before = data(b, 0)
        x, y, width, height = b.js(f'(r => [r.x, r.y, r.width, r.height])({image.format(0)}.getBoundingClientRect())')
        b.click(x + .52*width, y + .41*height)
        b.until(shown.format(at_first + 3), 20)
        row = patch_at(maps.bag, 10, .52*maps.slide.width, .41*maps.slide.height)
        assert [data(b, at_first + k) for k in range(3)] == [as_bytes(o) for o, _ in family_images(maps, 'final', 10, row)]
        b.until(lambda: data(b, 0) != before, 20)
        assert f'{n} of {n} patches at 10x' in b.js('document.body.innerText')
        b.js('(s => {s.value = [...s.options].find(o => o.text.includes("20x")).value; s.dispatchEvent(new Event("change", {bubbles: true}))})(document.querySelectorAll("select")[2])')
        b.until('document.body.innerText.includes("patches at 20x")', 20)
        assert b.js('document.documentElement.scrollWidth <= innerWidth')
        b.resize(400, 800)
        b.until('document.documentElement.scrollWidth <= innerWidth', 5)
        b.screenshot(tmp_path/'explorer.png')
        assert not [e for e in b.errors if 'exceptionDetails' in e]
    maps.slide.close()
