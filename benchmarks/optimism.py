"""What is a C-index worth whose epoch was chosen on the patients it is reported for?

Cohorts in which nothing can be found: simulated bags with the outcomes of other patients. Gated attention, 5 folds, the same recipe
by the nested and by the published protocol, epoch chosen by C-index in both.

    python benchmarks/optimism.py              # 20 cohorts of 100 patients, a quarter of an hour on 2 cores
    python benchmarks/optimism.py --seeds 3    # fewer
"""
import argparse, os, tempfile
from pathlib import Path

from crossfusion.core import versions, write_json
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.training.crossval import cross_validate, optimism
from crossfusion.training.learner import recipe_named
from signal_cross import shuffled


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=100, help='patients in a cohort')
    ap.add_argument('--seeds', type=int, default=20, help='cohorts')
    ap.add_argument('--n_epoch', type=int, default=15, help='passes over the training patients')
    ap.add_argument('--n_workers', type=int, default=os.cpu_count(), help='folds side by side')
    ap.add_argument('--out', default='', help='folder for the runs; default a temporary one')
    args = ap.parse_args()
    out, rows = Path(args.out or tempfile.mkdtemp()), []
    recipe = recipe_named(n_epoch=args.n_epoch, lr=1e-3, choose='c_index')
    for seed in range(args.seeds):
        table, bags = simulate_cohort(args.n, '20x', seed=100+seed)
        table, row = shuffled(table, seed), dict(seed=seed)
        for protocol in ('nested', 'published'):
            m = cross_validate(table, bags, out/f'{seed}'/protocol, 'amil', protocol=protocol, recipe=recipe, seed=seed, n_workers=args.n_workers, embed_dim=32)
            row[protocol] = {k: m['c_index'][k] for k in ('value', 'low', 'high')}
        rows.append(row | dict(optimism=optimism(out/f'{seed}'/'nested')['difference']))
        print(', '.join(f"{p} {row[p]['value']:.3f} ({row[p]['low']:.3f} to {row[p]['high']:.3f})" for p in ('nested', 'published')), flush=True)
        write_json(out/'optimism.json', dict(n=args.n, n_epoch=args.n_epoch, versions=versions(), cohorts=rows))
    covers = sum(r['nested']['low'] <= .5 <= r['nested']['high'] for r in rows)
    print(f"nested: interval covers 0.5 in {covers} of {len(rows)}; published: mean {sum(r['published']['value'] for r in rows)/len(rows):.3f}")
    print(out/'optimism.json')


if __name__ == '__main__': main()
