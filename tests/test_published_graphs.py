"""Graph models against outputs of the published programs, kept beside the repository"""
import pytest, torch

from golden import Case, close, needs_data
from crossfusion.models.graphs import DeepGraphSurv, GENConv, GINConv, PatchGCN, adjacency, edge_list, nearest_in_features, nearest_in_space
from crossfusion.models.protosurv import ProtoSurv, compatibility_loss, orthogonality_loss
from crossfusion.models.weights import load_published, rename

precisions = pytest.mark.parametrize('prefix,dtype,atol', [('outputs', torch.float32, 1e-5), ('outputs_f64', torch.float64, 1e-10)])
pooled = ['deepgraphsurv_latent', 'deepgraphsurv_spatial', 'patchgcn_bias', 'patchgcn_nobias']
proto = ['single', 'absent_type_zero_rows', 'pre_prototypes', 'batch2_bias']


def on_edges(name):
    "A case of DeepGraphSurv or Patch-GCN: model with published weights, patches, places, edges"
    case = Case(name)
    c = case.config
    sizes = dict(n_features=c['num_features'], embed_dim=c['hidden_dim'], n_bins=c['n_classes'], k=c['k'], edges=c['edge_agg'])
    model = PatchGCN(**sizes, n_layers=c['num_layers'], mlp_bias=c['genconv_mlp_bias']) if 'num_layers' in c else DeepGraphSurv(**sizes)
    edges = case['inputs/edge_latent' if c['edge_agg'] == 'latent' else 'inputs/edge_index']
    return case, load_published(model, case.weights).eval(), case['inputs/x'][None], case['inputs/coords'][None], edges


@needs_data
@precisions
@pytest.mark.parametrize('name', pooled)
def test_outputs(name, prefix, dtype, atol):
    "On the published edges, and from features and coordinates alone"
    case, model, x, coords, edges = on_edges(name)
    scores = []
    model.to(dtype).readout.scores.register_forward_hook(lambda m, args, out: scores.append(out))
    with torch.no_grad(): several = model.on_graph(x.to(dtype), edges), model({20: x.to(dtype)}, {20: coords})
    for logits in several:
        close(logits, case[f'{prefix}/logits'], atol)
        close(logits.sigmoid(), case[f'{prefix}/hazards'], atol)
        close((1 - logits.sigmoid()).cumprod(1), case[f'{prefix}/survival'], atol)
    for s in scores: close(s, case[f'{prefix}/attention_logits'], atol)
    close(model.attention({20: x.to(dtype)}, {20: coords})['pool'][20], case[f'{prefix}/attention_logits'][0].softmax(0), atol)


@needs_data
@pytest.mark.parametrize('name', pooled)
def test_edges(name):
    "Neighbours in the published order, whoever of the two kinds the model reads"
    case, model, x, coords, _ = on_edges(name)
    assert torch.equal(edge_list(nearest_in_space(coords[0], model.k)), case['inputs/edge_index'])
    assert torch.equal(edge_list(nearest_in_features(x[0], model.k)), case['inputs/edge_latent'])


@needs_data
@pytest.mark.parametrize('name', pooled[2:])
def test_every_block(name):
    "Where a difference starts, if there is one"
    case, model, x, _, edges = on_edges(name)
    blocks = {'fc': 'embed', 'layers.0.conv': 'deep.layers.0', 'layers.1': 'deep.layers.1', 'layers.2': 'deep.layers.2', 'path_phi': 'phi'}
    seen = {}
    for published,ours in blocks.items():
        model.get_submodule(ours).register_forward_hook(lambda m, args, out, k=published: seen.update({k: out.detach()}))
    model.on_graph(x, edges)
    assert sorted(case.group('intermediate')) == sorted(blocks)
    for k in blocks: close(seen[k].view(x.shape[1], -1), case[f'intermediate/{k}'], 1e-5)


@needs_data
@pytest.mark.parametrize('name', pooled)
def test_distributed_names(name):
    "Parts that the published program spread over GPUs have another name, and the temperature has one in each PyTorch Geometric"
    case, model, *_ = on_edges(name)
    parts = [(r'^(conv\d|path_attention_head)\.', r'\1.module.'), (r'aggr_module\.t$', 't')]
    before = {k: v.clone() for k,v in model.state_dict().items()}
    for p in model.parameters(): torch.nn.init.zeros_(p)
    load_published(model, {rename(k, parts): v for k,v in case.weights.items()})
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())


@needs_data
def test_layers():
    "Duplicate edges, loops, patches that hear nobody"
    case = Case('graphlayers_unit')
    d, n = case.config['dim'], case.config['n']
    names = [(r'^(gen|gin)\.', ''), (r'^eps$', ''), (r'^nn\.0', 'first'), (r'^nn\.2', 'second'), (r'^aggr_module\.t', 't'), (r'^mlp\.4', 'mlp.3')]
    for layer,kind in ((GENConv(d), 'gen'), (GINConv(d, d), 'gin')):
        layer.load_state_dict({rename(k, names): v for k,v in case.weights.items() if k.startswith(kind) and rename(k, names)})
        close(layer(case['inputs/x'], adjacency(case['inputs/edge_index'], n)), case[f'outputs/{kind}conv'], 1e-5)


def of_types(name, compatibility=True):
    "A case of ProtoSurv: model with published weights, and for each slide what it is called with"
    case = Case(f'protosurv_{name}')
    c = case.config
    sizes = ('input_dim', 'dim_proto', 'hidden_dim', 'num_layers', 'nr_types', 'num_proto', 'proto_iters', 'fusion_layer_to_p',
             'proto_n_head', 'fusion_n_head', 'proto_fc_hidden_dim')
    model = ProtoSurv(*[c[k] for k in sizes], mlp_bias=c['genconv_mlp_bias'], head='risk', compatibility=compatibility, published=True)
    means = case['inputs/pre_prototypes'] if c['pre_prototypes'] else None
    slides = [(case[f'inputs/x{i}'][None], case[f'inputs/edge_index{i}'], case[f'inputs/node_type{i}'][None], means)
              for i in range(len(c['sizes']))]
    return case, load_published(model, case.weights).eval(), slides


@needs_data
@precisions
@pytest.mark.parametrize('name', proto)
def test_protosurv(name, prefix, dtype, atol):
    case, model, slides = of_types(name)
    model.to(dtype)
    for i,(x,edges,types,means) in enumerate(slides):
        x, means = x.to(dtype), None if means is None else means.to(dtype)
        with torch.no_grad(): risk, mapped = model.on_graph(x, edges, types, means), model.to_features(model.prototypes(x, types, means))
        close(risk, case[f'{prefix}/risk'][i:i+1], atol)
        close(mapped, case[f'{prefix}/prototypes_comp'][i:i+1], atol)


@needs_data
@pytest.mark.parametrize('name', proto)
def test_protosurv_losses(name):
    case, model, slides = of_types(name)
    with torch.no_grad(): mapped = [model.to_features(model.prototypes(x, types, means)) for x,_,types,means in slides]
    compatible = [compatibility_loss(x, m, types, model.n_types) for m,(x,_,types,_) in zip(mapped, slides)]
    close(torch.stack(compatible).mean(), case['outputs/comp_loss'], 1e-5)
    close(orthogonality_loss(torch.cat(mapped)), case['outputs/ortho_loss'], 1e-5)


@needs_data
def test_blank_patches_count_as_published():
    "A slide without a type, with blank patches: the published mean of the slide is another than ours, and so is the risk"
    case, model, ((x,edges,types,_),) = of_types('absent_type_zero_rows')
    model.published = False
    with torch.no_grad(): assert (model.on_graph(x, edges, types) - case['outputs/risk']).abs().max() > 1e-3


@needs_data
def test_plain_protosurv_takes_the_weights():
    "Without the map that only the extra losses use"
    case, plain, ((x,edges,types,_),) = of_types('single', compatibility=False)
    with torch.no_grad(): close(plain.on_graph(x, edges, types), case['outputs/risk'], 1e-5)
