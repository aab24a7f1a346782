"""A browser, and the page of the service in it.

The browser's driver runs an event loop in this thread, so it ends with the tests of the page.
"""

import pytest
from browsing import CHROMIUM, FETCHED, FLAGS, WAIT


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    tab = browser.new_page()
    tab.set_default_timeout(WAIT)
    return tab


@pytest.fixture
def opened(tab, service):
    """The page, and all of its requests."""
    requests, problems = [], []
    listeners = {"request": lambda request: requests.append(request), "pageerror": lambda error: problems.append(error)}
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(service)
    yield tab, requests
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert not problems
    assert {request.url.removeprefix(service) for request in requests} <= FETCHED
