"""ZoomMIL, MuSTMIL, CSMIL and HIPT against outputs and gradients of the published programs, kept beside the repository"""
import numpy as np, pytest, torch

from crossfusion.core import MAGS
from crossfusion.models.alignment import nested_rows, paired_rows, patch_sizes
from crossfusion.models.attention import toy_batch
from crossfusion.models.hipt import HIPT
from crossfusion.models.multi_scale import CSMIL, MuSTMIL, ZoomMIL, perturbed_topk
from crossfusion.models.weights import load_published, rename
from golden import Case, close, golden, needs_data, recipe

precisions = pytest.mark.parametrize('prefix,dtype,atol', [('outputs', torch.float32, 1e-5), ('outputs_f64', torch.float64, 1e-10)], ids=['float32', 'float64'])
names = lambda prefix: sorted(f.stem for f in golden.glob(f'{prefix}_*.safetensors')) or [prefix]


def logits_agree(logits, case, prefix, atol):
    "Logits, hazards and survival, as far as the case has them"
    wanted = dict(logits=logits, hazards=logits.sigmoid(), survival=(1 - logits.sigmoid()).cumprod(1))
    for k,v in wanted.items():
        if f'{prefix}/{k}' in case.tensors: close(v, case[f'{prefix}/{k}'], atol)


def zoommil(case, dtype, **kwargs):
    c = case.config
    options = dict(n_zoom=c['k_sample'], sigma=c['k_sigma'], n_samples=c['num_samples'], published=True) | kwargs
    model = load_published(ZoomMIL(c['in_feat_dim'], c['out_feat_dim'], c['hidden_feat_dim'], c['n_cls'], **options), case.weights)
    return model.to(dtype).train(c['train']), {m: case[f'inputs/x{m}'].to(dtype) for m in MAGS}


@needs_data
@pytest.mark.parametrize('name', names('zoommil_eval'))
@precisions
def test_zoommil_eval(name, prefix, dtype, atol):
    case = Case(name)
    if prefix == 'outputs_f64' and not case.group(prefix): prefix, atol = 'outputs', 1e-5
    model, x = zoommil(case, dtype)
    with torch.no_grad():
        logits_agree(model.nested(x).to(case[f'{prefix}/logits'].dtype), case, prefix, atol)
        levels = list(model.levels(x))
        close(levels[0][4][0].argmax(1), case['outputs/selected_low'], 0)
        for (m,h,*_),level in zip(levels, ('low', 'mid', 'high')):
            for name,scores in (('ga', model.pool), ('aux_ga', model.zoom)):
                if f'{m}x' in scores: close(scores[f'{m}x'](h)[...,None].float(), case[f'outputs/attn_logits_{name}_{level}_mag'], 1e-5)


@needs_data
def test_zoommil_on_a_slide():
    "The same cells as patches with places: rows of the bag in raster order, found by their coordinates"
    case = Case('zoommil_eval')
    model, x = zoommil(case, torch.float32)
    coords = toy_batch(n_coarse=case.config['N5'])[1]
    rows = nested_rows(coords, MAGS) | {5: torch.arange(case.config['N5'])[None]}
    bag = {m: torch.empty_like(x[m]).scatter(1, rows[m][...,None].expand_as(x[m]), x[m]) for m in MAGS}
    with torch.no_grad(): close(model(bag, coords), case['outputs/logits'], 1e-5)


@needs_data
@pytest.mark.parametrize('name', names('zoommil_train'))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_zoommil_gradients(name, dtype):
    "Training mode without dropout, noise given: logits and the gradient of every parameter"
    case = Case(name)
    model, x = zoommil(case, dtype, dropout=0.)
    logits = model.nested(x, noise=[case[f'inputs/noise{i}'].to(dtype) for i in (0,1)])
    logits_agree(logits.float(), case, 'outputs', 1e-5)
    (logits.sigmoid() @ torch.arange(1, logits.shape[1] + 1, dtype=dtype)).sum().backward()
    rules, grads, params = model.published_rules(), case.group('grads'), dict(model.named_parameters())
    assert sorted(rename(k, rules) for k in grads) == sorted(params)
    for k,g in grads.items(): close(params[rename(k, rules)].grad.float(), g, 1e-5)


@needs_data
@pytest.mark.parametrize('name', names('perturbed_topk'))
def test_perturbed_topk(name):
    case = Case(name)
    scores = case['inputs/scores'].requires_grad_()
    p = perturbed_topk(scores, case.config['k'], case.config['sigma'], noise=case['inputs/noise'], published=True)
    close(p.detach(), case['outputs/indicators'], 1e-6)
    p.backward(case['inputs/grad_out'])
    close(scores.grad, case['outputs/grad_scores'], 1e-5)


@needs_data
@pytest.mark.parametrize('name', names('mustmil'))
@precisions
def test_mustmil(name, prefix, dtype, atol):
    case = Case(name)
    c = case.config
    scales = MAGS[-2:] if c['scales'] == 2 else MAGS
    model = load_published(MuSTMIL(c['in_features'], c['embedding'], c['attn_hidden'], c['n_classes'], scales), case.weights).to(dtype).eval()
    with torch.no_grad():
        x = model.paired({m: case[f'inputs/scale{i}'][None].to(dtype) for i,m in enumerate(reversed(scales))})
        for m,prob,shares in ((None, 'fused_prob', 'fused_attention'), *((m, f'prob_scale{i}', f'attention_scale{i}') for i,m in enumerate(reversed(scales)))):
            logits, w = model.branch(x, m)
            if f'{prefix}/{prob}' in case.tensors: close(logits.sigmoid().clamp(1e-7, 1 - 1e-7), case[f'{prefix}/{prob}'], atol)
            close(w[0].T.float(), case[f'outputs/{shares}'], 1e-6)


@needs_data
@pytest.mark.parametrize('name', names('csmil'))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_csmil(name, dtype):
    case = Case(name)
    c = case.config
    model = load_published(CSMIL(c['in_features'], n_bins=1), case.weights).to(dtype).eval()
    x = torch.cat([case[f'inputs/cluster{i}'] for i in range(len(c['sizes']))])[...,0].to(dtype)       # (n, d, scales), finest first
    x, mask = {m: x[None,...,i] for i,m in enumerate(reversed(MAGS))}, case['inputs/mask']
    with torch.no_grad():
        bag, w, scores = model.places(x, mask=mask)
        close(model.paired(x, mask=mask).sigmoid().float(), case['outputs/probability'], 1e-5)
        close(bag.float(), case['outputs/bag_embedding'], 1e-5)
        close(w.float(), case['outputs/attention'], 1e-6)
        close(torch.stack([scores[m][0] for m in reversed(MAGS)], 1).float(), case['outputs/scale_scores'], 1e-5)


@pytest.mark.parametrize('mpp', [.25, .499, .1725])
def test_alignment_of_a_whole_slide(mpp):
    "140,000 patches of any scanner: sizes, and each patch in its own cell"
    _,coords = toy_batch(n_coarse=8750, n_features=1)
    coords = {m: (c*(.5/mpp)).round().long() for m,c in coords.items()}
    sizes = patch_sizes({m: c[0].numpy() for m,c in coords.items()})
    np.testing.assert_allclose([sizes[m] for m in MAGS], [2560/m/mpp for m in MAGS], rtol=1e-3)
    nested, paired = nested_rows(coords, MAGS), paired_rows(coords, MAGS)
    for m in (10, 20): assert torch.equal(nested[m][0].sort()[0], torch.arange(coords[m].shape[1]))
    assert torch.equal(paired[5][0][nested[20][0]], torch.arange(8750).repeat_interleave(16))
    assert torch.equal(paired[10][0][nested[20][0]], nested[10][0].repeat_interleave(4))


def test_places_that_tissue_did_not_fill():
    "Grids that start anywhere, at each scale by itself: the rule in plain words, patch by patch"
    r = np.random.default_rng(0)
    coords = {m: np.unique(r.integers(0, 8*m//5, (4*m, 2)), axis=0)*(5120//m) + r.integers(0, 200, 2) for m in MAGS}
    rows = paired_rows({m: torch.from_numpy(c)[None] for m,c in coords.items()}, MAGS)
    for m in (5, 10):
        side = 5120//m
        for i,(x,y) in enumerate(coords[20] + 128 - np.array([.01, .02])):
            holds = np.flatnonzero(((coords[m] <= (x,y)) & ((x,y) <= coords[m] + side)).all(1))
            near = np.square(coords[m] + side/2 - (x,y)).sum(1).argmin()
            assert rows[m][0,i] == (holds[0] if len(holds) else near)


def in_regions(x): return x.flatten(0, 1), torch.arange(x.shape[0]*x.shape[1]).view(x.shape[:2]) # (m, t, d) -> patches, rows of each region


@needs_data
@pytest.mark.parametrize('name', names('hipt'))
@precisions
def test_hipt(name, prefix, dtype, atol):
    case = Case(name)
    c = case.config
    if prefix == 'outputs_f64' and not case.group(prefix): prefix, atol = 'outputs', 1e-5
    if 'cls' in c: model, shape = HIPT(c['input_dim'], c['dim'], n_bins=c['n_classes'], transformers=False), (c['M'], c['T'])
    else:
        model = HIPT(c['input_dim'], c['dim'], c['depth'], c['heads'], c['n_classes'], global_heads=c['global_heads'], global_hidden=c['global_ff'], published=True)
        shape = (c['M'], 256)
    model = load_published(model, case.weights).to(dtype).eval()
    x = (case['inputs/x_256'] if 'inputs/x_256' in case.tensors else recipe('x_256', (*shape, c['input_dim']), case.seed, is_input=True)).to(dtype)
    with torch.no_grad():
        regions = model.regions(*in_regions(x))
        logits_agree(model.read(regions)[0][None].to(case[f'{prefix}/logits'].dtype), case, prefix, atol)
        if 'outputs/region_embedding' in case.tensors:
            close(regions.float(), case['outputs/region_embedding'], 1e-5)
            close(model.scores(model.layers(model.phi(regions)[None]))[0][:,None].float(), case['outputs/attention_logits'], 1e-5)
        if 'outputs/pos_embed_16x16' in case.tensors: close(model.region.positions().float(), case['outputs/pos_embed_16x16'], 1e-5)
