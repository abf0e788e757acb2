"""What does a slide of mean TCGA size cost each model of the paper's Table 1?

895 patches at 5x with all that lie in them (3,580 at 10x, 14,320 at 20x), 2,048 features, every model at its full size, random weights, float32.
Parameters, seconds of the best of three passes and the most memory beyond model and features; each model in a fresh process, one after the other.

    python benchmarks/models.py          # some minutes on 2 cores
"""
import argparse

import numpy as np, torch
from joblib.externals.loky import ProcessPoolExecutor

from crossfusion.bag import Bag
from crossfusion.core import MAGS, progress, rng, versions, write_json
from crossfusion.models.registry import TABLE_1, model_named
from crossfusion.training.benchmark import pass_cost

N_FEATURES, SIDE, COARSE = 2048, 32, 895


def mean_slide():
    "A bag of the mean TCGA size, tissue without holes"
    y, x = (o[:COARSE] for o in np.divmod(np.arange(SIDE*SIDE), SIDE))
    coords = {}
    for m in MAGS:
        k = m//5
        within = np.stack(np.meshgrid(range(k), range(k), indexing='xy'), -1).reshape(-1, 2)
        coords[m] = ((np.stack([x, y], 1)[:,None]*k + within).reshape(-1, 2)*(1024//k)).astype(np.int32)
    features = {m: rng(0, 'mean', m).standard_normal((len(c), N_FEATURES), np.float32) for m, c in coords.items()}
    return Bag('mean', features, coords, 'random', SIDE*1024, SIDE*1024, .5)


def measure(name, threads):
    "One model in this process"
    torch.manual_seed(0)
    return pass_cost(model_named(name, n_features=N_FEATURES).eval(), mean_slide(), threads)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--models', nargs='*', default=TABLE_1)
    ap.add_argument('--threads', type=int, default=torch.get_num_threads())
    ap.add_argument('--out', default='benchmarks/out/models.json')
    args, results = ap.parse_args(), {}
    for name in progress(args.models, 'models', unit='model'):
        with ProcessPoolExecutor(1) as fresh: results[name] = fresh.submit(measure, name, args.threads).result()
        print(f"{name:16} {results[name]['parameters']/1e6:6.2f} M  {results[name]['seconds']:7.2f} s  {results[name]['peak_mib']:7.0f} MiB", flush=True)
    write_json(args.out, dict(threads=args.threads, versions=versions(('crossfusion', 'torch')), results=results))


if __name__ == '__main__': main()
