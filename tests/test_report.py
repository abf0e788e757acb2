"The report in a real browser: on a telephone, on a wide screen and on paper; nothing from elsewhere"
import base64, importlib.util

import numpy as np, pytest

from crossfusion.viz.report import write_report
from crossfusion.viz.results import made_up_run


@pytest.fixture
def browser():
    if importlib.util.find_spec('websockets'):
        from browser import Browser, chromium
        if chromium():
            with Browser() as b: yield b
            return
    print('not looked at by a browser: there is no chromium, or the package websockets is missing')
    pytest.skip('without chromium or websockets')


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The report of 400 patients beside two other runs, with whatever a clinical table may know and a photograph as its heatmap"
    d = tmp_path_factory.mktemp('report')
    runs = [made_up_run(d/k, model=k, skill=s, n=400, missing=40) for k, s in (('crossfusion', .8), ('amil', .5), ('a_model_with_quite_a_long_name', .3))]
    import matplotlib.pyplot as plt, pandas as pd
    plt.imsave(d/'map.png', np.random.default_rng(0).random((900, 1600, 3)))
    r = np.random.default_rng(0)
    cohort = pd.read_csv(runs[0]/'cohort.csv', dtype={'patient': str}).assign(age=r.normal(65, 9, 400), stage=r.choice(['Stage IIIA', 'Stage IIB', 'Stage IV'], 400))
    return write_report(runs[0], others=runs[1:], cohort=cohort, heatmap=d/'map.png', out=d/'report.html',
                        edge=pd.DataFrame(dict(stage='final', mag=10, slide=list('abcd'), area=.4, attention=[.5, .6, .5, .4])))


def test_size(page): assert page.stat().st_size < 5e6


@pytest.mark.parametrize('width', [360, 800, 1400])
def test_on_a_screen(page, browser, width, tmp_path):
    "All pictures are there and are described, nothing is wider than the screen, letters can be read, the menu leads to its sections"
    browser.resize(width, 800)
    browser.open(page.as_uri())
    assert browser.js('document.documentElement.scrollWidth') <= width
    assert browser.js('[...document.images].every(i => i.complete && i.naturalWidth > 300 && i.alt.length > 10 && i.width <= innerWidth)')
    assert browser.js('document.images.length') >= 10
    assert browser.js('Math.min(...[...document.querySelectorAll("p, td, th, figcaption, .small")].map(e => parseFloat(getComputedStyle(e).fontSize)))') >= 12
    assert browser.js('[...document.querySelectorAll("nav a")].every(a => document.querySelector(a.hash))')
    browser.screenshot(tmp_path/'report.png', full=True)
    assert [u for u in browser.requests if u != page.as_uri()] == [] and browser.errors == []


def test_on_paper(page, browser, tmp_path):
    "It prints on some pages of A4, and what only a screen needs is left out"
    browser.open(page.as_uri())
    pdf = base64.b64decode(browser.call('Page.printToPDF', paperWidth=8.27, paperHeight=11.69)['data'])
    (tmp_path/'report.pdf').write_bytes(pdf)
    assert pdf[:4] == b'%PDF' and 4 < pdf.count(b'/Type /Page\n') + pdf.count(b'/Type /Page ') + pdf.count(b'/Type /Page/') < 25
    browser.call('Emulation.setEmulatedMedia', media='print')
    assert browser.js('getComputedStyle(document.querySelector("nav")).display') == 'none'
