"""How long does the graph of a slide take, and how long a model that uses it?

The mean TCGA slide at 20x (13,496 patches, 2,048 features) and the graph of the largest (137,990 patches). Neighbours by search tree
beside all pairs, message passing as a matrix product beside one message per edge, and a forward pass of each graph model beside AMIL,
by turns in one process, the quickest of several.

    python benchmarks/graphs.py              # three minutes
    python benchmarks/graphs.py --n 2000     # a smaller slide
"""
import argparse, os, tempfile, time

import numpy as np
import torch
from crossfusion.core import rng, versions, write_json
from crossfusion.models.graphs import (DeepGraphSurv, PatchGCN, adjacency, edge_list, heard_softmax, heard_sum, nearest_in_features,
                                       nearest_in_space)
from crossfusion.models.protosurv import ProtoSurv
from crossfusion.models.single_scale import AMIL


def tissue(n):
    "Corners of n patches of 512 level-0 px (20x on a 40x scan), in raster order, with a third of the square left out in rags"
    side = int(np.ceil((1.5*n)**.5))
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    field = sum(np.sin(a*x/side*12 + b*y/side*12 + c) for a, b, c in rng(0, 'tissue').uniform(-3, 3, (9, 3)))
    keep = np.sort(np.argsort(field)[-n:])
    return torch.from_numpy(np.stack([x[keep], y[keep]], 1)*512)


def all_pairs(xy, k=8):
    "The same neighbours from all distances, a block of rows at a time; ties as they come"
    points = xy.float()
    return torch.cat([torch.cdist(part, points).topk(k + 1, largest=False)[1][:, 1:] for part in points.split(1024)])


def softmax_by_edge(edges, m, t):
    "GEN's mean with one message per edge: gather, exponentials relative to the loudest heard, scatter"
    speaks, hears = edges
    index, said = hears[:, None].expand(-1, m.shape[1]), m[speaks]
    top = torch.full_like(m, -torch.inf).scatter_reduce(0, index, t*said.detach(), 'amax')
    w = (t*said - top[hears]).exp()
    total = torch.zeros_like(m).scatter_add(0, index, w)
    return torch.zeros_like(m).scatter_add(0, index, w*said) / total.clamp(min=1e-30)


def sum_by_edge(edges, x): return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])


def quickest(work, rounds):
    "Seconds of each piece of work: all by turns, so that a busy minute of the machine meets all of them, and of each the quickest"
    took = {what: [] for what in work}
    for _ in range(rounds):
        for what, f in work.items():
            start = time.perf_counter(); f()
            took[what].append(time.perf_counter() - start)
    return {what: min(t) for what, t in took.items()}


def with_gradient(f, x):
    "A pass forward and back"
    def run():
        x.grad = None
        f(x).sum().backward()
    x.requires_grad_()
    return run


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=13_496, help='patches of the slide')
    ap.add_argument('--largest', type=int, default=137_990, help='patches of the largest slide, of which only the graph is made')
    ap.add_argument('--d', type=int, default=2048, help='width of the features')
    ap.add_argument('--rounds', type=int, default=3, help='times that each number is taken')
    ap.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    args = ap.parse_args()
    torch.manual_seed(0)
    xy, large, x, t = tissue(args.n), tissue(args.largest), torch.randn(args.n, args.d), torch.ones(1)
    edges = edge_list(nearest_in_space(xy))
    adj, h = adjacency(edges, args.n), torch.randn(args.n, 128)
    graph = lambda xy: adjacency(edge_list(nearest_in_space(xy)), len(xy))
    work = {'graph: search tree': lambda: graph(xy), 'graph: all pairs': lambda: adjacency(edge_list(all_pairs(xy)), args.n),
            'graph of the largest slide: search tree': lambda: graph(large),
            'graph of features': lambda: adjacency(edge_list(nearest_in_features(x)), args.n),
            'sum: matrix product': with_gradient(lambda h: heard_sum(adj, h), h),
            'sum: by edge': with_gradient(lambda h: sum_by_edge(edges, h), h),
            'softmax: matrix product': with_gradient(lambda h: heard_softmax(adj, h.relu(), t), h),
            'softmax: by edge': with_gradient(lambda h: softmax_by_edge(edges, h.relu(), t), h)}
    models = {'AMIL': AMIL(args.d), 'Patch-GCN': PatchGCN(args.d), 'DeepGraphSurv, spatial edges': DeepGraphSurv(args.d, edges='spatial'),
              'DeepGraphSurv, latent edges': DeepGraphSurv(args.d), 'ProtoSurv': ProtoSurv(args.d)}

    @torch.no_grad()
    def forward(model): return model({20: x[None]}, {20: xy[None]})
    work |= {f'forward: {name}': lambda m=model.eval(): forward(m) for name, model in models.items()}
    found = {}
    for what, seconds in quickest(work, args.rounds).items():
        base = 'forward: AMIL' if what.startswith('forward') else what.replace('all pairs', 'search tree').replace('by edge', 'matrix product')
        ratio = seconds/found[base]['seconds'] if base != what else None
        found[what] = dict(seconds=seconds, ratio=ratio)
        print(f'{what}: {seconds:.3f} s' + (f', {ratio:.1f} times {base}' if ratio else ''))
    differ = (heard_softmax(adj, h.relu(), t) - softmax_by_edge(edges, h.relu(), t)).abs().max().item()
    out = args.out or f'{tempfile.mkdtemp()}/graphs.json'
    write_json(out, dict(n=args.n, largest=args.largest, d=args.d, edges=edges.shape[1], threads=torch.get_num_threads(),
                         processors=os.cpu_count(), softmax_differ=differ, versions=versions(('crossfusion', 'numpy', 'scipy', 'torch')), results=found))
    print(out)


if __name__ == '__main__': main()
