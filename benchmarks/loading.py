"""How fast do bags come from disk?

Slides of the mean size in TCGA (17,850 patches at three magnifications, 2,048 features), page cache warm: an epoch over our bag files
by `patient_loader`, beside three float32 .pt files a slide by `torch.load`, as the published program reads them; alternating, in one process.
Then how long a folder of 1,000 slides takes to open, and whether memory grows over epochs.

    python benchmarks/loading.py               # two minutes, 2 GB of temporary files
    python benchmarks/loading.py --slides 2    # fewer slides
"""
import argparse, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil, torch
from crossfusion.bag import Bag, write_bag
from crossfusion.core import rng, versions, write_json
from crossfusion.data.bags import open_bags
from crossfusion.data.loaders import patient_loader


def bag(slide, n_coarse, n_features):
    "A nested bag on a square raster"
    features, coords, side = {}, {}, int(np.ceil(n_coarse**.5))
    cell = np.arange(n_coarse)
    for m in (5, 10, 20):
        k = m//5
        within = np.stack(np.meshgrid(np.arange(k), np.arange(k)), -1).reshape(1, -1, 2)
        coords[m] = (np.stack([cell % side, cell//side], 1)[:, None]*k + within).reshape(-1, 2)*5120//m
        features[m] = rng(0, slide, m).standard_normal((len(coords[m]), n_features), dtype=np.float32).astype(np.float16)
    return Bag(slide, features, coords, 'none', side*1024, side*1024, .5)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--slides', type=int, default=8, help='large slides')
    ap.add_argument('--rounds', type=int, default=5, help='epochs of each kind')
    ap.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp, names = Path(tmp), [f'S{i}' for i in range(args.slides)]
        for s in names:
            b = bag(s, 850, 2048)
            write_bag(tmp/'bags'/f'{s}.h5', b)
            for m, f in b.features.items():
                (tmp/f'x{m}').mkdir(exist_ok=True)
                torch.save(torch.from_numpy(f).float(), tmp/f'x{m}'/f'{s}.pt')
        n = sum(len(f) for f in b.features.values())
        table = pd.DataFrame(dict(patient=names, slide=names, duration=np.arange(1., 1 + len(names)), event=True))
        bags, cuts = open_bags(tmp/'bags'), [0, 2, 4, 6, np.inf]

        def ours(widen=False):
            for (features, _), _ in patient_loader(table, bags, names, cuts):
                if widen: [f.float() for f in features.values()]
        def theirs():
            for s in names: [torch.load(tmp/f'x{m}'/f'{s}.pt', weights_only=True) for m in (5, 10, 20)]
        def seconds(f):
            start = time.perf_counter(); f()
            return time.perf_counter() - start

        work = {'three .pt files by torch.load': theirs, 'bag file, float16 as delivered': ours, 'bag file, widened to float32': lambda: ours(True)}
        for f in work.values(): f()                                   # the page cache is warm from here on
        times, memory, me = {k: [] for k in work}, [], psutil.Process()
        for _ in range(args.rounds):
            for k, f in work.items(): times[k].append(seconds(f))
            memory.append(me.memory_info().rss)
        base = np.median(times['three .pt files by torch.load'])
        rows = {k: dict(slides_per_second=len(names)/np.median(t), times_faster=base/np.median(t)) for k, t in times.items()}
        for k, r in rows.items(): print(f"{k}: {r['slides_per_second']:.1f} slides a second, {r['times_faster']:.1f} times as fast", flush=True)
        for i in range(1000): write_bag(tmp/'many'/f'M{i:04}.h5', bag(f'M{i:04}', 1, 4))
        opening = min(seconds(lambda: open_bags(tmp/'many')) for _ in range(3))
        print(f'1,000 slides open in {opening:.2f} s; memory after each round, GiB: {[round(m/2**30, 2) for m in memory]}')
    out = args.out or f'{tempfile.mkdtemp()}/loading.json'
    write_json(out, dict(patches=n, slides=args.slides, versions=versions(('crossfusion', 'torch', 'h5py', 'numpy')), results=rows, seconds_to_open_1000=opening,
                         memory_growth_gib=(memory[-1] - memory[0])/2**30))
    print(out)


if __name__ == '__main__': main()
