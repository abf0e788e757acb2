"""Twelve models on one cohort: who ranks patients best?

Simulated bags, all models shrunk to about 64 numbers a patch (`registry.small`), default recipe, nested protocol, the same five folds. The signal is
in the 20x patches, in the 5x patches, in their coincidence (cross), or, with blca, behind the real follow-up of TCGA bladder cancer on its published
folds (the table and the folds are asked for; the bags are simulated, and their hidden risk explains 80 % of the follow-up).

    python benchmarks/table1.py cross --n 200 --work runs/cross          # an hour on one core; run again to go on after a stop
    python benchmarks/table1.py blca --table tcga_blca_all_clean.csv.zip --splits splits/tcga_blca --work runs/blca
"""
import argparse, tempfile

from crossfusion.core import versions, write_json
from crossfusion.data.cohort import read_cohort, read_splits
from crossfusion.models.registry import TABLE_1, small
from crossfusion.simulate.bags import simulate_cohort
from crossfusion.survival.metrics import c_index_table
from crossfusion.training.benchmark import as_markdown, benchmark
from crossfusion.training.learner import recipe_named


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('cohort', nargs='?', default='cross', choices=('20x', '5x', 'cross', 'blca'))
    ap.add_argument('--n', type=int, default=200, help='patients')
    ap.add_argument('--seed', type=int, default=2)
    ap.add_argument('--epochs', type=int, default=15, help='passes over the training patients')
    ap.add_argument('--models', nargs='*', default=TABLE_1)
    ap.add_argument('--table', default='', help='with blca: the clinical table')
    ap.add_argument('--splits', default='', help='with blca: the folder of published folds')
    ap.add_argument('--workers', type=int, default=1, help='folds trained side by side')
    ap.add_argument('--work', default='', help='folder of the runs; default a temporary one')
    ap.add_argument('--costs', action='store_true', help='measure seconds and memory of the shrunk models, too: on a quiet machine')
    ap.add_argument('--out', default='', help='JSON file to write; default in the folder of the runs')
    args = ap.parse_args()
    work, folds, options = args.work or tempfile.mkdtemp(), None, dict(signal=args.cohort, seed=args.seed)
    if args.cohort == 'blca':
        followup = read_cohort(args.table)
        options, folds = dict(signal='cross', seed=args.seed, followup=followup), read_splits(args.splits, followup)
    table, bags = simulate_cohort(args.n, **options)
    t = benchmark(table, bags, work, args.models, {m: small(m) for m in args.models}, reference='crossfusion', costs=args.costs, folds=folds,
                  recipe=recipe_named('default', n_epoch=args.epochs), seed=args.seed, n_workers=args.workers)
    print(as_markdown(t))
    write_json(args.out or f'{work}/table1.json', dict(cohort=args.cohort, patients=int(table.patient.nunique()), deaths=int(table.drop_duplicates('patient').event.sum()),
               seed=args.seed, epochs=args.epochs, versions=versions(('crossfusion', 'torch', 'fastai')), results=t.astype(object).where(t.notna(), None).to_dict('records')))


if __name__ == '__main__': main()
