"""What do the layout of the source patches and the form of the residual change?

CrossFusion on simulated patients whose risk shows only where cells and architecture meet; nested 5-fold cross-validation, default
recipe. Each choice against the published one, paired by patient.

    python benchmarks/choices.py            # 200 patients, ten minutes on 2 cores
"""
import argparse, os, tempfile
from pathlib import Path

import pandas as pd
from crossfusion.core import versions, write_json
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.survival.metrics import compare
from crossfusion.training.crossval import cross_validate, metrics_line

CHOICES = {'published': {}, 'true places': dict(layout='grid'), 'pre-norm residual': dict(residual='prenorm')}


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=200, help='patients')
    ap.add_argument('--seed', type=int, default=1, help='another seed, another cohort')
    ap.add_argument('--n_workers', type=int, default=os.cpu_count(), help='folds side by side')
    ap.add_argument('--out', default='', help='folder for the runs; default a temporary one')
    args = ap.parse_args()
    out,results = Path(args.out or tempfile.mkdtemp()), {}
    table,bags = simulate_cohort(args.n, 'cross', seed=args.seed)
    for i,(choice,options) in enumerate(CHOICES.items()):
        m = cross_validate(table, bags, out/f'run-{i}', seed=args.seed, n_workers=args.n_workers, embed_dim=64, **options)
        results[choice] = {k: m[k] for k in ('c_index', 'c_index_folds', 'truth')}
        if i: results[choice]['to_published'] = compare(*(pd.read_csv(out/f'run-{k}'/'predictions.csv') for k in (i, 0)))
        print(f"{choice}: {metrics_line(m)}; to published: {results[choice].get('to_published', '')}", flush=True)
        write_json(out/'choices.json', dict(n=args.n, seed=args.seed, versions=versions(), results=results))
    print(out/'choices.json')


if __name__ == '__main__': main()
