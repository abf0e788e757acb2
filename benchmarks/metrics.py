"""How long does judging 100,000 patients take?

Simulated predictions of five folds with censoring and ties; each number beside that of lifelines or scikit-survival for the same
thing where they have it, one after the other in one process.

    python benchmarks/metrics.py               # two minutes
    python benchmarks/metrics.py --n 10000     # fewer patients
"""
import argparse, tempfile, time

import numpy as np
import pandas as pd
from crossfusion.core import rng, versions, write_json
from crossfusion.survival.censoring import auc_at, brier_at, uno_c
from crossfusion.survival.evaluation import evaluate
from crossfusion.survival.metrics import c_index, c_index_table, compare, logrank_split
from lifelines.utils import concordance_index


def predictions(n, skill):
    "A table of five folds; follow-up in whole months, so that many share a day"
    gen = rng(0, 'benchmark', skill)
    true = rng(0, 'benchmark').normal(size=n)
    died, lost = rng(1, 'benchmark').exponential(40*np.exp(-true)), rng(2, 'benchmark').uniform(0, 120, n)
    t = pd.DataFrame(dict(patient=np.arange(n).astype(str), fold=np.arange(n) % 5, duration=np.ceil(np.minimum(died, lost)), event=died <= lost,
                          risk=skill*true + gen.normal(size=n), t1=10., t2=20., t3=40.))
    s = np.exp(-np.outer(np.exp(t.risk/2), [10, 20, 40])/40)
    return t.assign(s1=s[:, 0], s2=s[:, 1], s3=s[:, 2])


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=100_000, help='patients')
    ap.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    args = ap.parse_args()
    from sksurv.metrics import brier_score
    a, b, found = predictions(args.n, 1.), predictions(args.n, .5), {}
    y = a.duration.values, a.event.values, a.risk.values
    structured = np.array(list(zip(a.event, a.duration)), dtype=[('e', bool), ('t', float)])
    times, s = [10., 20., 40.], a[['s1', 's2', 's3']].to_numpy()
    work = {"Harrell's C": (lambda: c_index(*y), lambda: concordance_index(a.duration, -a.risk, a.event)),
            "Uno's C": (lambda: uno_c(*y, tau=100), None),
            'AUC at three times': (lambda: auc_at(*y, times), None),
            'Brier score at three times': (lambda: brier_at(*y[:2], s, times), lambda: brier_score(structured, structured, s, times)),
            'log-rank of a split': (lambda: logrank_split(a), None),
            "Harrell's C in folds, 100 resamples": (lambda: c_index_table(a, 100), None),
            'two models compared, 100 resamples': (lambda: compare(a, b, 100), None),
            'everything, 100 resamples': (lambda: evaluate(a, n_boot=100), None)}
    logrank_split(a[:100])          # imports
    for what, (ours, theirs) in work.items():
        def seconds(f):
            start = time.perf_counter(); f()
            return time.perf_counter() - start
        r = found[what] = dict(seconds=seconds(ours), other=seconds(theirs) if theirs else None)
        print(f"{what}: {r['seconds']:.2f} s" + (f", {r['other']/r['seconds']:.1f} times as fast as the other library" if theirs else ''), flush=True)
    out = args.out or f'{tempfile.mkdtemp()}/metrics.json'
    write_json(out, dict(n=args.n, versions=versions(('crossfusion', 'numpy', 'pandas', 'lifelines', 'scikit-survival')), results=found))
    print(out)


if __name__ == '__main__': main()
