"""How fast is CrossFusion, and how much memory does it take?

Forward pass at the mean TCGA slide (2,048 features) and at the largest (512 features), a training step at the mean slide, and the
attention maps of the largest. Each way of computing is held against two others. One is the textbook way: every projection and every
convolution by itself, all tokens through the last layer, float32. The other is what the published program does, which is the same
with the dropout of self-attention left on: then no attention kernel of this processor will do, and every map is stored whole. And
each is held against the rate at which this machine multiplies matrices, measured between the runs. Every number comes from a
process of its own, one after the other.

    python benchmarks/model.py                       # both slides, twenty minutes on 2 cores
    python benchmarks/model.py --slides mean         # five minutes
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from crossfusion.core import versions, write_json
from crossfusion.models.attention import MultiHeadAttention
from crossfusion.models.crossfusion import CrossFusion
from crossfusion.models.grid import SumConv
from crossfusion.survival.losses import nll_survival

SLIDES = dict(mean=({5: 895, 10: 3449, 20: 13496}, 2048), largest=({5: 8600, 10: 34500, 20: 137990}, 512))
FORWARD = ('published', 'textbook', 'model', 'fast, float32', 'fast, bfloat16')
STEP = ('training step, textbook', 'training step, model', 'training step, bfloat16 autocast')
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)}


def textbook_():
    "Each convolution by itself, as drawn in the paper"
    SumConv.forward = lambda self, x: sum(c(x) for c in self.convs)


def make(slide, what):
    "What to time: a function without arguments, which gives logits where there are some"
    sizes,d = SLIDES[slide]
    torch.manual_seed(0)
    model,bag = CrossFusion(d).eval(), {m: torch.randn(1, n, d) for m,n in sizes.items()}
    with torch.no_grad():                                     # weights of a size that trained ones have, so that hazards differ between bags
        for name,p in model.named_parameters():
            if p.ndim > 1 and 'class_token' not in name: p.copy_(torch.randn_like(p)*p[0].numel()**-.5)
    if 'textbook' in what or what == 'published': textbook_()
    if what == 'published':
        for m in model.modules(): m.training = isinstance(m, MultiHeadAttention)
    if what == 'attention maps': return lambda: model.attention(bag)
    if what.startswith('training step'):
        opt = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
        def step():
            with torch.autocast('cpu', torch.bfloat16, enabled='autocast' in what): logits = model(bag)
            nll_survival(logits.float(), torch.tensor([1]), torch.tensor([True])).backward()
            opt.step(); opt.zero_grad()
        return step
    if what.startswith('fast'): model = model.fast(getattr(torch, what.split()[-1]))
    def forward():
        with torch.no_grad(): return model(bag)
    return forward


def matmul_rate(dtype, n=2500):
    "Multiplications and additions a second of this machine's matrix product, billions"
    a,best = torch.randn(n, n).to(dtype), 0.
    for _ in range(4):
        t = time.perf_counter(); a @ a; best = max(best, 2*n**3/(time.perf_counter()-t)/1e9)
    return best


def measure(slide, what):
    "One entry of the table, in this process"
    run = make(slide, what)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    before = peak()
    t = time.perf_counter()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as count: logits = run()
    seconds,memory = time.perf_counter() - t, peak() - before
    rates = {k: matmul_rate(getattr(torch, k)) for k in ('float32','bfloat16')}
    if slide == 'mean': t = time.perf_counter(); run(); seconds = time.perf_counter() - t        # the first pass was to warm up
    out = dict(seconds=seconds, extra_gib=memory, matmul_gflops=rates)
    if what in FORWARD: out |= dict(gflop=count.get_total_flops()/1e9, hazards=logits.sigmoid()[0].tolist())
    return out


def one(slide, what):
    "The same, in a process of its own"
    cmd = [sys.executable, '-W', 'ignore', __file__, '--one', slide, what]
    return json.loads(subprocess.run(cmd, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(slide, rounds):
    "All ways of computing by turns, the quickest of each"
    found = {}
    for _ in range(rounds):
        for what in (*FORWARD, *STEP) if slide == 'mean' else ('textbook', 'fast, bfloat16', 'attention maps'):
            new,old = one(slide, what), found.get(what)
            rates = {k: max(v, old['matmul_gflops'][k] if old else 0) for k,v in new['matmul_gflops'].items()}
            found[what] = (new if not old or new['seconds'] < old['seconds'] else old) | dict(matmul_gflops=rates)
    rates = {k: max(r['matmul_gflops'][k] for r in found.values()) for k in ('float32','bfloat16')}
    for what,r in found.items():
        r['speed'] = found[STEP[0] if what in STEP else 'textbook']['seconds']/r['seconds']
        line = f"{slide}, {what}: {r['seconds']:.2f} s, {r['speed']:.2f} times the textbook's speed, {r['extra_gib']:.2f} GiB"
        if what in FORWARD and 'published' in found:
            r['speed_to_published'] = found['published']['seconds']/r['seconds']
            line += f", {r['speed_to_published']:.2f} times the published program's speed"
        if 'gflop' in r:
            r['hazards_differ'] = max(abs(a-b) for a,b in zip(r['hazards'], found['textbook']['hazards']))
            r['of_matmul_rate'] = r['gflop']/r['seconds']/rates['bfloat16' if 'bfloat16' in what else 'float32']
            line += f", {r['of_matmul_rate']:.0%} of the matmul rate, hazards differ by {r['hazards_differ']:.1e}"
        print(line, flush=True)
    return found


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--slides', nargs='+', default=list(SLIDES), choices=list(SLIDES), help='which slides')
    ap.add_argument('--rounds', type=int, default=3, help='times each number of the mean slide is taken; those of the largest are taken once')
    ap.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    ap.add_argument('--one', nargs=2, help=argparse.SUPPRESS)  # slide and what: for the process of one number
    args = ap.parse_args()
    if args.one: return print(json.dumps(measure(*args.one)))
    results = {s: compare(s, args.rounds if s == 'mean' else 1) for s in args.slides}
    out = Path(args.out or f'{tempfile.mkdtemp()}/model.json')
    write_json(out, dict(threads=torch.get_num_threads(), processors=os.cpu_count(), versions=versions(), results=results))
    print(out)


if __name__ == '__main__': main()
