"""Do the maps of a trained model find the region that carries the risk, and how long does the largest slide take to draw?

CrossFusion in true places is trained on the slides of `crossfusion_demo` (five folds, 25 passes); every slide is then judged by the
model that never saw its patient. Region: the fifth of a slide's patches with most atypical nuclei in tumour, as the painter placed them.
Enrichment of 2 means that the top tenth of a map holds twice as much of the region as chance would. The demo's own runs stand beside it.

    python benchmarks/heatmap.py                        # a quarter of an hour on two cores, after the demo
    python benchmarks/heatmap.py --part draw            # the largest slide alone: a minute
"""
import argparse, json, resource, subprocess, sys, tempfile, time, types
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
from crossfusion.bag import Bag
from crossfusion.core import RunFolder, progress, read_json, rng, versions, write_text
from crossfusion.simulate.slides import CELL, plan_slide

N = 137_990  # 20x patches of the largest slide of TCGA's six cohorts


def largest():
    "A stand-in for that slide, and a bag of its patches: tissue of a random outline, 5x and 10x to match"
    k = int(np.ceil(N**.5/4*1.2))
    y, x = np.mgrid[:k, :k]
    order = np.argsort(np.hypot(x - k/2, y - k/2) + 3*rng(0, 'outline').normal(size=(k, k)), axis=None)[:-(-N//16)]
    cells, coords = np.stack([order % k, order//k], 1), {}
    for m, f in ((5, 1), (10, 2), (20, 4)):
        inside = np.stack(np.meshgrid(range(f), range(f)), -1).reshape(-1, 2)
        coords[m] = ((cells[:, None]*f + inside).reshape(-1, 2)*(2048//f))[:N]
    size = k*2048
    slide = types.SimpleNamespace(name='largest', width=size, height=size, mpp=.25, thumbnail=lambda px: np.full((px, px, 3), 240, np.uint8),
                                  read=lambda x, y, mag, px: np.full((px, px, 3), 200, np.uint8))
    return slide, Bag('largest', {m: np.zeros((len(c), 1)) for m, c in coords.items()}, coords, 'none', size, size, .25)


def draw():
    "Seconds and GiB of this process for the largest slide, from attention to files"
    from crossfusion.viz.checks import edge_attention
    from crossfusion.viz.export import top_patches, write_geojson, write_overlay
    from crossfusion.viz.explorer import SlideMaps, map_image, patch_at
    from crossfusion.viz.heatmaps import heatmap_figure
    slide, bag = largest()
    seen = {s: {m: rng(0, s).dirichlet(np.ones(len(bag.coords[m])))} for s, m in (('cross_5x', 5), ('cross_20x', 20), ('pad_10x', 10), ('final', 10))}
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    open_slide = SlideMaps(slide, bag, seen, slide.thumbnail(900))
    out, d = dict(patches={m: len(c) for m, c in bag.coords.items()}, before_gib=peak()), Path(tempfile.mkdtemp())
    for what, f in {'four maps to PNG': lambda: heatmap_figure(slide, bag, seen).savefig(d/'a.png', dpi=150),
                    'smooth': lambda: heatmap_figure(slide, bag, seen, smooth=True).savefig(d/'b.png', dpi=150),
                    'edge check': lambda: edge_attention(bag, seen), 'table': lambda: top_patches(bag, seen),
                    'GeoJSON': lambda: write_geojson(d/'a.geojson', bag, seen),
                    'explorer: redraw': lambda: map_image(open_slide, 'cross_20x', 20, .7, 50), 'explorer: click': lambda: patch_at(bag, 20, bag.width/2, bag.height/2),
                    'overlay, 20x': lambda: write_overlay(d/'a.tiff', slide, bag, seen['cross_20x'][20], 20)}.items():
        start = time.perf_counter(); f()
        out[what] = dict(seconds=round(time.perf_counter() - start, 2), peak_gib=round(peak(), 2))
    return out | dict(geojson_mib=round((d/'a.geojson').stat().st_size/2**20, 1), overlay_mib=round((d/'a.tiff').stat().st_size/2**20, 1))


def atypical_nuclei(demo, slide):
    "How many atypical nuclei of the tumour each map cell of a simulated slide holds"
    s, row = read_json(demo/'slides/slides.json'), pd.read_csv(demo/'slides/cohort.csv', float_precision='round_trip').set_index('slide').loc[slide]
    plan = plan_slide(row.tumour, row.atypia, row.atypia_outside, slide, s['seed'], s['size'])
    nuclei, (x, y) = np.zeros(plan.tissue.shape), (plan.xy[plan.atypical & plan.in_tumour]/CELL).astype(int).T
    np.add.at(nuclei, (y, x), 1)
    return nuclei


def judge(run, demo, bags, with_occlusion=False):
    "Enrichment of each map of a run: mean over slides, with a bootstrap interval"
    from crossfusion.training.crossval import attention, own_folds
    from crossfusion.viz.checks import enrichment, mean_in_patches, occlusion
    found = {}
    for slide in progress(list(own_folds(run)), f'judging {run.path.name}', unit='slide'):
        bag, nuclei = bags[slide], atypical_nuclei(demo, slide)
        maps = {f'{s} {m}x': (x, m) for s, of in attention(run, bag).items() for m, x in of.items()}
        if with_occlusion:
            regions, change = occlusion(run, bag)
            maps['occlusion 5x'] = change[regions.rows[5]], 5
        for name, (scores, m) in maps.items():
            dense = mean_in_patches(nuclei, bag, m)
            region = np.argsort(np.argsort(-dense, kind='stable'), kind='stable') < round(.2*len(dense))
            found.setdefault(name, []).append(enrichment(scores, region))
    def line(x):
        boot = np.asarray(x)[rng(0, 'boot').integers(len(x), size=(2000, len(x)))].mean(1)
        return dict(zip(('enrichment', 'low', 'high'), np.round([np.mean(x), *np.percentile(boot, (2.5, 97.5))], 2).tolist()), slides=len(x))
    return {name: line(x) for name, x in found.items()}


def maps_of(run, bag):
    "What the notebook needs to draw a slide's maps"
    from crossfusion.training.crossval import attention
    from crossfusion.viz.checks import occlusion
    short = lambda x: [float(f'{o:.4g}') for o in x]
    seen, (_, change) = attention(run, bag), occlusion(run, bag)
    return dict(slide=bag.slide, width=bag.width, height=bag.height, mpp=bag.mpp, patch_px=bag.patch_px, coords={m: c.tolist() for m, c in bag.coords.items()},
                attention={s: {m: short(x) for m, x in of.items()} for s, of in seen.items()}, occlusion=short(change))


def train_and_judge(demo, out):
    "Train, judge every slide, keep the maps of one simulated and one real slide"
    from crossfusion.data.bags import open_bags
    from crossfusion.data.cohort import make_folds, read_cohort
    from crossfusion.training.crossval import cross_validate
    from crossfusion.training.learner import recipe_named
    from crossfusion.wsi.extract import extract
    bags, cohort, run = open_bags(demo/'bags'), read_cohort(demo/'slides/cohort.csv'), RunFolder(out)
    metrics = cross_validate(cohort, bags, out, 'crossfusion', make_folds(cohort, 5, 0), 'fixed', recipe_named(n_epoch=25), embed_dim=64, layout='grid')
    found = dict(c_index={k: round(metrics['c_index'][k], 3) for k in ('value', 'low', 'high', 'n')},
                 crossfusion_grid=judge(run, demo, bags, True), **{name: judge(RunFolder(demo/name), demo, bags) for name in ('crossfusion', 'amil')})
    print(json.dumps(found, indent=1), flush=True)
    worst = pd.read_csv(run/'predictions.csv', dtype={'patient': str}).sort_values('risk').patient.iloc[-1]   # by rule, not by looks
    row = pd.read_csv(demo/'slides/cohort.csv', float_precision='round_trip').query('patient == @worst').iloc[0]
    s = read_json(demo/'slides/slides.json')
    example = maps_of(run, bags[row.slide]) | dict(plan=dict(slide=row.slide, seed=s['seed'], size=s['size'], **{k: float(row[k]) for k in ('tumour', 'atypia', 'atypia_outside')}))
    real = Path(__file__).parents[2]/'shared/data/slides/CMU-1-Small-Region.svs'
    if real.exists():
        folder = Path(tempfile.mkdtemp())
        extract([real], folder, patch_px=128, input_px=128, n_workers=1)
        real = maps_of(run, open_bags(folder)[real.stem])
    else: real = None
    return dict(found=found, example=example, real=real)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--demo', type=Path, default='crossfusion_demo', help='folder of a finished crossfusion_demo')
    ap.add_argument('--run', default='', help='run folder, gone on with if it is there; default in the demo')
    ap.add_argument('--part', default='', choices=['', 'draw'], help='draw: the largest slide alone')
    ap.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    args = ap.parse_args()
    if args.part: return print(json.dumps(draw()))
    drawn = subprocess.run([sys.executable, __file__, '--part', 'draw'], capture_output=True, text=True, check=True)    # a process of its own: its peak is drawing's
    if not (args.demo/'report.html').exists():
        from crossfusion.demo import run_demo
        run_demo(args.demo)
    result = dict(versions=versions(), drawing=json.loads(drawn.stdout)) | train_and_judge(args.demo, args.run or args.demo/'heatmap')
    print(json.dumps(result['drawing'], indent=1))
    out = args.out or f'{tempfile.mkdtemp()}/heatmap.json'
    write_text(out, '{' + ',\n'.join(f'"{k}": {json.dumps(v)}' for k, v in result.items()) + '}\n')
    print(out)


if __name__ == '__main__': main()
