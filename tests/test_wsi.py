"Slides of any scale and layout, and encoders against the libraries that their weights come from"
import importlib, json, sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from crossfusion.core import CrossFusionError
from crossfusion.simulate.slides import paint_slide, plan_slide, write_slide
from crossfusion.wsi import encoders
from crossfusion.wsi.encoders import CLIP, IMAGENET, RECIPES, check_encoder, make_encoder
from crossfusion.wsi.extract import extract, extract_slide
from crossfusion.wsi.grid import cell_patches, patch_grid
from crossfusion.wsi.networks import randomised
from crossfusion.wsi.slides import Slide
from crossfusion.wsi.tissue import tissue_mask

real = Path(__file__).parents[2]/'shared/data/slides'


class MeanColour:
    name,n_features = 'mean_colour', 3
    def __call__(self, images): return torch.as_tensor(images).float().mean((1,2))/255


@pytest.fixture(scope='module')
def painted(): return paint_slide(plan_slide(.4, .3, .1, 'scales', size=(3000,2600)))


def check_scales(slide):
    "Parents, children, corners and colours of one slide"
    grid = patch_grid(slide, tissue_mask(slide.thumbnail()))
    assert len(grid)
    for coarse,fine in ((5,10),(10,20)):
        parents = grid.parents(fine)
        assert np.bincount(parents, minlength=len(grid.coords[coarse])).tolist() == [4]*len(grid.coords[coarse])
        inside = grid.coords[fine] - grid.coords[coarse][parents]
        size = grid.patch_px_level0(fine)
        assert set(np.round(inside.ravel()/size)) == {0,1} and np.abs(inside - np.round(inside/size)*size).max() <= 1
    worst = 0
    for i in range(0, len(grid), max(1, len(grid)//3)):
        colour = {m: o.mean((1,2)) for m,o in cell_patches(slide, grid, i).items()}
        rows = grid.rows(20)[i]
        for k,row in enumerate(grid.rows(10)[i]):
            read = slide.read(*grid.coords[10][row], 10, 256).mean((0,1))                       # from another level of the file
            children = np.flatnonzero(grid.parents(20)[rows] == row)
            worst = max(worst, np.abs(colour[10][k] - colour[20][children].mean(0)).max(), np.abs(read - colour[20][children].mean(0)).max())
    assert worst < 2, worst


@pytest.mark.parametrize('mpp', [.25, .4990, .5, .1725])
def test_one_grid_at_any_scale(painted, tmp_path, mpp):
    write_slide(tmp_path/'a.tiff', painted, mpp)
    with Slide(tmp_path/'a.tiff') as s:
        assert s.mpp == pytest.approx(mpp, rel=1e-4) and s.mpp_source == 'OpenSlide'
        check_scales(s)


@pytest.mark.skipif(not real.exists(), reason='no real slides here')
@pytest.mark.parametrize('mpp', [None, .25, .5, .1725])
def test_one_grid_on_real_slides(mpp):
    with Slide(real/'CMU-1-Small-Region.svs', mpp) as s: check_scales(s)
    with Slide(real/'TCGA-CR-7395-01A-01-TS1.svs', mpp or .499) as s: check_scales(s)


def test_any_layout_of_a_tiff_gives_the_same_bag(painted, tmp_path):
    "In tiles by OpenSlide; in strips, plain or compressed, and in tiles of JPEG 2000 by tifffile"
    scale = dict(photometric='rgb', resolution=(2e4,2e4), resolutionunit='CENTIMETER')
    layouts = dict(tiles=dict(tile=(256,256), compression='deflate'), plain={}, strips=dict(compression='deflate', rowsperstrip=37),
                   jp2=dict(tile=(256,256), compression='jpeg2000'), inch=dict(compression='lzw', resolution=(50800,50800), resolutionunit='INCH'))
    bags,readers = {}, {}
    for name,kw in layouts.items():
        tifffile.imwrite(tmp_path/f'{name}.tif', painted[:1500,:1800], **(scale | kw))
        with Slide(tmp_path/f'{name}.tif') as s: readers[name] = type(s.file).__name__
        bags[name] = extract_slide(tmp_path/f'{name}.tif', tmp_path/'bags', MeanColour())
    assert readers == dict.fromkeys(layouts, 'TiffFile') | dict(tiles='OpenSlide')
    for b in bags.values():
        assert b.mpp == .5 and all((b.features[m] == bags['tiles'].features[m]).all() and (b.coords[m] == bags['tiles'].coords[m]).all() for m in b.mags)


def test_marked_slide(painted, tmp_path):
    "A pen around the tissue changes nothing; glass with nothing but ink on it has no tissue"
    marked,inked = painted.copy(), np.full_like(painted, 244)
    for im in (marked, inked): im[100:180, 200:2800] = (40,84,176); im[2500:2560, 200:2800] = (38,36,40); im[:, :60] = 3
    (tmp_path/'slides').mkdir()
    for name,im in dict(clean=painted, marked=marked, inked=inked).items(): write_slide(tmp_path/f'slides/{name}.tiff', im)
    log = extract(tmp_path/'slides', tmp_path/'bags', MeanColour()).set_index('slide')
    assert log.status.to_dict() == dict(clean='done', inked='failed', marked='done') and 'expected tissue' in log.reason['inked']
    assert log.n20['clean'] == log.n20['marked'] and (tmp_path/'bags/pictures/inked.jpg').exists()
    log = extract(tmp_path/'slides', tmp_path/'ink', MeanColour(), ink=False).set_index('slide')
    assert log.status['inked'] == 'done' or log.n20['marked'] >= log.n20['clean']


def test_own_masks(painted, tmp_path):
    "Outlines drawn in a viewer: two cells of tissue and no more; a slide without its mask is told, the other done"
    (tmp_path/'slides').mkdir(); (tmp_path/'masks').mkdir()
    for name in 'ab': write_slide(tmp_path/f'slides/{name}.tiff', painted)
    ring = [[0,0],[2048,0],[2048,1024],[0,1024],[0,0]]
    (tmp_path/'masks/a.geojson').write_text(json.dumps({'type':'FeatureCollection', 'features':[{'type':'Feature', 'geometry':{'type':'Polygon', 'coordinates':[ring]}}]}))
    log = extract(tmp_path/'slides', tmp_path/'bags', MeanColour(), masks=tmp_path/'masks').set_index('slide')
    assert log.n5['a'] == 2 and log.status.to_dict() == dict(a='done', b='failed') and 'expected one mask of b' in log.reason['b']
    with pytest.raises(CrossFusionError, match='holds a run with other settings: masks'): extract(tmp_path/'slides', tmp_path/'bags', MeanColour())


patches = np.stack([np.random.default_rng(0).integers(0, 256, (256,256,3)), np.indices((256,256))[[0,1,0]].transpose(1,2,0)]).astype(np.uint8)


@pytest.fixture(scope='module')
def torchvision_loads():
    "torchvision built for CUDA cannot be imported beside a torch without it, unless its operators are declared"
    try: import torchvision; yield; return
    except RuntimeError: pass
    for k in [k for k in sys.modules if k.split('.')[0] == 'torchvision']: del sys.modules[k]
    lib, both = torch.library.Library('torchvision', 'DEF'), ('roi_align', 'roi_pool', 'ps_roi_align', 'ps_roi_pool', 'deform_conv2d')
    for name in ('nms', 'qnms', 'qroi_align', *both, *(f'_{o}_backward' for o in both)): lib.define(f'{name}(Tensor x) -> Tensor') # none of them is called
    yield


def needs(package):
    "Import a package of the extra `encoders`, or skip"
    try: return importlib.import_module(package)
    except (ImportError, RuntimeError) as e: pytest.skip(f"{package} is not here: pip install 'crossfusion[encoders]' ({str(e).splitlines()[0][:80]})")


def by_hand(images=patches, px=224, mean=IMAGENET['mean'], std=IMAGENET['std'], resize=None, how=Image.BILINEAR):
    "Patches prepared with Pillow: (b, 3, px, px)"
    out = np.stack([np.asarray(Image.fromarray(o).resize((resize or px,)*2, how)) for o in images])
    cut = ((resize or px) - px)//2
    x = torch.from_numpy(out[:, cut:cut+px, cut:cut+px]).permute(0,3,1,2).float()
    return (x - torch.tensor(mean)[:,None,None])/torch.tensor(std)[:,None,None]


def near(a, b):
    "The same but for the rounding of resized bytes; and not the same for every patch"
    assert (a - b).abs().max() < .02*b.abs().max() and (b[0] - b[1]).abs().max() > .1*b.abs().max(), ((a - b).abs().max()/b.abs().max(), (b[0] - b[1]).abs().max()/b.abs().max())


def test_resnet50_is_torchvisions(torchvision_loads, tmp_path):
    "Their weights by their names: their features of all stages, and those after the third"
    models = needs('torchvision.models')
    theirs = randomised(models.resnet50())
    torch.save(theirs.state_dict(), tmp_path/'resnet50.pth')
    ours,third = (make_encoder(n, tmp_path/'resnet50.pth') for n in ('resnet50', 'resnet50_1024'))
    stages,x = torch.nn.Sequential(*list(theirs.children())[:-3]), by_hand()
    theirs.fc = torch.nn.Identity()
    with torch.no_grad(): wanted = theirs(x), stages(x).mean((2,3))
    for a,b in zip((ours(patches), third(patches)), wanted): near(a, b); assert a.shape == b.shape
    assert (ours.n_features, third.n_features) == (2048, 1024)
    with torch.device('meta'): torch.save(models.resnet101().state_dict(), tmp_path/'resnet101.pth')
    with pytest.raises(CrossFusionError, match='more, like layer3.6'): make_encoder('resnet50', tmp_path/'resnet101.pth')


def test_resnet50_is_timms(torchvision_loads, tmp_path):
    timm = needs('timm')
    theirs = randomised(timm.create_model('resnet50', pretrained=False))
    from safetensors.torch import save_file
    save_file(theirs.state_dict(), tmp_path/'model.safetensors')
    theirs.reset_classifier(0)
    with torch.no_grad(): near(make_encoder('resnet50', tmp_path)(patches), theirs(by_hand()))


tiny = dict(depth=2, embed_dim=48, num_heads=2)

@pytest.mark.parametrize('name,args,resize', [
    ('uni2_h', dict(model_name='vit_giant_patch14_224', img_size=224, patch_size=14, init_values=1e-5, mlp_ratio=2.66667*2, no_embed_class=True, reg_tokens=8), None),
    ('gigapath', dict(model_name='vit_giant_patch14_dinov2', img_size=224, patch_size=16), 256)])
def test_vits_are_timms(torchvision_loads, tmp_path, name, args, resize):
    timm = needs('timm')
    if name == 'uni2_h': args = args | dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
    theirs = randomised(timm.create_model(pretrained=False, num_classes=0, **args, **tiny))
    torch.save(theirs.state_dict(), tmp_path/'pytorch_model.bin')
    ours = make_encoder(name, tmp_path, **tiny)
    with torch.no_grad(): near(ours(patches), theirs(by_hand(resize=resize, how=Image.BICUBIC if resize else Image.BILINEAR)))
    assert ours.n_features == 48 and check_encoder(ours) is ours
    with torch.device('meta'): full = RECIPES[name].build(RECIPES[name], tmp_path)
    assert full.n_features == 1536 and .6e9 < sum(p.numel() for p in full.parameters()) < 1.2e9


def test_conch(torchvision_loads, tmp_path):
    "Under the names of the published file, its captioning half left out"
    timm = needs('timm')
    vit = needs('timm.models.vision_transformer')
    trunk = vit.VisionTransformer(img_size=448, patch_size=16, num_classes=0, dynamic_img_size=True, mlp_ratio=4, **tiny)
    theirs = randomised(encoders.Conch(trunk, 32))
    state = {f'visual.{k}': v for k,v in theirs.state_dict().items()} | {'visual.proj_contrast': torch.zeros(32,32), 'visual.ln_caption.weight': torch.zeros(9),
             'visual.attn_pool_caption.query': torch.zeros(2,9), 'text.token_embedding.weight': torch.zeros(9,9), 'logit_scale': torch.tensor(1.)}
    torch.save(state, tmp_path/'pytorch_model.bin')
    ours = make_encoder('conch', tmp_path, d=32, **tiny)
    with torch.no_grad(): near(ours(patches), theirs(by_hand(px=448, **CLIP, how=Image.BICUBIC)))
    assert ours.input_px == 448
    with torch.device('meta'): full = RECIPES['conch'].build(RECIPES['conch'], tmp_path)
    assert full.n_features == 512 and full.attn_pool_contrast.attn.k_proj_weight.shape == (512,768) and full.trunk.pos_embed.shape == (1,785,768)


@pytest.mark.parametrize('quick_gelu', [False, True])
def test_quiltnet_is_open_clips(torchvision_loads, tmp_path, quick_gelu):
    "What its own configuration says: sizes, activation, scaling"
    clip = needs('open_clip')
    model = dict(embed_dim=16, quick_gelu=quick_gelu, vision_cfg=dict(image_size=224, layers=2, width=64, patch_size=32),
                 text_cfg=dict(context_length=7, vocab_size=99, width=16, heads=2, layers=1))
    seen = dict(mean=[.5,.4,.3], std=[.2,.3,.4])
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model, preprocess_cfg=seen)))
    theirs = randomised(clip.CLIP(**model))
    torch.save(theirs.state_dict(), tmp_path/'open_clip_pytorch_model.bin')
    x = by_hand(**{k: [255*o for o in v] for k,v in seen.items()}, how=Image.BICUBIC)
    ours,before = (make_encoder(n, tmp_path) for n in ('quiltnet_b32', 'quiltnet_b32_768'))
    with torch.no_grad():
        near(ours(patches), theirs.encode_image(x))
        theirs.visual.proj = None
        near(before(patches), theirs.visual(x))
    assert (ours.n_features, before.n_features) == (16, 64)
    (tmp_path/'open_clip_config.json').unlink()
    with pytest.raises(CrossFusionError, match='open_clip_config.json'): make_encoder('quiltnet_b32', tmp_path)


def test_offline(monkeypatch, tmp_path):
    "The hub's own way to say that there is no network: one line with the file, its page and where to put it"
    needs('huggingface_hub')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(CrossFusionError) as e: extract(Path(__file__), tmp_path/'out', 'uni2_h')
    said = str(e.value)
    assert 'expected pytorch_model.bin from https://huggingface.co/MahmoodLab/UNI2-h' in said and '--weights PATH' in said and '\n' not in said
    assert not (tmp_path/'out').exists()
