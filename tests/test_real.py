"Real slides and real follow-up, by the shell, as a user would"
import json

import pandas as pd, pytest
from conftest import root

data = root.parent/'shared'/'data'
blca = data/'tcga'/'tcga_blca_all_clean.csv.zip'
region = data/'slides'/'CMU-1-Small-Region.svs'


def ok(shell, *args, cwd=None):
    r = shell.run(shell.command(*args), cwd=cwd)
    assert r.returncode == 0, r.stderr
    return r.stdout


@pytest.mark.skipif(not region.exists(), reason=f'{region.name} is not there')
def test_real_slide_to_prediction_and_heatmap(shell, quick_demo, tmp_path):
    "A scanned slide goes through extraction, the demo's trained model and a heatmap"
    ok(shell, 'crossfusion_extract', region, tmp_path/'bags', '--patch_px', 128, '--input_px', 128, '--n_workers', 1)
    log = pd.read_csv(tmp_path/'bags'/'extract.csv')
    assert log.status.tolist() == ['done'] and log.n20[0] == 4*log.n10[0] == 16*log.n5[0] > 0
    assert abs(log.mpp[0] - .499) < 1e-6
    ok(shell, 'crossfusion_predict', quick_demo/'crossfusion', tmp_path/'bags', '--out', tmp_path/'new.csv')
    p = pd.read_csv(tmp_path/'new.csv')
    assert p.slide.tolist() == [region.stem] and p.folds[0] == 2
    assert -4 < p.risk[0] < 0 and (p[['s1','s2','s3','s4']].diff(axis=1).iloc[0, 1:] < 0).all()
    ok(shell, 'crossfusion_predict', quick_demo/'crossfusion', tmp_path/'bags', '--fast', '--out', tmp_path/'fast.csv')
    assert abs(pd.read_csv(tmp_path/'fast.csv').risk[0] - p.risk[0]) < .02
    ok(shell, 'crossfusion_heatmap', quick_demo/'crossfusion', region, tmp_path/'bags', '--out', tmp_path/'map.png')
    from PIL import Image
    assert Image.open(tmp_path/'map.png').size[0] > 400


@pytest.mark.skipif(not region.exists(), reason=f'{region.name} is not there')
def test_bag_of_another_kind_is_refused(shell, quick_demo, tmp_path):
    "Patches of another size than the model learned from"
    ok(shell, 'crossfusion_extract', region, tmp_path/'bags', '--patch_px', 256, '--input_px', 128, '--n_workers', 1)
    r = shell.run(shell.command('crossfusion_predict', quick_demo/'crossfusion', tmp_path/'bags'))
    assert r.returncode == 2 and 'expected patch_px 128, found 256' in r.stderr and 'Traceback' not in r.stderr


published = data/'published'/'predictions.csv.gz'

@pytest.mark.skipif(not published.exists(), reason='the published predictions are not there')
def test_published_predictions(shell):
    "Fold by fold the C-index that was published, to the last digit"
    said = json.loads(ok(shell, 'crossfusion_evaluate', '--predictions', published, '--json'))
    ours = [f['c_index'] for model in said.values() for f in model['folds']]
    known = pd.read_csv(published.with_name('val_cindex.csv')).sort_values(['repo', 'cohort', 'model', 'fold']).val_cindex
    assert len(ours) == len(known) == 75 and max(abs(a - b) for a,b in zip(ours, known)) < 1e-12


@pytest.mark.skipif(not blca.exists(), reason='the TCGA-BLCA table is not there')
def test_real_followup_and_published_folds(shell, tmp_path):
    "Bags on the follow-up of TCGA-BLCA, trained on its published folds: predictions, metrics and curves for all 373 patients"
    said = ok(shell, 'crossfusion_simulate', tmp_path/'bags', '--signal', '20x', '--followup', blca, '--explained', .9)
    assert '373 patients, 437 slides' in said
    run = tmp_path/'run'
    ok(shell, 'crossfusion_train', tmp_path/'bags'/'cohort.csv', tmp_path/'bags', run, '--splits', data/'tcga'/'splits'/'tcga_blca',
       '--model', 'amil', '--embed_dim', 32, '--n_epoch', 2, '--n_workers', 2)
    p = pd.read_csv(run/'predictions.csv')
    assert len(p) == p.patient.nunique() == 373
    for k in range(5):
        val = pd.read_csv(data/'tcga'/'splits'/'tcga_blca'/f'splits_{k}.csv').val.dropna()
        assert set(p.patient[p.fold == k]) == set(val)
    real = pd.read_csv(blca, usecols=['case_id','survival_months','censorship']).drop_duplicates('case_id').set_index('case_id')
    assert (p.set_index('patient').duration == real.survival_months.loc[p.patient]).all()
    assert (p.event.to_numpy() == (real.censorship.loc[p.patient] == 0).to_numpy()).all()
    from crossfusion.core import read_json
    m = read_json(run/'metrics.json')
    assert m['n_scored'] == m['n_expected'] == 373 and m['c_index']['low'] > .55
    assert m['truth']['value'] > m['c_index']['value']
    ok(shell, 'crossfusion_report', run)
    assert (run/'report.html').stat().st_size > 50_000 and list((run/'figures').glob('kaplan_meier.png'))
