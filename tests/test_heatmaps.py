"Maps over slides: every model, odd sizes, files that others open, and what must be refused"
import json, shutil
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import openslide
import pandas as pd
import pytest
import torch

from crossfusion.bag import Bag, write_bag
from crossfusion.core import CrossFusionError, rng
from crossfusion.data.cohort import make_folds
from crossfusion.data.loaders import bag_inputs
from crossfusion.models.registry import model_named, model_names, small
from crossfusion.simulate.bags import simulate_bag, simulate_cohort
from crossfusion.simulate.slides import write_slide
from crossfusion.survival.outcomes import logits_to_risk
from crossfusion.training.crossval import cross_validate
from crossfusion.training.learner import recipe_named
from crossfusion.viz.checks import edge_attention, edge_band, enrichment, mean_in_patches, occlude, occlusion, tissue_regions
from crossfusion.viz.export import top_patches, write_exports, write_geojson, write_overlay
from crossfusion.viz.heatmaps import heatmap_figure, list_maps, strongest, write_heatmap
from crossfusion.viz.painting import rasterise
from crossfusion.wsi.grid import patch_grid
from crossfusion.wsi.slides import Slide
from crossfusion.wsi.tissue import tissue_mask

real = Path(__file__).parents[2]/'shared/data/slides/CMU-1-Small-Region.svs'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run that has seen its patients once, its bags, and one slide of its cohort"
    d = tmp_path_factory.mktemp('trained')
    cohort,bags = simulate_cohort(20, 'cross', seed=1)
    cross_validate(cohort, bags, d/'run', 'crossfusion', make_folds(cohort, 2), n_bins=2, recipe=recipe_named(n_epoch=1), embed_dim=16)
    name = cohort.slide[3]
    write_slide(d/f'{name}.tiff', rng(0, 'pixels').integers(0, 255, (bags[name].height, bags[name].width, 3), np.uint8))
    write_bag(d/'bags'/f'{name}.h5', bags[name])
    return d, bags, name


@pytest.mark.parametrize('name', model_names())
def test_every_model(name, tmp_path):
    "Its stages become maps and files; without a region it answers as a bag without that region does"
    torch.manual_seed(0)
    bag = simulate_bag('a', .5, seed=2)
    model = model_named(name, 32, **small(name)).eval()
    torch.nn.init.normal_(model.head.weight) if hasattr(getattr(model, 'head', None), 'weight') else None
    inputs = lambda b: [{m: o[None].float() if i == 0 else o[None] for m,o in x.items()} for i,x in enumerate(bag_inputs(b))]
    seen = {s: {m: np.asarray(x) for m,x in of.items()} for s,of in model.attention(*inputs(bag)).items()}
    assert len(list_maps(seen, 'all')) >= len(seen)
    edges = edge_attention(bag, seen)
    assert (np.isfinite(edges.ratio) == (edges.area < 1)).all() and (edges.attention <= 1 + 1e-6).all()
    collection = json.loads(write_geojson(tmp_path/'a.geojson', bag, seen).read_text())
    assert len(collection['features']) == sum(map(len, bag.coords.values()))
    assert set(top_patches(bag, seen, 5, 'all').stage) == set(seen)

    float32 = Bag(bag.slide, {m: f.astype(np.float32) for m,f in bag.features.items()}, dict(bag.coords), bag.encoder, bag.width, bag.height, bag.mpp)
    r = tissue_regions(float32, 2)
    change = occlude(model, float32, r)
    with torch.no_grad():
        for k in range(len(change)):
            rest = Bag('a', {m: float32.features[m][rows != k] for m,rows in r.rows.items()}, {m: bag.coords[m][rows != k] for m,rows in r.rows.items()},
                       'none', bag.width, bag.height, bag.mpp)
            a,b = (logits_to_risk(model(*inputs(o))) for o in (float32, rest))
            assert change[k] == pytest.approx(float(a - b), abs=2e-5)


def test_regions_of_foreign_patches():
    "Scales that are not nested: each patch in the region that holds its centre, all of them in one"
    c = {5: np.array([(x,y) for y in range(3) for x in range(3)])*1024 + 40, 20: rng(0, 'foreign').integers(0, 2800, (300,2))}
    bag = Bag('f', {m: np.zeros((len(o),1)) for m,o in c.items()}, c, 'none', 3200, 3200, .5)
    r = tissue_regions(bag)
    assert r.coords[r.rows[5]].tolist() == bag.coords[5].tolist()
    centre = bag.coords[20] + 128
    low = r.coords[r.rows[20]]
    assert ((centre >= low) & (centre < low + r.side)).all() and len(r.coords) >= 9


def test_edges_in_any_order_and_place():
    "The band moves with the tissue, and is the same seen from any side"
    c = np.argwhere(rng(0, 'edge').random((30,20)) < .9)
    def edges(c):
        b = Bag('a', {20: np.zeros((len(c),1))}, {20: np.round(c*256.5).astype(int)}, 'none', 99999, 99999, .499)
        return {tuple(p) for p in np.round(b.coords[20]/256.5).astype(int)[edge_band(b, 20)].tolist()}
    here = edges(c)
    assert 0 < len(here) < len(c)
    assert edges(c + (7,3)) == {(x+7,y+3) for x,y in here}
    assert edges(c[:,::-1]) == {(y,x) for x,y in here}
    inside = set(map(tuple, c.tolist()))       # by hand: a patch is inside if all 24 around it are there
    assert here == {(x,y) for x,y in inside if any((x+i,y+j) not in inside for i in range(-2,3) for j in range(-2,3))}


def test_means_of_patches_and_enrichment():
    picture = rng(0, 'picture').random((40,60))
    c = rng(0, 'corners').integers(0, 100, (50,2))
    bag = Bag('a', {20: np.zeros((50,1))}, {20: c}, 'none', 120, 80, .5, patch_px=20)
    slow = [picture[round(y/2):min(40, round(y/2 + 10)), round(x/2):min(60, round(x/2 + 10))] for x,y in bag.coords[20]]
    found = mean_in_patches(picture, bag, 20)
    assert found[[o.size > 0 for o in slow]] == pytest.approx([o.mean() for o in slow if o.size])
    with pytest.raises(CrossFusionError, match='at least one patch'): enrichment([1,2], [False,False])


@pytest.mark.parametrize('size', [(301,517), (1024,256), (40,33)])
@pytest.mark.parametrize('shrink', [1,2,16])
def test_overlay_of_any_size(tmp_path, size, shrink):
    "OpenSlide sees a slide of the same place, whose pixels are the painted map at every level"
    w,h = size
    side = 17.3
    c = np.round(np.argwhere(rng(0, 'overlay').random((h//17, w//17)) < .6)[:,::-1]*side).astype(int)
    write_slide(tmp_path/'a.tiff', np.full((h,w,3), 255, np.uint8), .499)
    bag = Bag('a', {20: np.zeros((len(c),1))}, {20: c}, 'none', w, h, .499, sizes={20: side})
    scores = rng(1, 'overlay').random(len(c))
    with Slide(tmp_path/'a.tiff') as s: write_overlay(tmp_path/'o.tiff', s, bag, scores, 20, 'clip', shrink=shrink)
    with openslide.OpenSlide(tmp_path/'o.tiff') as o:
        assert o.dimensions == (-(-w//shrink), -(-h//shrink))
        assert float(o.properties['openslide.mpp-x']) == pytest.approx(.499*shrink, rel=1e-4)
        for level,(lw,lh) in enumerate(o.level_dimensions):
            k = shrink*4**level
            painted = np.isfinite(rasterise(bag.coords[20], side, scores, (lw*k,lh*k), (lh,lw)))
            assert ((np.array(o.read_region((0,0), level, (lw,lh)))[...,3] > 0) == painted).all()


def test_a_failure_leaves_nothing(trained, tmp_path, monkeypatch):
    d,bags,name = trained
    with Slide(d/f'{name}.tiff', .5) as s:
        bag = bags[name]
        with pytest.raises(CrossFusionError, match='scores'): write_geojson(tmp_path/'a.geojson', bag, dict(final={10: np.ones(3)}))
        monkeypatch.setattr('crossfusion.viz.export.map_tiles', lambda *a: iter([np.zeros((256,256,4), np.uint8)]))
        with pytest.raises(Exception): write_overlay(tmp_path/'a.tiff', s, bag, np.ones(len(bag.coords[5])), 5)
    with pytest.raises(CrossFusionError, match='a picture'): write_heatmap(d/'run', d/f'{name}.tiff', bags, tmp_path/'a.xyz', mpp=.5)
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []


def test_at_the_shell(trained, tmp_path, capsys):
    "The command writes all it was asked for, and says in a line what is wrong"
    from crossfusion.cli import heatmap
    d,bags,name = trained
    slide = d/f'{name}.tiff'
    heatmap(str(d/'run'), str(slide), str(d/'bags'), out=str(tmp_path/'a.png'), export=str(tmp_path/'e'), occlusion=1, edge=True, smooth=True)
    out = capsys.readouterr().out
    files = {p.name for p in tmp_path.rglob('*') if p.is_file()}
    assert {'a.png', f'{name}.geojson', f'{name}_top.csv', f'{name}_final_10x.tiff', f'{name}_cross_5x_5x.png'} <= files and 'ratio' in out
    assert (d/'run/figures'/f'{name}_occlusion.png').exists()
    top = pd.read_csv(tmp_path/'e'/f'{name}_top.csv')
    assert list(top.stage.unique()) == ['cross_5x','cross_20x','pad_10x','final']
    write_slide(tmp_path/f'{name}.tiff', np.zeros((512,512,3), np.uint8))
    write_slide(tmp_path/'other.tiff', np.zeros((512,512,3), np.uint8))
    for args,kwargs,line in (((d/'run', tmp_path/f'{name}.tiff', d/'bags'), {}, f'width 512, found width {bags[name].width}'),
                             ((d/'run', tmp_path/'other.tiff', d/'bags'), {}, 'a bag of this slide, found none'),
                             ((d/'run', slide, d/'bags'), dict(stages='layer1'), 'a stage of this model: cross_'),
                             ((d/'run', slide, d/'bags'), dict(scale='loud'), 'rank or clip'),
                             ((d/'bags', slide, d/'bags'), {}, 'expected a run folder'),
                             ((d/'run', d/'none.svs', d/'bags'), {}, 'no such file')):
        with pytest.raises(SystemExit) as stop: heatmap(*map(str, args), **kwargs)
        err = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and line in err[-1], err


def test_without_weights(trained, tmp_path):
    d,bags,name = trained
    shutil.copytree(d/'run', tmp_path/'run', ignore=shutil.ignore_patterns('figures'))
    for f in (tmp_path/'run').glob('fold_*/model.safetensors'): f.unlink()
    for f in (lambda: write_heatmap(tmp_path/'run', d/f'{name}.tiff', bags), lambda: write_exports(tmp_path/'run', d/f'{name}.tiff', bags), lambda: occlusion(tmp_path/'run', bags[name])):
        with pytest.raises(CrossFusionError, match='model.safetensors: expected a trained fold'): f()
    assert not list((tmp_path/'run').rglob('*.png'))


@pytest.mark.skipif(not real.exists(), reason='real slide not at hand')
def test_real_slide(tmp_path):
    "Maps, polygons and overlay of a scanned slide lie where its patches lie"
    with Slide(real) as s:
        g = patch_grid(s, tissue_mask(s.thumbnail()), patch_px=128)
        bag = Bag(s.name, {m: np.zeros((len(c),1)) for m,c in g.coords.items()}, dict(g.coords), 'none', s.width, s.height, s.mpp, 128)
        seen = dict(final={10: np.array([255 - s.read(x, y, 10, 128).mean() for x,y in bag.coords[10]])})
        fig = heatmap_figure(s, bag, seen, max_px=300, insets=3)
        fig.savefig(tmp_path/'a.png'); plt.close(fig)
        write_overlay(tmp_path/'o.tiff', s, bag, seen['final'][10], 10, shrink=1)
        for f in json.loads(write_geojson(tmp_path/'a.geojson', bag, seen).read_text())['features']:
            m,row = (int(f['properties']['metadata'][k]) for k in ('magnification','row'))
            corner,side = np.array(f['geometry']['coordinates'][0][0]), np.ptp(np.array(f['geometry']['coordinates'][0]), 0)
            assert corner.tolist() == bag.coords[m][row].tolist() and side == pytest.approx(128*10/m/s.mpp, abs=.02)
        with openslide.OpenSlide(tmp_path/'o.tiff') as o:
            assert o.dimensions == (s.width,s.height) and float(o.properties['openslide.mpp-x']) == pytest.approx(s.mpp, rel=1e-4)
            row = strongest(bag, seen['final'][10], 10, 1)[0]
            x,y = (bag.coords[10][row] + bag.patch_px_level0(10)/2).astype(int)
            assert np.array(o.read_region((x,y), 0, (1,1)))[0,0].tolist() == [252,253,191,255]       # the last colour of magma
