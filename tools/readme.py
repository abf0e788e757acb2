"""Write README.md from nbs/index.ipynb, without Quarto; with --check only say whether it is what the notebook gives."""
import argparse, base64, posixpath, re, sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
index, figures = 'nbs/index.ipynb', 'index_files'
note = f'<!-- Written by tools/readme.py from {index}: change that, not this. -->'
images = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/svg+xml': 'svg'}
code = re.compile(r'(^```.*?^```[^\n]*$|^(?: {4}|\t)[^\n]*$)', re.M | re.S)
link = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[/#])([^)#"\s]+)')
name = re.compile(r'(?<![\[`])`([\w.]+)(?:\(\))?`(?![\]`])')


class Wrong(Exception): "The notebook cannot become a README"


def symbols():
    "Names that the package exports -> the notebook in which they are written"
    scope, found = {}, {}
    exec((root/'crossfusion/_modidx.py').read_text(encoding='utf-8'), scope)
    for module, names in scope['d']['syms'].items():
        for full, (_, py) in names.items():
            source = re.search(r'File to edit: [./]*([\w./]+\.ipynb)', (root/py).read_text(encoding='utf-8'))
            if source: found.setdefault(full.removeprefix(f'{module}.'), source[1])
    return found


def from_top(m):
    "A link, as seen from the top folder"
    path = posixpath.normpath(posixpath.join('nbs', m[2]))
    if not (root/path).exists(): raise Wrong(f'{index}: the link {m[2]} leads nowhere: there is no {path}. Correct the link.')
    return m[1] + path


def markdown(text, names):
    "Prose, with its links and with names in backticks linked to their notebooks; code stays as it is"
    def to_notebook(m): return f'[{m[0]}]({names[m[1]]})' if m[1] in names else m[0]
    return ''.join(p if i % 2 else name.sub(to_notebook, link.sub(from_top, p)) for i, p in enumerate(code.split(text)))


def output(out, alt, files):
    "One output of a cell as markdown; figures go to `files`"
    data = out.get('data', {'text/plain': out.get('text') or '\n'.join(out.get('traceback', []))})
    for mime, ending in images.items():
        if mime in data:
            path = f'{figures}/figure-{len(files) + 1}.{ending}'
            files[path] = data[mime].encode() if ending == 'svg' else base64.b64decode(data[mime])
            return f'![{alt}]({path})'
    for mime in ('text/markdown', 'text/html'):
        if mime in data: return re.sub(r'<style.*?</style>\s*', '', data[mime], flags=re.S)
    text = re.sub(r'\x1b\[[0-9;]*m', '', data['text/plain']).rstrip('\n')
    return '\n'.join(('    ' + o).rstrip() for o in text.split('\n'))


def build():
    "README.md and its figures: path -> bytes"
    if not (root/index).exists(): raise Wrong(f'There is no {index}. Write it: README.md is made from it.')
    nb, names, parts, files = nbformat.read(root/index, as_version=4), symbols(), [], {}
    for c in nb.cells:
        if c.cell_type == 'markdown': parts.append(markdown(c.source, names))
        if c.cell_type != 'code': continue
        d = dict(re.findall(r'^#\|[ ]*([\w-]+):?[ ]*(.*)$', c.source, re.M))
        if d.keys() & {'hide', 'export', 'exporti', 'default_exp'} or d.get('include') == 'false': continue
        source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        if source and d.get('echo') != 'false': parts.append(f'```python\n{source}\n```')
        if d.get('output') == 'false': continue
        alt = d.get('fig-alt') or d.get('fig-cap') or 'figure'
        parts += [output(o, alt, files) for o in c.outputs if o.get('name') != 'stderr']
    parts.insert(1, note)
    return {'README.md': ('\n\n'.join(p.strip('\n') for p in parts) + '\n').encode(), **files}


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true', help='write nothing; exit status 1 if README.md or a figure is not up to date')
    check = ap.parse_args().check
    try: new = build()
    except Wrong as e: sys.exit(str(e))
    old = {p.relative_to(root).as_posix(): p.read_bytes() for p in [root/'README.md', *sorted((root/figures).glob('*'))] if p.exists()}
    wrong = sorted(p for p in old.keys() | new.keys() if old.get(p) != new.get(p))
    if check:
        if wrong: sys.exit(f'Not what {index} gives: {", ".join(wrong)}. Run: python tools/readme.py')
        return
    for p in old.keys() - new.keys(): (root/p).unlink()
    for p, content in new.items():
        (root/p).parent.mkdir(exist_ok=True)
        (root/p).write_bytes(content)


if __name__ == '__main__': main()
