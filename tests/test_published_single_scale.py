"""AMIL, DSMIL, TransMIL and SCMIL against outputs of the published programs, kept beside the repository; every case that lies there is checked"""
from itertools import cycle

import numpy as np, pytest, torch

from crossfusion.models.attention import toy_batch
from crossfusion.models.scmil import SCMIL, SCMILDensity, density_nll
from crossfusion.models.single_scale import AMIL, DSMIL
from crossfusion.models.transmil import TransMIL
from crossfusion.models.weights import load_published
from golden import Case, close, golden, needs_data, outputs_agree


def cases(model): return sorted(p.stem for p in golden.glob(f'{model}_*.safetensors')) or ['none']


@needs_data
@pytest.mark.parametrize('name', cases('amil'))
def test_amil(name):
    case = Case(name)
    c = case.config
    model = load_published(AMIL(c['backbone_dim'], c['hidden'], c['attn_hidden'], c['n_classes'], gated=c['gate']), case.weights)
    outputs_agree(model, case)
    close(model.float().attention(case.features)['pool'][20], case['outputs/attention'][0], 1e-6)


@needs_data
@pytest.mark.parametrize('name', cases('dsmil'))
def test_dsmil(name):
    "The version as published to 1e-10, the default, which does not round a root to float32, to 1e-7"
    case = Case(name)
    c = case.config
    model, exact = (load_published(DSMIL(c['backbone_dim'], n_bins=c['n_classes'], published=p), case.weights).eval() for p in (True, False))
    with torch.no_grad():
        close(exact(case.features), case['outputs/logits'], 1e-5)
        close(exact.double()(case.features), case['outputs_f64/logits'], 1e-7)
        x, best, w = model.look(case.features, None)
        close(model.scores(x)[0], case['outputs/instance_scores'], 1e-5)
        close(best[0], case['outputs/instance_scores'].amax(0), 1e-5)
        close(w[0], case['outputs/attention'], 1e-6)
        close(w.mT @ x, case['outputs/bag_embedding'], 1e-5)
    outputs_agree(model, case)
    close(model.float().attention(case.features)['pool'][20], case['outputs/attention'].mean(1), 1e-6)


@needs_data
@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('name', cases('transmil'))
def test_transmil(name, published):
    "A bag by itself: both versions give the published numbers, and after each part of the model"
    case, seen = Case(name), {}
    c = case.config
    model = TransMIL(c['backbone_dim'], c['dim'], c['heads'], c['dim_head'], c['num_landmarks'], c['n_classes'], published=published)
    load_published(model, case.weights).eval()
    for part in ('layer1', 'layer2'): model.get_submodule(part).register_forward_hook(lambda m, args, out, k=part: seen.update({k: out}))
    model.layer2.register_forward_pre_hook(lambda m, args: seen.update(pos_layer=args[0]))
    with torch.no_grad(): model(case.features)
    for k,v in case.group('intermediate').items(): close(seen[k], v, 1e-5)
    outputs_agree(model, case)


class SCMILCase(Case):
    "A bag of patches with corners, and the clusters that the published program's k-means found, layer by layer"
    def __init__(self, name):
        super().__init__(name)
        self.features = {20: self['inputs/x20' if 'inputs/x20' in self.tensors else 'inputs/x']}
        self.coords = {20: self['inputs/coords']} if 'inputs/coords' in self.tensors else None
        self.labels = [self[k] for k in sorted(self.tensors) if k.startswith('inputs/cluster_label')]

    def model(self, cls=SCMIL, clusters=True, **kwargs):
        c, w = self.config, self.config['feature_weight']
        width, filtered = c.get('hidden_size') or c['input_size'], c.get('with_softfilter', 'n_cluster' not in c)
        options = dict(embed_dim=None if filtered else width, n_layers=c.get('deep', 1), n_heads=c.get('heads', 8), cluster_size=c['cluster_size'],
                       n_clusters=c.get('n_cluster'), feature_weight=None if w == -1 else w, soft_filter=filtered,
                       hidden=width if 'n_cluster' in c else 256)
        if cls is SCMIL: options['n_bins'] = c['n_classes']
        model, labels = load_published(cls(c['input_size'], **options, **kwargs), self.weights).eval(), cycle(self.labels)
        if clusters: model.cluster = lambda x, coords: next(labels)
        return model


@needs_data
@pytest.mark.parametrize('name', [n for n in cases('scmil') if 'mdn' not in n])
def test_scmil(name):
    case = SCMILCase(name)
    model, seen = case.model(), []
    with torch.no_grad():
        for prefix,dtype,atol in (('outputs', torch.float32, 1e-5), ('outputs_f64', torch.float64, 1e-10)):
            logits = model.to(dtype)(case.features, case.coords)
            close(logits, case[f'{prefix}/logits'], atol)
            if prefix == 'outputs':
                close(logits.sigmoid(), case['outputs/hazards'], atol)
                close((1 - logits.sigmoid()).cumprod(1), case['outputs/survival'], atol)
        (x,c), = model.float().bags(case.features, case.coords)
        _, pool, rows, score = model.look(x, c)
    if 'outputs/amil_attention' in case.tensors: close(pool, case['outputs/amil_attention'][0], 1e-6)
    if 'outputs/kept' in case.tensors:
        close(score, case['outputs/softfilter_score'], 1e-6)
        assert rows[:len(case['outputs/kept'])].sort().values.tolist() == case['outputs/kept'].tolist()


@needs_data
@pytest.mark.parametrize('name', cases('scmil'))
def test_scmil_finds_the_same_clusters(name):
    "Without being given any: k-means and random clusters start as theirs did"
    case = SCMILCase(name)
    c, found = case.config, []
    density = dict(cls=SCMILDensity, cuts=(0, 60), n_parts=c['K'], head_hidden=c['mdn_hidden']) if 'mdn' in name else {}
    ours = (model := case.model(clusters=False, **density)).cluster
    model.cluster = lambda x, coords: found.append(ours(x, coords)) or found[-1]
    with torch.no_grad(): model(case.features, case.coords)
    assert [o.tolist() for o in found] == [o.tolist() for o in case.labels]


@needs_data
@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('name', [n for n in cases('scmil') if 'mdn' in n])
def test_scmil_density(name, published):
    "Parts of the mixture, distribution and density at each month; published, the loss with its floors"
    case = SCMILCase(name)
    c, months = case.config, case['inputs/times']
    model = case.model(SCMILDensity, cuts=(0, 12, 30, 60, 120), n_parts=c['K'], head_hidden=c['mdn_hidden'], published=published)
    with torch.no_grad():
        mix = model.density(case.features, case.coords)
        for ours,k in ((mix.log_w.exp(), 'w'), (mix.mu, 'mu'), (mix.sigma, 'sigma'), (1 - mix.log_survival(months).exp(), 'cdf')):
            torch.testing.assert_close(ours, case[f'outputs/{k}'], atol=1e-5, rtol=1e-6)
        close(1 - mix.log_survival(months).exp()[0], case['outputs/cdf_single'], 1e-5)
        torch.testing.assert_close(mix.log_density(months)[0], case['outputs/log_prob'], atol=3e-5, rtol=1e-6)
        if not published: return
        for event,k in ((True, 'event'), (False, 'censored')):
            ours = torch.stack([density_nll(mix, t[None], torch.tensor([event])) for t in months])
            close(ours, case[f'outputs/loss_{k}'], 3e-5)


@pytest.mark.parametrize('build,count', [(lambda: AMIL(2048), 1_314_053), (lambda: DSMIL(2048), 319_752), (lambda: TransMIL(2048), 3_197_460),
    (lambda: SCMIL(2048, 512, 4, hidden=512, n_clusters=64, feature_weight=None, soft_filter=False), 3_678_213 - 1_050_624),
    (lambda: SCMILDensity(384, cuts=(0, 12, 120)), 1_837_206 - 591_360 - 147_840)],
    ids=['amil', 'dsmil', 'transmil', 'scmil adapted', 'scmil density'])
def test_parameters(build, count):
    "As published, less what published SCMIL never uses: an attention in each layer and, with the filter, the first map"
    assert sum(p.numel() for p in build().parameters()) == count


builds = {'amil': AMIL, 'dsmil': DSMIL, 'dsmil published': lambda d: DSMIL(d, published=True), 'transmil': lambda d: TransMIL(d, 32), 'scmil': SCMIL,
          'scmil random': lambda d: SCMIL(d, 32, 4, n_clusters=64, feature_weight=None, soft_filter=False),
          'scmil two layers': lambda d: SCMIL(d, n_layers=2),
          'scmil density': lambda d: SCMILDensity(d, cuts=(0, 12, 30, 60, 120))}

@pytest.mark.parametrize('name', list(builds))
def test_on_a_large_bag(name):
    "1,920 patches in half precision: answers to the bit, global generators where they were, importances that sum to 1, gradients where due"
    torch.manual_seed(0)
    (features, coords), model = toy_batch(120, 24), builds[name](24).eval()
    features = {m: x.half() for m,x in features.items()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad(): assert torch.equal(model(features, coords), model(features, coords))
    looked = model.train().attention(features, coords)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert model.training and all(m.training for m in model.modules())
    for d in looked.values():
        assert d[20].shape == (1920,) and (d[20] >= 0).all() and abs(d[20].sum().item() - 1) < 1e-4 and not d[20].requires_grad
    model(features, coords).square().sum().backward()
    assert [k for k,p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize('name', [n for n in builds if n != 'scmil density'])
@pytest.mark.parametrize('n', [1, 2, 3, 5, 17])
def test_small_bags(name, n):
    "Batches of small bags are their bags one by one"
    torch.manual_seed(0)
    model, gen = builds[name](24).double().eval(), torch.Generator().manual_seed(n)
    features, coords = {20: torch.randn(3, n, 24, generator=gen)}, {20: torch.randint(0, 40, (3, n, 2), generator=gen)*256}
    alone = [({20: features[20][i:i+1]}, {20: coords[20][i:i+1]}) for i in range(3)]
    with torch.no_grad(): close(model(features, coords), torch.cat([model(*o) for o in alone]), 1e-12)
