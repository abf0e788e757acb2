"""Run notebooks in a real Jupyter kernel, store their outputs, clean them.

Cells that the tests skip (`#| notest`, `#| slow`, `#| eval: false`) are skipped here too and keep the outputs
they have; `--flags slow` runs the slow ones. Outputs are kept comparable: no execution counts, stable widget ids.
"""
import argparse, json, os, re, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).resolve().parent.parent
skip = re.compile(r'^\s*#\|\s*(notest|slow)\b|^\s*#\|\s*eval:\s*false\b', re.M)


class Client(NotebookClient):
    "Runs what the tests would run, and no more"
    flags = ()

    async def async_execute_cell(self, cell, *args, **kwargs):
        found = skip.search(cell.source) if cell.cell_type == 'code' else None
        if found and found[1] not in self.flags: return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def stable_widgets(text):
    "Number the widgets' random ids in the order in which they appear"
    ids = dict.fromkeys(re.findall(r'"([0-9a-f]{32})"', text))
    for i, o in enumerate(ids): text = text.replace(o, f'{i:032x}')
    return text


def run(path, flags=()):
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop('widgets', None)
    client = Client(nb, timeout=1800, kernel_name='python3', coalesce_streams=True, resources={'metadata': {'path': str(path.parent)}})
    client.flags = flags
    try: client.execute()
    except CellExecutionError as e: sys.exit(f'{path}: {e}')
    for c in nb.cells:
        c.metadata.pop('execution', None)
        if c.cell_type == 'code':
            c.execution_count = None
            c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
            for o in c.outputs:
                if 'execution_count' in o: o.execution_count = None
    text = nbformat.writes(nb)
    if 'application/vnd.jupyter.widget-state+json' in text: text = stable_widgets(text)
    path.write_text(text if text.endswith('\n') else text + '\n', encoding='utf-8')
    os.system(f'nbdev_clean --fname "{path}"')


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--nbs', nargs='*', help='notebooks (default: all)')
    ap.add_argument('--flags', default='', help='directives to run as well, for instance: slow')
    args = ap.parse_args()
    os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    paths = [Path(p).resolve() for p in args.nbs] if args.nbs else sorted(
        p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('_'))
    for p in paths:
        print(p.relative_to(root), flush=True)
        run(p, tuple(args.flags.split()))


if __name__ == '__main__': main()
