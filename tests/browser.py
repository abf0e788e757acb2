"Headless Chromium, driven by its DevTools protocol: look at a page as a person would"
import base64, json, shutil, signal, socket, subprocess, tempfile, time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from websockets.sync.client import connect


def chromium():
    "The browser's program, or None"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Browser:
    "One page of a browser of its own"
    def __init__(self, width=1280, height=900, scale=1):
        self.home, self.count, self.seen = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), 0, []
        self.size, self.stack = (width, height, scale), ExitStack()
        self.process = subprocess.Popen([chromium(), '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--hide-scrollbars', '--remote-debugging-port=0', f'--user-data-dir={self.home.name}',
            'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def __enter__(self):
        try:
            port_file = Path(self.home.name)/'DevToolsActivePort'
            self.until(lambda: port_file.exists() and port_file.read_text().count('\n'), 30)
            port = port_file.read_text().split()[0]
            page = next(t for t in json.load(urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page')
            self.socket = self.stack.enter_context(connect(page['webSocketDebuggerUrl'], max_size=None))
            for domain in ('Page', 'Network', 'Runtime', 'Log'): self.call(f'{domain}.enable')
            self.resize(*self.size)
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *args):
        self.stack.close()
        self.process.send_signal(signal.SIGTERM)
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        self.home.cleanup()

    def call(self, method, **params):
        "A command of the protocol; what the page did meanwhile is kept in `seen`"
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (answer := json.loads(self.socket.recv(60))).get('id') != self.count: self.seen.append(answer)
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']

    def js(self, expression):
        "The value of an expression in the page"
        r = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in r, r['exceptionDetails']
        return r['result'].get('value')

    def until(self, true, seconds=60):
        "Wait until a function, or an expression in the page, is true"
        end = time.monotonic() + seconds
        while not (value := true() if callable(true) else self.js(true)):
            assert time.monotonic() < end, f'not true after {seconds} s: {true}'
            time.sleep(.05)
        return value

    def resize(self, width, height, scale=1):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)

    def open(self, url):
        self.call('Page.navigate', url=str(url))
        self.until('document.readyState === "complete" && location.href !== "about:blank"')

    def click(self, x, y):
        for kind in ('mouseMoved', 'mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, **({} if kind == 'mouseMoved' else dict(button='left', clickCount=1)))

    def screenshot(self, path, full=False):
        "The page as a PNG file; `full`: with what lies below the window"
        data = self.call('Page.captureScreenshot', captureBeyondViewport=full)['data']
        Path(path).write_bytes(base64.b64decode(data))

    @property
    def requests(self) -> list: # addresses the page asked for, its own and inlined data left out
        return [u for e in self.seen if e.get('method') == 'Network.requestWillBeSent' and not (u := e['params']['request']['url']).startswith('data:')]

    @property
    def errors(self) -> list: # what the console complained about
        return [e['params'] for e in self.seen if e.get('method') == 'Runtime.exceptionThrown'
                or e.get('method') == 'Log.entryAdded' and e['params']['entry']['level'] == 'error']
