"""The dashboard's page in a real browser (headless Chromium), with a real daemon and a worker that speaks the protocol."""

from __future__ import annotations

import os
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import ReplicaState
from nnsight_hpc.wire.workers import Outcome
from tests.client.dashboard import daemon_of_ones_own, folder_of
from tests.daemon.process import Worker, send, wait_for

HOSTILE = "<script>window.bad = 1</script><img src=x onerror='window.bad = 1'>"


@pytest.fixture(scope="module")
def daemon():
    """It has no pools and no requests at first; the tests go on where the one before has left it."""
    with daemon_of_ones_own() as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture(scope="module")
def browser(dashboard, daemon):
    """One page, which is never loaded again; nothing that it does is refused by its own policy, or fails."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "HOME", "XDG_CONFIG_HOME"), str(folder_of(daemon)))}
    service = webdriver.ChromeService("/usr/bin/chromedriver", env=environment)
    browser = webdriver.Chrome(options=options, service=service)
    browser.get(dashboard.url)
    browser.execute_script("window.first = true")
    yield browser
    browser.quit()


def text(browser, section: str) -> str:
    return browser.find_element(By.ID, section).text


def until(browser, section: str, *words: str) -> None:
    """Wait until all of these words are there."""
    waiting = WebDriverWait(browser, 120, poll_frequency=0.05)
    waiting.until(lambda _: all(word in text(browser, section) for word in words), f"{words} in {section}")


def row(browser, section: str, first: str) -> list[str]:
    """The cells of the row that begins so."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    [found] = [cells for cells in browser.execute_script(script, f"#{section} tbody tr") if cells[0] == first]
    return found


def test_a_daemon_without_anything_says_so(browser):
    """Each section has words where a table would be empty."""
    until(browser, "link", "Live")
    assert text(browser, "pools").startswith("No pools yet")
    assert text(browser, "own") == "You have sent no requests."
    assert text(browser, "queue") == "0 requests wait, 0 run."
    assert text(browser, "throughput").startswith("0.00 requests/s in the last minute")
    assert text(browser, "daemon").startswith("Daemon of ")


def test_a_pool_comes_and_loads_before_ones_eyes(browser, daemon):
    """Its replica's states, and how much of the weights is there."""
    daemon.up()
    until(browser, "pools", "smol", "0/1")
    worker = Worker(daemon, daemon.newest().id)
    worker.register()
    worker.report(ReplicaState.LOADING, loaded=1 << 30, total=4 << 30)
    until(browser, "pools", "loading 1.0 GiB of 4.0 GiB")
    worker.report(ReplicaState.READY, loaded=4 << 30, total=4 << 30, free=9 << 30, ends=time.time() + 7201)
    until(browser, "pools", "1/1", "ready")
    assert row(browser, "pools", "smol")[6:8] == ["4.0 GiB", "9.0 GiB"]
    until(browser, "pools", "1:59:")  # what is left of the walltime goes down by itself


def test_a_request_goes_through_its_states_without_a_reload(browser, daemon):
    """Queued, running, failed with words that are no markup; what has ended is counted; what is marked stays so."""
    worker = daemon.worker()
    ids = [new_request_id() for _ in range(2)]
    for request in ids:
        send(daemon.people(), request)
    until(browser, "own", *ids)
    assert [row(browser, "own", request)[3] for request in ids] == ["queued", "queued"]
    [lease] = worker.leases(most=1)
    worker.started(lease)
    until(browser, "own", "running")
    assert row(browser, "own", lease.id)[3] == "running"
    until(browser, "queue", "1 request waits, 1 runs.")
    worker.outcome(Outcome(id=lease.id, attempt=lease.attempt, error=InvalidInput(HOSTILE).report()))
    until(browser, "own", "failed")
    assert row(browser, "own", lease.id)[-1] == HOSTILE
    until(browser, "throughput", "1 in the last 10 minutes")
    assert browser.execute_script("return [window.first, window.bad]") == [True, None]
    browser.execute_script("getSelection().selectAllChildren(document.querySelector('#own tbody th'))")
    marked = browser.execute_script("return getSelection().toString()")
    worker.report(ReplicaState.BUSY)
    until(browser, "pools", "busy")
    assert (marked in ids, browser.execute_script("return getSelection().toString()")) == (True, marked)


def test_names_are_shown_as_text_whatever_they_are(browser, daemon):
    """A model whose name is markup is a name, and runs nothing."""
    daemon.up("evil", model=HOSTILE)
    until(browser, "pools", "evil")
    assert HOSTILE in row(browser, "pools", "evil")
    assert browser.execute_script("return [window.bad, document.images.length]") == [None, 0]
    daemon.people().call("DELETE", "/v1/pools/evil")
    wait_for(lambda: "evil" not in text(browser, "pools"))


def test_it_is_dark_where_the_browser_is(browser):
    """Light text on dark ground, and the other way round."""

    def brightness(element: str, style: str) -> int:
        colour = browser.find_element(By.CSS_SELECTOR, element).value_of_css_property(style)
        return sum(int(part) for part in colour.partition("(")[2].split(",")[:3])

    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        is_dark = brightness("section", "background-color") < brightness("section", "color")
        assert is_dark == (scheme == "dark")


def test_a_daemon_that_goes_is_waited_for(browser, daemon):
    """The page says that it is away, keeps what it has shown, and goes on with the next daemon."""
    daemon.kill()
    until(browser, "link", "Away")
    assert "smol" in text(browser, "pools")
    daemon.start()
    until(browser, "link", "Live")
    send(daemon.people(), request := new_request_id())
    until(browser, "own", request)
    assert browser.execute_script("return window.first") is True


def test_when_the_command_ends_the_page_says_so(browser, dashboard):
    """And until then the browser has had nothing to complain of."""
    complaints = [entry for entry in browser.get_log("browser") if "503" not in entry["message"]]
    assert complaints == []
    assert dashboard.interrupt()[0] == 0
    until(browser, "link", "has ended")
