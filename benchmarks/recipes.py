"""Does the default recipe find more than the published one, and in how many passes?

CrossFusion on 400 simulated patients whose risk shows only where cells and architecture meet; nested 5-fold cross-validation on the
same folds, both recipes, paired by patient. A pass over the training patients costs the same in both, so passes are what is counted.

    python benchmarks/recipes.py            # an hour on 2 cores
    python benchmarks/recipes.py --n 100    # smaller
"""
import argparse, os, tempfile, time
from pathlib import Path

import pandas as pd
from crossfusion.core import versions, write_json
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.survival.metrics import compare
from crossfusion.training.crossval import cross_validate, metrics_line

RECIPES = ('default', 'published')


def histories(run):
    "Epoch by epoch, per fold: C-index of the patients that choose, and which epoch was kept"
    tables = [pd.read_csv(p) for p in sorted(run.glob('fold_*/history.csv'))]
    return [dict(c_index=t.c_index.round(4).tolist(), kept=int(t.epoch[t.best].item())) for t in tables]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=400, help='patients')
    ap.add_argument('--seed', type=int, default=1, help='another seed, another cohort; the defaults were settled on seed 0')
    ap.add_argument('--n_workers', type=int, default=os.cpu_count(), help='folds side by side')
    ap.add_argument('--out', default='', help='folder for the runs; default a temporary one')
    args = ap.parse_args()
    out, results = Path(args.out or tempfile.mkdtemp()), {}
    table, bags = simulate_cohort(args.n, 'cross', seed=args.seed)
    for recipe in RECIPES:
        start = time.time()
        m = cross_validate(table, bags, out/recipe, recipe=recipe, seed=args.seed, n_workers=args.n_workers, embed_dim=64)
        results[recipe] = {k: m[k] for k in ('c_index', 'c_index_folds', 'truth')} | dict(folds=histories(out/recipe))
        print(f"{recipe}: {metrics_line(m)}; {time.time()-start:.0f} s, {sum(len(f['c_index']) for f in results[recipe]['folds'])} epochs", flush=True)
    difference = compare(*(pd.read_csv(out/r/'predictions.csv') for r in RECIPES))
    print(f'{RECIPES[0]} - {RECIPES[1]}: {difference}')
    write_json(out/'recipes.json', dict(n=args.n, seed=args.seed, versions=versions(), results=results, difference=difference))
    print(out/'recipes.json')


if __name__ == '__main__': main()
