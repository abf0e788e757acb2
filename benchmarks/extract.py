"""Does extraction keep its encoder busy, and how long does a large slide take to plan?

Three questions, each by a ratio of two times from one run, measured in turn, the quickest of each.

1. One core, EfficientNet-Lite0: patches a second of the whole extraction (open, tissue, grid, read, resize, encode, write) against
   patches a second of the encoder alone on patches that lie in memory.
2. An encoder that leaves the processors alone, as one on a GPU does: it answers after a fixed time per patch, asleep, 50 patches a
   second for each core that reads for it. Reading has to hide behind it. Against the rate of that encoder alone, with the time in
   which the readers start and without.
3. Tissue and grid of a slide of 40,000 x 40,000 pixels, with the usual levels of a pyramid and with none.

    python benchmarks/extract.py               # five minutes on 2 cores
    python benchmarks/extract.py --quick       # a smaller slide in 3
"""
import argparse, os, tempfile, time
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

from crossfusion.core import versions, write_json
from crossfusion.simulate.slides import paint_slide, plan_slide as plan_painting, write_slide
from crossfusion.wsi.encoders import efficientnet_lite0
from crossfusion.wsi.extract import encode, extract, plan_slide, read_cells


class Asleep:
    "An encoder that takes its time without using the processor"
    name,n_features = 'asleep', 64
    def __init__(self, seconds): self.seconds,self.begun = seconds, None
    def __call__(self, images):
        if len(images) > 2: self.begun = self.begun or time.perf_counter()   # not the check before the start
        time.sleep(self.seconds*len(images))
        return np.zeros((len(images), 64), np.float32)


def timed(f):
    wall,cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def one_core(folder, repeats):
    "Rate of extraction over rate of the encoder alone, by the clock and by processor time"
    slide,encoder = folder/'a.tiff', efficientnet_lite0()
    write_slide(slide, paint_slide(plan_painting(.4, .3, .1, 'a', size=(4096,4096))))
    grid = plan_slide(slide).grid
    n,images = sum(map(len, grid.coords.values())), read_cells(slide, grid, range(len(grid)))[0][:336]
    encode(images[:64], encoder)                               # warm
    alone,whole = [], []
    for k in range(repeats):
        alone.append(timed(lambda: encode(images, encoder)))
        whole.append(timed(lambda: extract(slide, folder/f'bags{k}', encoder, n_workers=1)))
    (wall,cpu),(wall_all,cpu_all) = (map(min, zip(*o)) for o in (alone, whole))
    return dict(patches=n, encoder_patches_per_second=len(images)/wall, of_the_encoders_rate=wall/len(images)/(wall_all/n),
                by_processor_time=cpu/len(images)/(cpu_all/n))


def as_on_a_gpu(folder, n_slides, seconds, repeats):
    "The same for an encoder that computes elsewhere, with as many readers as there are cores"
    (folder/'slides').mkdir()
    write_slide(folder/'b.tiff', paint_slide(plan_painting(.4, .3, .1, 'b', size=(8192,6144))))
    for i in range(n_slides): os.link(folder/'b.tiff', folder/f'slides/s{i}.tiff')
    runs,images = [], np.zeros((112,8,8,3), np.uint8)
    for k in range(repeats):
        encoder,begin = Asleep(seconds), time.perf_counter()
        log = extract(folder/'slides', folder/f'asleep{k}', encoder, n_workers=os.cpu_count(), batch_size=112)
        end = time.perf_counter()
        runs.append((end - encoder.begun, end - begin))
    n = int(log[['n5','n10','n20']].sum().sum())
    alone = min(timed(lambda: encoder(images))[0] for _ in range(5))/112
    working,whole = map(min, zip(*runs))
    return dict(readers=os.cpu_count(), patches=n, encoder_patches_per_second=1/alone, of_the_encoders_rate=alone*n/working, with_start=alone*n/whole)


def large_slide(path, px, levels):
    "A slide of px x px pixels: one painted square, repeated with glass between"
    square = np.asarray(paint_slide(plan_painting(.4, .3, .1, 'large', size=(2048,2048))))
    with tifffile.TiffWriter(path, bigtiff=True) as t:
        for k in levels:
            one = np.asarray(Image.fromarray(square).reduce(k)) if k > 1 else square
            n,per = -(-(px//k)//256), one.shape[0]//256
            tiles = (np.ascontiguousarray(one[i%per*256:i%per*256+256, j%per*256:j%per*256+256]) for i in range(n) for j in range(n))
            t.write(tiles, shape=(px//k, px//k, 3), dtype=np.uint8, tile=(256,256), photometric='rgb', compression='jpeg', compressionargs=dict(level=80),
                    subfiletype=int(k > 1), resolution=(1e4/(.25*k),)*2, resolutionunit='CENTIMETER', metadata=None, maxworkers=os.cpu_count())


def planning(folder, px):
    "Seconds for tissue, grid and picture of one slide"
    out = {}
    for name,levels in (('pyramid', (1,4,8)), ('one level', (1,))):
        path = folder/f'{name}.tiff'
        large_slide(path, px, levels)
        plans = []
        out[name] = min(timed(lambda: plans.append(plan_slide(path, picture=folder/'picture.jpg')))[0] for _ in range(3 if name == 'pyramid' else 1))
        path.unlink()
    return dict(px=px, patches=sum(map(len, plans[0].grid.coords.values())), seconds=out)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='10,000 pixels instead of 40,000, one run instead of five')
    parser.add_argument('--out', default='', help='JSON file to write; default a temporary one')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        folder,results = Path(d), {}
        r = results['one core'] = one_core(folder, 1 if args.quick else 6)
        print(f"one core, EfficientNet-Lite0: extraction runs at {r['by_processor_time']:.0%} of the encoder's own rate by processor time, "
              f"which other programs do not disturb, {r['of_the_encoders_rate']:.0%} by the clock")
        r = results['an encoder elsewhere'] = as_on_a_gpu(folder, 1 if args.quick else 2, .02/os.cpu_count(), 1 if args.quick else 3)
        print(f"an encoder elsewhere, {r['encoder_patches_per_second']:.0f} patches a second: {r['of_the_encoders_rate']:.0%} of its rate, {r['with_start']:.0%} with the start")
        r = results['planning'] = planning(folder, 10_000 if args.quick else 40_000)
        print(f"tissue and grid of {r['px']:,} x {r['px']:,} px: " + ', '.join(f'{k} {v:.1f} s' for k,v in r['seconds'].items()))
    out = Path(args.out or f'{tempfile.mkdtemp()}/extract.json')
    write_json(out, dict(processors=os.cpu_count(), versions=versions(), results=results))
    print(out)
