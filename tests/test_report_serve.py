"""The live report: a page that follows the run, on this machine only, and hands out no file."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.cli import main
from tests.browser import CHROMIUM, Browser
from tests.run_folder import RunFolder


class Served:
    """`jepa report RUN --serve` as a process of its own."""

    def __init__(self, run, *words):
        command = [sys.executable, "-m", "pipeline.cli", "report", str(run), "--serve"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--every-seconds", "0.2", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = self.process.stdout.readline().strip()
        self.port = int(re.search(r":(\d+)/$", self.address)[1])

    def get(self, path, *, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return RunFolder(tmp_path_factory.mktemp("live") / "demo").start().steps(1, 40)


@pytest.fixture(scope="module")
def served(run):
    served = Served(run.path)
    yield served
    code, errors = served.end()
    assert code == 0, errors


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_in_a_browser_the_figures_move_when_the_run_goes_on_and_nothing_complains(
    run, served, tmp_path
):
    browser = Browser(tmp_path / "profile")
    live = "document.querySelector('#live')?.textContent ?? ''"
    tile = "document.querySelector('.tile b').textContent"
    curve = "[...document.querySelectorAll('figure.wide path')].map((p) => p.outerHTML).join()"
    folded = "document.querySelectorAll('details').forEach((one) => { one.open = true; }) ?? true"
    is_open = "[...document.querySelectorAll('details')].every((one) => one.open)"
    try:
        old, new, errors = browser.visit(
            served.address,
            [f"({live}).includes('step 40') && {tile}", curve, folded, "document.title"],
            lambda: run.steps(41, 60),
            [f"({live}).includes('step 60') && {tile}", curve, is_open],
        )
    finally:
        browser.close()
    assert (old[0], new[0], old[3]) == ("40", "60", "demo · jepa")
    assert len(old[1]) > 500
    assert new[1] != old[1]
    assert errors == []


def test_nothing_but_the_page_is_handed_out_and_only_to_who_names_this_machine(served):
    answer, page = served.get("/")
    assert answer.status == 200
    assert b"</html>" in page
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    state = json.loads(served.get("/state")[1])
    assert {"version", "state", "step", "problem"} == set(state)
    outside = ("/../../etc/passwd", "/..%2f..%2fetc/passwd", "/config.yaml", "//etc/passwd")
    for path in (*outside, "/%2e%2e/run.json", "/live.js/../run.json", "/report.html"):
        answer, body = served.get(path)
        assert (answer.status, body) == (404, b"there is only /\n"), path
    assert served.get("/", Host="evil.example")[0].status == 403
    assert served.get("/", Host=f"localhost:{served.port}")[0].status == 200
    assert served.get("/", method="POST")[0].status == 501
    answer, body = served.get("/", method="HEAD")
    assert (answer.status, body) == (200, b"")


def test_it_listens_on_the_loopback_alone(served):
    (listening,) = {
        connection.laddr.ip
        for connection in psutil.Process(served.process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == "127.0.0.1"


def test_a_folder_that_cannot_be_read_for_a_while_is_told_and_the_page_comes_back(run, served):
    def wait_for(what):
        deadline = time.monotonic() + 120
        while not what(told := json.loads(served.get("/state")[1])):
            assert time.monotonic() < deadline, told
            time.sleep(0.1)

    served.get("/")
    probes = run.path / "probes"
    aside = probes.with_name("aside")
    if probes.exists():
        probes.rename(aside)
    probes.write_text("a file where a folder was")
    wait_for(lambda told: "Cannot read" in (told["problem"] or ""))
    assert b"</html>" in served.get("/")[1], "the last page stays"
    probes.unlink()
    if aside.exists():
        aside.rename(probes)
    run.steps(61, 80)
    wait_for(lambda told: (told["problem"], told["step"]) == (None, 80))


def test_a_port_that_is_taken_and_flags_that_contradict_are_answered(served, run, capsys):
    words = ["report", str(run.path), "--serve"]
    assert main([*words, "--port", str(served.port)]) == 2
    assert "--port 0" in capsys.readouterr().err
    assert main([*words, "--out", "x.html"]) == 2
    assert main([*words, "--port", "70000"]) == 2
    assert main(["report", str(run.path / "nowhere"), "--serve"]) == 2


def test_sigterm_ends_it_in_good_order(run):
    other = Served(run.path)
    code, _ = other.end(signal.SIGTERM)
    assert code == 0


def test_an_address_that_others_reach_is_warned_of(served, run, capsys):
    # The port is taken, so nothing is opened to anybody.
    words = ["report", str(run.path), "--serve", "--host", "0.0.0.0", "--port", str(served.port)]  # noqa: S104
    assert main(words) == 2
    assert "there is no password" in capsys.readouterr().err
