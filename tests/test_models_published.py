"""CrossFusion and its ablations against outputs and gradients of the published program, kept beside the repository"""
import pytest, torch

from crossfusion.models.crossfusion import CrossFusion, count_parameters
from crossfusion.models.weights import load_published, rename
from crossfusion.survival.losses import nll_survival
from golden import Case, close, needs_data, outputs_agree

cases = ['crossfusion_a_proj', 'crossfusion_b_identity_2layers', 'crossfusion_c_square_n10', 'crossfusion_d_n10_is_1', 'crossfusion_e_fullsize',
         'crossfusion_f_batch2', 'crossfusionconcat_a_proj', 'crossfusionconcat_b_identity_2layers', 'crossfusionsingle_a_proj',
         'crossfusionsingle_b_identity_2layers']
ablations = dict(crossfusionconcat=dict(fusion='concat'), crossfusionsingle=dict(mags=(20,), source=20))
dense_of = dict(cross_5x='coarse_cross_attn_w', cross_20x='fine_cross_attn_w', pad_5x='coarse_pt_attn_w/post', pad_10x='source_pt_attn_w/post',
                pad_20x='fine_pt_attn_w/post', final='final_attn_w/post')


def crossfusion(case, **kwargs):
    "The model of a case with its weights, an ablation where the case is one"
    c = case.config
    options = ablations.get(case.name.split('_')[0], {}) | kwargs
    return load_published(CrossFusion(c['backbone_dim'], c['embed_dim'], c['num_heads'], c['num_layers'], c['n_classes'], **options), case.weights).eval()


@needs_data
@pytest.mark.parametrize('name', cases)
def test_crossfusion_outputs(name):
    case = Case(name)
    outputs_agree(crossfusion(case), case)


@needs_data
def test_crossfusion_every_block():
    "Where a difference starts, if there is one: tokens after each block of case a"
    case, seen = Case('crossfusion_a_proj'), {}
    model = crossfusion(case)
    blocks = dict(c_lin_proj='project.5x', s_lin_proj='project.10x', f_lin_proj='project.20x', c_cross_attn='cross.5x.attn', f_cross_attn='cross.20x.attn',
                  c_cross_attn_ln='cross.5x.norm', f_cross_attn_ln='cross.20x.norm', c_cross_attn_ffn='cross.5x.ffn', f_cross_attn_ffn='cross.20x.ffn',
                  c_transformer_ln='pad.5x', s_transformer_ln='pad.10x', f_transformer_ln='pad.20x', conv_processor='fuse', final_ln='final', mlp_head='head')
    for published,ours in blocks.items():
        model.get_submodule(ours).register_forward_hook(lambda m, args, out, k=published: seen.update({k: out.detach()}))
    model(case.features)
    for k in blocks: close(seen[k], case[f'intermediate/{k}'], 1e-5)


@needs_data
@pytest.mark.parametrize('name', ['a_proj', 'd_n10_is_1'])
def test_crossfusion_attention(name):
    case = Case(f'crossfusion_{name}')
    n = case.config['N10']
    looked = crossfusion(case).attention(case.features)
    assert sorted(looked) == sorted(dense_of)
    for stage,by_mag in looked.items():
        w = case[f'outputs/attn/{dense_of[stage]}'].double().mean(1).sum(1)[0]              # mean over heads, sum over queries
        if stage == 'final': w = w[1:]                                                      # without the class token
        if stage[:5] != 'cross': w = w[:n] + torch.cat([w[n:], torch.zeros(2*n - len(w))])  # copies back to their patches
        (ours,) = by_mag.values()
        close(ours.double(), w / w.sum(), 1e-6)


@needs_data
@pytest.mark.parametrize('name', ['a_proj', 'd_n10_is_1'])
def test_crossfusion_dense_attention(name):
    "All ten published maps"
    case, names = Case(f'crossfusion_{name}'), {}
    for scale,mag in (('coarse', 5), ('source', 10), ('fine', 20)):
        names |= {f'pad_{mag}x_before': f'{scale}_pt_attn_w/pre', f'pad_{mag}x_after': f'{scale}_pt_attn_w/post'}
    names |= dict(cross_5x='coarse_cross_attn_w', cross_20x='fine_cross_attn_w', final_before='final_attn_w/pre', final_after='final_attn_w/post')
    maps = crossfusion(case).attention_maps(case.features)
    assert sorted(maps) == sorted(names) and len([k for k in case.tensors if k.startswith('outputs/attn/')]) == len(names)
    for stage,w in maps.items(): close(w, case[f'outputs/attn/{names[stage]}'], 1e-6)


@needs_data
@pytest.mark.parametrize('name', ['censored', 'uncensored'])
@pytest.mark.parametrize('dtype,atol', [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_crossfusion_gradients(name, dtype, atol):
    "Loss and gradient of every parameter in training mode, all dropout 0"
    case = Case(f'train_crossfusion_{name}')
    model = crossfusion(case, dropout=0., attn_dropout=0.).to(dtype).train()
    logits = model({m: x.to(dtype) for m,x in case.features.items()})
    close(logits.float(), case['outputs/logits'], 1e-5)
    loss = nll_survival(logits, case['inputs/label'], case['inputs/censorship'] == 0, alpha=case.config['alpha'])
    close(loss.float(), case['outputs/loss'], 1e-5)
    loss.backward()
    grads, rules = case.group('grads'), model.published_rules()
    params = dict(model.named_parameters())
    assert sorted(rename(k, rules) for k in grads) == sorted(params)
    for k,g in grads.items(): close(params[rename(k, rules)].grad.float(), g, atol)


@needs_data
@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
def test_published_files(tmp_path, prefix, ending):
    "A file as the published program saves it, from one GPU or several"
    from safetensors.torch import save_file
    case = Case('crossfusion_a_proj')
    state, path = {prefix + k: v for k,v in case.weights.items()}, tmp_path/f'weights.{ending}'
    save_file(state, path) if ending == 'safetensors' else torch.save(state, path)
    c = case.config
    model = load_published(CrossFusion(c['backbone_dim'], c['embed_dim'], c['num_heads']), path).eval()
    with torch.no_grad(): close(model(case.features), case['outputs/logits'], 1e-5)


@needs_data
def test_ablation_weights_are_refused():
    "An ablation has other blocks; its weights are not taken for the model's"
    from crossfusion.core import CrossFusionError
    case = Case('crossfusionconcat_a_proj')
    with pytest.raises(CrossFusionError, match='219 weights of this CrossFusion'): load_published(CrossFusion(24, 32), case.weights)


@pytest.mark.parametrize('n_features,count', [(2048, 24_536_584), (512, 21_386_248)])
def test_crossfusion_parameters(n_features, count):
    assert sum(count_parameters(CrossFusion(n_features)).values()) == count
