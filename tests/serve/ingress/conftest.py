"""A browser, and the page of the service in it."""

import pytest
from browsing import CHROMIUM, FETCHED, FLAGS, WAIT


@pytest.fixture(scope="package")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, service):
    """The page, and all of its requests."""
    context = browser.new_context()
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    requests, problems = [], []
    tab.on("request", lambda request: requests.append(request))
    tab.on("pageerror", lambda problem: problems.append(problem))
    tab.goto(service)
    yield tab, requests
    assert not problems
    assert {request.url.removeprefix(service) for request in requests} <= FETCHED
    context.close()
