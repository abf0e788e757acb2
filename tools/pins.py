"""Write constraints.txt: the exact versions of what is installed in this environment, to be run where all tests have passed."""
import platform, re, subprocess, sys
from importlib.metadata import metadata
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def pin(line):
    "name==version, without the build's label (+cpu), and only for the Pythons that the version is made for"
    name, ver = line.split('==')
    needs = re.search(r'>=\s*3\.(\d+)', metadata(name).get('Requires-Python') or '')
    marker = f' ; python_version >= "3.{needs[1]}"' if needs and int(needs[1]) > 10 else ''
    return f'{name}=={ver.split("+")[0]}{marker}'


def main():
    freeze = subprocess.run([sys.executable, '-m', 'pip', 'freeze', '--exclude-editable'], capture_output=True, text=True, check=True).stdout
    pins = sorted((pin(o) for o in freeze.splitlines() if re.match(r'[\w.-]+==', o)), key=lambda o: o.split('==')[0].lower())
    head = f'# Versions that passed all tests together, with Python {platform.python_version()} on {platform.system()}. Written by tools/pins.py.\n'
    (root/'constraints.txt').write_text(head + '\n'.join(pins) + '\n', encoding='utf-8')
    print(f'{len(pins)} versions in constraints.txt')


if __name__ == '__main__': main()
