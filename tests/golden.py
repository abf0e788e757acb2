"Known answers of published programs, kept beside the repository: settings, weights, inputs and outputs of one case"
import importlib.util, json
from pathlib import Path

import pytest, torch
from safetensors import safe_open

from crossfusion.core import MAGS

golden = Path(__file__).resolve().parent.parent.parent/'shared'/'data'/'golden'
needs_data = pytest.mark.skipif(not (golden/'recipe.py').exists(), reason='no data in ../shared/data/golden')


def recipe(*args, **kwargs):
    "Weights and inputs that are not stored are made by the rules that lie with the data"
    spec = importlib.util.spec_from_file_location('recipe', golden/'recipe.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return torch.from_numpy(module.recipe(*args, **kwargs))


class Case:
    "One golden file: settings, published weights, inputs, expected tensors"
    def __init__(self, name):
        with safe_open(golden/f'{name}.safetensors', 'pt') as f:
            self.tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        c = self.config = json.loads(meta['config'])
        self.name, self.seed = name, int(meta['seed'])
        self.weights = self.group('weights') or {k: recipe(k, s, self.seed) for k,s in json.loads(meta.get('param_shapes', '{}')).items()}
        shape = lambda m: (c.get('batch', 1), c[f'N{m}'], c['backbone_dim'])
        self.features = {m: self.tensors[f'inputs/x{m}'] if f'inputs/x{m}' in self.tensors else recipe(f'x{m}', shape(m), self.seed, is_input=True)
                         for m in MAGS if f'N{m}' in c and 'backbone_dim' in c}

    def group(self, prefix): return {k[len(prefix)+1:]: v for k,v in self.tensors.items() if k.startswith(prefix + '/')}
    def __getitem__(self, k): return self.tensors[k]


def close(a, b, atol): torch.testing.assert_close(a, b, atol=atol, rtol=0)


def outputs_agree(model, case):
    "Logits, hazards and survival in float32 and float64"
    for prefix,dtype,atol in (('outputs', torch.float32, 1e-5), ('outputs_f64', torch.float64, 1e-10)):
        model.to(dtype)
        with torch.no_grad(): logits = model({m: x.to(dtype) for m,x in case.features.items()})
        close(logits, case[f'{prefix}/logits'], atol)
        close(logits.sigmoid(), case[f'{prefix}/hazards'], atol)
        close((1 - logits.sigmoid()).cumprod(1), case[f'{prefix}/survival'], atol)
