"What is reported about a predictions table, against scikit-survival and lifelines, fold by fold, and on the oddest tables"
import json, warnings
import numpy as np, pandas as pd, pytest
from lifelines import KaplanMeierFitter
from sksurv.metrics import brier_score, concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.nonparametric import CensoringDistributionEstimator
from sksurv.util import Surv
from crossfusion.core import CrossFusionError, read_json, rng, write_json
from crossfusion.survival.added_value import added_value, covariates, likelihood_ratio
from crossfusion.survival.censoring import calibration_at
from crossfusion.survival.evaluation import auc_table, brier_table, calibration_table, evaluate, judged_until, sight_ends, survival_at, uno_c_table
from crossfusion.survival.metrics import c_index_table, check_predictions

NEW = ('uno_c', 'auc', 'brier', 'integrated_brier', 'calibration')


def predictions(n=200, folds=1, seed=0, ties=True, censoring=60):
    "Noisy predictions with edges; durations in whole months and risks in steps of a half, so that both have ties"
    g = rng(seed, 'test', n, folds)
    z = g.normal(size=n)
    died, lost = g.exponential(30*np.exp(-z)), g.uniform(0, censoring, n)
    d, risk = np.minimum(died, lost), z + g.normal(size=n)
    if ties: d, risk = np.ceil(d), (2*risk).round()/2
    t = pd.DataFrame(dict(patient=[f'P{i}' for i in range(n)], fold=np.arange(n) % folds, duration=d, event=died <= lost, risk=risk))
    t.loc[0, ['duration', 'event']] = 0., False                             # lost at once: so that scikit-survival judges from 0 on
    edges = np.quantile(t.duration[t.event], [.25, .5, .75])[None] + t.fold.to_numpy()[:, None]/4
    s = np.exp(-edges*np.exp(.5*t.risk.to_numpy()[:, None])/30)
    return check_predictions(t.assign(**{f't{k+1}': edges[:, k] for k in range(3)}, **{f's{k+1}': s[:, k] for k in range(3)}, s4=s[:, 2]/2))


def surv(t): return Surv.from_arrays(t.event, t.duration)


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('n', [60, 400])
def test_one_fold_as_scikit_survival(n, seed):
    t = predictions(n, seed=seed)
    m = evaluate(t, n_boot=5)
    y, tau = surv(t), sight_ends(t)
    assert tau == t.duration.max()
    assert abs(m['uno_c']['value'] - concordance_index_ipcw(y, y, t.risk, tau=tau)[0]) < 1e-10
    times = [a['time'] for a in m['auc']]
    assert np.allclose([a['value'] for a in m['auc']], cumulative_dynamic_auc(y, y, t.risk, times)[0], atol=1e-10, rtol=0)
    at = np.array([b['time'] for b in m['brier']])
    s, i = survival_at(t, at), m['integrated_brier']
    assert np.allclose([b['value'] for b in m['brier']], brier_score(y, y, s, at)[1], atol=1e-10, rtol=0)
    assert abs(i['value'] - integrated_brier_score(y, y, s, at)) < 1e-10
    km = np.tile(KaplanMeierFitter().fit(t.duration, t.event).predict(at), (n, 1))
    assert np.allclose([b['reference'] for b in m['brier']], brier_score(y, y, km, at)[1], atol=1e-10, rtol=0)
    assert abs(i['reference'] - integrated_brier_score(y, y, km, at)) < 1e-10


@pytest.mark.parametrize('seed', range(3))
def test_folds_take_censoring_from_outside(seed):
    "Weights of each fold by scikit-survival from the patients outside it; pairs one by one; Brier scores of folds averaged by patients"
    t = predictions(120, 3, seed)
    tau, end = sight_ends(t), judged_until(t)
    assert tau == min(t.duration[t.fold != k].max() for k in range(3)) and end == t.t3.min()
    at = np.array([b['time'] for b in brier_table(t, n_boot=1)['brier']])
    right = pairs = won = judged = 0.
    scores, average = [], []
    time = auc_table(t, n_boot=1)[1]['time']
    for k in range(3):
        here, rest = t[t.fold == k], t[t.fold != k]
        seen = CensoringDistributionEstimator().fit(surv(rest))
        early = here[here.event & (here.duration < tau)]
        for a, w in zip(early.itertuples(), seen.predict_ipcw(surv(early))):
            later = here[(here.duration > a.duration) | ((here.duration == a.duration) & ~here.event)]
            ok = (later.risk < a.risk) + .5*(later.risk == a.risk)
            right += w**2*ok.sum(); pairs += w**2*len(later)
            if a.duration <= time: won += w*ok[later.duration > time].sum(); judged += w*(later.duration > time).sum()
        inside = at[(at >= here.duration.min()) & (at < here.duration.max())]
        assert len(inside) > 15
        score = dict(zip(inside, brier_score(surv(rest), surv(here), survival_at(here, inside), inside)[1]))
        km = np.tile(KaplanMeierFitter().fit(rest.duration, rest.event).predict(inside), (len(here), 1))
        scores.append(pd.Series(score)); average.append(pd.Series(dict(zip(inside, brier_score(surv(rest), surv(here), km, inside)[1]))))
    assert abs(uno_c_table(t, 1)['value'] - right/pairs) < 1e-10
    assert abs(auc_table(t, n_boot=1)[1]['value'] - won/judged) < 1e-10
    ours = pd.DataFrame(brier_table(t, n_boot=1)['brier']).set_index('time')
    for column, theirs in (('value', scores), ('reference', average)):
        theirs = pd.concat(theirs, axis=1).dropna().mean(axis=1)             # folds of equal size
        assert len(theirs) > 15 and np.allclose(ours[column].loc[theirs.index], theirs, atol=1e-10, rtol=0)


def test_calibration_as_lifelines():
    t = predictions(400, 4).sort_values('patient', ignore_index=True)        # ties are broken by name
    rows = pd.DataFrame(calibration_table(t, 5))
    s = survival_at(t, rows.time[0])[:, 0]
    order = np.argsort(s, kind='stable')
    for row, group in zip(rows.itertuples(), np.array_split(order, 5)):
        km = KaplanMeierFitter().fit(t.duration[group], t.event[group])
        low, high = km.confidence_interval_.loc[:row.time].iloc[-1]
        assert np.allclose([row.n, row.predicted, row.observed, row.low, row.high], [len(group), s[group].mean(), km.predict(row.time), low, high], atol=1e-9)


@pytest.mark.parametrize('s,first,last', [(.5, False, (0, 1)), (1., True, (0, 0))])
def test_groups_without_information(s, first, last):
    "All lost before the time, or all dead: limits stay between 0 and 1, and intervals hold what was observed"
    c = calibration_at([3., 3, 3, 3], [first]*4, [s]*4, 6, n_groups=2)
    assert ((c.low <= c.observed) & (c.observed <= c.high) & (c.low >= 0) & (c.high <= 1)).all()
    assert (c.low == 0).all() and (c.high > .8).all()


def odd_tables():
    t = predictions(60, 3)
    yield 'a fold without deaths', t.assign(event=t.event & (t.fold != 1))
    yield 'one fold', predictions(60)
    yield 'two patients', predictions(60)[:2].assign(duration=[4., 9], event=[True, False])
    yield 'one death', t.assign(event=t.index == t.duration.sort_values().index[20])
    yield 'all died', t.assign(event=True, duration=t.duration + 1)
    yield 'all durations equal', t.assign(duration=12.)
    yield 'equal risks', t.assign(risk=1.)
    yield 'repeats', pd.concat([t, t.assign(fold=(t.fold + 1) % 3 + 3)], ignore_index=True)
    yield 'everybody in each fold', pd.concat([t, t.assign(fold=t.fold*0 + 7)], ignore_index=True)
    yield 'no edges', t.drop(columns=['t1', 't2', 't3'])
    yield 'two bins', t.drop(columns=['t2', 't3', 's3', 's4'])
    yield 'edges past the follow-up', t.assign(t3=500.)
    yield 'words for folds', t.assign(fold='fold ' + t.fold.astype(str))


@pytest.mark.parametrize('name,t', list(odd_tables()), ids=lambda o: o if isinstance(o, str) else '')
def test_odd_tables(name, t, tmp_path):
    "Every new key is None or made of plain numbers; it survives a file; no warning is given"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = evaluate(t, n_boot=30)
    json.dumps({k: m[k] for k in NEW}, allow_nan=False)
    write_json(tmp_path/'m.json', m)
    again = read_json(tmp_path/'m.json')
    assert {k: again[k] for k in NEW} == {k: m[k] for k in NEW}
    for k in ('uno_c', 'integrated_brier'):
        if m[k]: assert m[k]['low'] is None or m[k]['low'] <= m[k]['high']
    for a in m['auc']: assert a['value'] is None or 0 <= a['value'] <= 1
    for k in ('brier', 'integrated_brier', 'calibration'):                  # equal durations end before the first edge
        assert m[k] is not None or name in ('no edges', 'all durations equal', 'two patients'), k


def test_what_odd_tables_say():
    tables = dict(odd_tables())
    equal = evaluate(tables['all durations equal'], n_boot=5)
    assert equal['uno_c'] is None and equal['auc'][0]['value'] is None
    died = evaluate(tables['all died'], n_boot=5)
    t = tables['all died']
    late = t.duration < sight_ends(t)
    assert abs(died['uno_c']['value'] - c_index_table(t.assign(event=late), 1)['value']) < 1e-12    # no weights but 1; deaths past tau outlive
    past = brier_table(tables['edges past the follow-up'], n_boot=5)['integrated_brier']
    assert past['end'] < sight_ends(tables['edges past the follow-up'])
    assert evaluate(tables['equal risks'], n_boot=5)['uno_c']['value'] == .5
    assert evaluate(tables['two patients'], n_boot=5)['calibration'] is None


def test_interval_of_the_brier_difference():
    "Predictions that are the average curve: the difference is small and its interval holds 0 in most cohorts; the truth is better in most"
    better = []
    for seed in range(20):
        t = predictions(150, 3, seed, ties=False)
        better.append(brier_table(t.assign(**{f's{k}': np.exp(-t[f't{k}']*.045) for k in (1, 2, 3)}), n_boot=200, seed=seed)['integrated_brier']['to_reference'])
    inside = np.mean([d['low'] <= 0 <= d['high'] for d in better])
    assert inside > .5 and max(abs(d['difference']) for d in better) < .05


def test_added_value_is_honest():
    "Of 60 cohorts whose risk is a noisy copy of age few show a difference; the likelihood ratio's p is spread evenly"
    ratio, covered = [], []
    for seed in range(60):
        g = rng(seed, 'null')
        age, n = g.normal(size=90), 90
        died, lost = g.exponential(30*np.exp(-.8*age)), g.uniform(5, 90, n)
        t = pd.DataFrame(dict(patient=[f'P{i}' for i in range(n)], fold=np.arange(n) % 2, duration=np.minimum(died, lost), event=died <= lost, risk=age + g.normal(size=n)))
        clinical = pd.DataFrame(dict(patient=t.patient, age=age))
        ratio.append(likelihood_ratio(check_predictions(t), covariates(clinical)[0])['p'])
        if seed < 8:
            d = added_value(t, clinical, n_boot=200)['difference']
            covered.append(d['low'] <= 0 <= d['high'])
    ratio = np.array(ratio)
    assert (ratio < .05).mean() <= .12 and .4 < ratio.mean() < .6 and np.mean(covered) >= .75


def test_added_value_separated():
    "A column that tells the dead from the living perfectly: a penalty, said, instead of a crash"
    t = predictions(40, 2, ties=False)
    clinical = pd.DataFrame(dict(patient=t.patient, relapse=t.event.map({True: 'yes', False: 'no'}), age=rng(0, 'age').integers(40, 80, 40)))
    a = added_value(t, clinical, n_boot=20)
    assert a['penalizer'] > 0 and [c.split()[0] for c in a['columns']] == ['relapse', 'age']
    json.dumps(a, allow_nan=False)


@pytest.mark.parametrize('change,said', [(lambda c: c.assign(event=1), 'event'), (lambda c: c.assign(age=np.nan), 'column in which patients differ'),
                                         (lambda c: c[:0], 'patients or more'), (lambda c: c[['age']], 'column patient')])
def test_added_value_refuses(change, said):
    t = predictions(40, 2)
    with pytest.raises(CrossFusionError, match=said) as e: added_value(t, change(pd.DataFrame(dict(patient=t.patient, age=np.arange(40.)))))
    assert '\n' not in str(e.value)
