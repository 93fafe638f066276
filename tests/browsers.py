"""Firefox and WebKit as Debian ships them, by their own protocols: `with Firefox() as view: view.open(url)`.

Playwright drives browsers that it has patched itself. What these two speak is WebDriver: WebKit over HTTP,
Firefox over a socket (Marionette, below geckodriver, which Debian does not have).
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest


def program(name, *places):
    """The path of a program; the test that asks for one that is not there is skipped."""
    for place in (shutil.which(name), *places):
        if place and Path(place).exists():
            return place
    pytest.skip(f"no {name} on this machine")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def patiently(call, seconds=60):
    """What a call returns once it no longer fails, as the program that it calls is there."""
    last = time.monotonic() + seconds
    while True:
        try:
            return call()
        except OSError:
            if time.monotonic() > last:
                raise
            time.sleep(0.1)


class Browser:
    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        self.port = free_port()

    def start(self, *command, **options):
        """Start a program with nothing of the user's."""
        own = {"HOME": self.folder.name, "XDG_RUNTIME_DIR": self.folder.name}
        env = os.environ | own | options.pop("env", {})
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(command, env=env, **quiet, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.quit()
        for process in reversed(self.processes):
            process.terminate()
            process.wait(60)
        self.folder.cleanup()

    def wait_for(self, condition, seconds=60):
        """Wait until an expression of JavaScript is true."""
        last = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < last, condition
            time.sleep(0.1)


class Firefox(Browser):
    def __init__(self):
        path = program("firefox-esr", shutil.which("firefox"))
        super().__init__()
        settings = Path(self.folder.name) / "user.js"
        settings.write_text(f'user_pref("marionette.port", {self.port});')
        self.start(path, "--headless", "--marionette", "--no-remote", "--profile", self.folder.name)
        self.socket = patiently(lambda: socket.create_connection(("127.0.0.1", self.port)))
        self.answers = self.socket.makefile("rb")
        self.receive()  # its greeting
        self.call("WebDriver:NewSession", {})

    # a message is its length in bytes, a colon, and JSON

    def receive(self):
        length = b""
        while not length.endswith(b":"):
            length += self.answers.read(1)
        return json.loads(self.answers.read(int(length[:-1])))

    def call(self, name, values):
        message = json.dumps([0, 0, name, values]).encode()
        self.socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self.receive()
        assert error is None, error
        return result

    def open(self, url):
        self.call("WebDriver:Navigate", {"url": url})

    def run(self, script):
        return self.call("WebDriver:ExecuteScript", {"script": script, "args": []})["value"]

    def quit(self):
        self.call("Marionette:Quit", {"flags": ["eForceQuit"]})


class WebKit(Browser):
    """Safari's engine: MiniBrowser of WebKitGTK, which needs a screen; Xvfb is one."""

    def __init__(self):
        driver = program("WebKitWebDriver")
        screen = program("Xvfb")
        folders = sorted(Path("/usr/lib").glob("*/webkit2gtk-*/MiniBrowser"))
        path = program("MiniBrowser", *folders)
        super().__init__()
        read, write = os.pipe()
        self.start(screen, "-displayfd", str(write), "-nolisten", "tcp", pass_fds=[write])
        os.close(write)
        with open(read) as number:
            display = ":" + number.readline().strip()
        self.start(driver, f"--port={self.port}", env={"DISPLAY": display})
        patiently(lambda: self.call("GET", "/status"))
        options = {"binary": str(path), "args": ["--automation"]}
        wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
        session = self.call("POST", "/session", {"capabilities": wanted})
        self.session = f"/session/{session['sessionId']}"

    def call(self, method, path, values=None):
        url = f"http://127.0.0.1:{self.port}{path}"
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(url, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self.call("POST", f"{self.session}/url", {"url": url})

    def run(self, script):
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def quit(self):
        self.call("DELETE", self.session)
