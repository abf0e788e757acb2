"""Does the model find a signal that crosses scales, and does a single-scale baseline not?

400 simulated patients whose risk is the share of atypical cells inside tumour architecture; nested 5-fold cross-validation,
default recipe, per patient. Then the same with shuffled outcomes, where nothing may be found.

    python benchmarks/signal_cross.py --seed 1   # the stored result; the defaults were settled on seed 0
    python benchmarks/signal_cross.py --n 100    # smaller
"""
import argparse, json, os, tempfile, time
from pathlib import Path

from crossfusion.core import rng, versions, write_json
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.training.crossval import cross_validate, metrics_line

MODELS = {'crossfusion': dict(embed_dim=64), 'amil': dict(embed_dim=64)}


def shuffled(table, seed):
    "The same patients and bags, with the outcomes of others"
    p = table.drop_duplicates('patient')[['patient', 'duration', 'event']]
    order = rng(seed, 'shuffle').permutation(len(p))
    new = p.assign(duration=p.duration.to_numpy()[order], event=p.event.to_numpy()[order])
    return table.drop(columns=['duration', 'event', 'true_risk']).merge(new, on='patient')


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=400, help='patients')
    ap.add_argument('--seed', type=int, default=0, help='another seed, another cohort')
    ap.add_argument('--n_workers', type=int, default=os.cpu_count(), help='folds side by side')
    ap.add_argument('--out', default='', help='folder for the runs; default a temporary one')
    args = ap.parse_args()
    out = Path(args.out or tempfile.mkdtemp())
    table, bags = simulate_cohort(args.n, 'cross', seed=args.seed)
    results = {}
    for outcomes, t in (('true', table), ('shuffled', shuffled(table, args.seed))):
        for model, options in MODELS.items():
            start = time.time()
            m = cross_validate(t, bags, out/f'{model}-{outcomes}', model, seed=args.seed, n_workers=args.n_workers, **options)
            print(f'{outcomes} outcomes, {model}: {metrics_line(m)} ({time.time()-start:.0f} s)', flush=True)
            results[f'{model}, {outcomes} outcomes'] = {k: m[k] for k in ('c_index', 'c_index_folds', 'truth')}
            write_json(out/'signal_cross.json', dict(n=args.n, seed=args.seed, versions=versions(), results=results))
    print(out/'signal_cross.json')


if __name__ == '__main__': main()
