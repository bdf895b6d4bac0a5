"""The page in headless Chromium: what a reader does, what assistive technology is told, and what must not happen."""

import json
import shutil
import time
from pathlib import Path

import pytest

from expunge.report import write_report
from expunge.report.page import MAX_BYTES
from expunge.rows import Row, write_rows

pytest.importorskip("selenium", reason="needs selenium: pip install expunge[dev]")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.common.selenium_manager import SeleniumManager
from selenium.webdriver.support.select import Select

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's Chromium: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync --disable-extensions"
)
# a script, an image and a request, should anything take the text for HTML
HOSTILE = (
    "<script>window.ran = 1; fetch('https://example.invalid/a')</script>"
    "<img src=https://example.invalid/b onerror='window.ran = 1'>"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})

    def refuse(*_):
        raise AssertionError("Selenium looks for a driver of its own")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeleniumManager, "binary_paths", refuse)
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def report(make_run, run_rows, figure_rows, one_sample, checkpoint_rows, tmp_path_factory) -> Path:
    """A run with hostile names and texts, figures to sort, checkpoints, and both veiled and open samples."""
    folder = tmp_path_factory.mktemp("runs") / "run <img src=x onerror=window.ran=1>"
    folder.mkdir()
    rows = [*run_rows(), Row("evaluate", "reference", "word_perplexity", 80.0, n=4, dataset="b")]
    rows += [
        *figure_rows("word_perplexity", 9.5, 9.0, dataset="a"),
        *figure_rows("word_perplexity", 1234.0, 8.0, dataset="c"),
    ]
    rows += [Row("evaluate", "unlearned", "word_perplexity", 7.0, n=4, dataset="d")]
    rows += [Row("evaluate", "reference", "toxicity_probability", 0.5, n=4, dataset="e", k=k, side=HOSTILE) for k in (8, 16)]
    samples = [
        one_sample(who, i, score, prompt=f"prompt {i} {HOSTILE}", continuation=f"{who} {i} {HOSTILE}")
        for i, before, after in ((0, 0.1, 0.2), (1, 0.9, 0.3), (2, 0.4, 0.1))
        for who, score in (("reference", before), ("unlearned", after))
    ]
    make_run(folder, rows, samples)
    write_rows(folder / "checkpoints.jsonl", checkpoint_rows({20: (1.1, 0.5), 100: (1.2, 0.75), 9: (1.05, 0.9)}))
    (folder / "config.yaml").write_text(json.dumps({"model": HOSTILE, "method": {"name": HOSTILE}}), encoding="utf-8")
    return write_report(folder)


@pytest.fixture
def page(browser, report):
    """The report, freshly loaded, its full table open; nothing is left in the logs."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(report.as_uri())
    browser.execute_script("document.querySelector('#figures details').open = true")
    return browser


def requests(browser) -> set[str]:
    """What was asked for since the log was last read, without what the page's policy stopped."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["requestId"]: m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
    stopped = {params["requestId"] for params in failed if params.get("blockedReason") == "csp"}
    return {params["request"]["url"] for number, params in asked.items() if number not in stopped}


def spoken(browser) -> str:
    """All text that assistive technology is offered."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return "\n".join(str(node["name"].get("value")) for node in nodes if not node["ignored"] and "name" in node)


def group(page, table: str, name: str) -> list[str]:
    """The labels of one group of a table, in the order shown."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody')]"
        ".find((body) => body.rows[0].textContent.trim() === arguments[1])"
        ".querySelectorAll('tr:not(.group) th').values().map((head) => head.textContent.trim()).toArray()",
        table,
        name,
    )


def head(page, table: str, name: str):
    (found,) = [h for h in page.find_elements(By.CSS_SELECTOR, f"{table} thead button") if h.text.split()[0] == name]
    return found


def emulate(page, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")  # the page is told


def background(page) -> str:
    return page.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_nothing_hostile_runs_and_nothing_is_asked_for(page):
    page.find_element(By.ID, "reveal-all").click()
    head(page, "#figures", "reference").click()
    page.find_element(By.ID, "theme").click()
    time.sleep(0.2)
    assert page.execute_script("return window.ran") is None
    assert page.execute_script("return document.images.length + document.scripts.length") == 1
    assert requests(page) == {page.current_url}
    assert page.get_log("browser") == []
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, ".prompt .text").text


def test_the_controls_of_that_test(browser, tmp_path):
    """A page that does run the same text: script, request and console message are all seen."""
    path = tmp_path / "page.html"
    path.write_text(f"<p>{HOSTILE}</p>", encoding="utf-8")
    browser.get(path.as_uri())
    time.sleep(0.2)
    assert browser.execute_script("return window.ran") == 1
    assert requests(browser) >= {"https://example.invalid/a", "https://example.invalid/b"}
    assert any("example.invalid" in entry["message"] for entry in browser.get_log("browser"))


def test_the_policy_stops_what_a_mistake_in_escaping_would_let_in(browser, report, tmp_path):
    path = tmp_path / "page.html"
    html = report.read_text(encoding="utf-8").replace("</main>", f"{HOSTILE}<b onclick='window.ran = 1'>b</b></main>")
    path.write_text(html, encoding="utf-8")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelector('main > b').click()")
    time.sleep(0.2)
    assert browser.execute_script("return window.ran") is None
    assert not any(url.startswith("http") for url in requests(browser))
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_reveal_one(page):
    button = page.find_element(By.CSS_SELECTOR, "button.reveal[aria-controls='spread-2-reference']")
    text = page.find_element(By.ID, "spread-2-reference")
    assert text.value_of_css_property("color") == "rgba(0, 0, 0, 0)"
    assert "reference 1 " not in spoken(page)
    assert "Show the reference continuation of sample spread-2" in spoken(page)
    button.click()
    assert text.value_of_css_property("color") == page.find_element(By.TAG_NAME, "body").value_of_css_property("color")
    assert "reference 1 " in spoken(page)
    assert "prompt 1 " not in spoken(page)
    assert button.get_attribute("aria-expanded") == "true"
    button.click()
    assert "reference 1 " not in spoken(page)


def test_reveal_all_and_hide_again(page):
    button = page.find_element(By.ID, "reveal-all")
    hidden = "return document.querySelectorAll('.text[inert]').length"
    before = page.execute_script(hidden)
    assert before == 2
    button.click()
    assert page.execute_script(hidden) == 0
    assert "reference 1 " in spoken(page) and "prompt 1 " in spoken(page)
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.execute_script(hidden) == before


SORTED = {"ascending": ["a", "b", "c", "d"], "descending": ["c", "b", "a", "d"], None: ["b", "a", "c", "d"]}


@pytest.mark.parametrize("keys", [None, [Keys.ENTER, Keys.SPACE, Keys.ENTER]], ids=["mouse", "keyboard"])
def test_sort_by_value_within_a_group_and_back(page, keys):
    """Values 9.5, 80, 1,234 and none: neither as text nor with the gap first."""
    others = group(page, "#figures", "toxicity")
    button = head(page, "#figures", "reference")
    cell = button.find_element(By.XPATH, "..")
    assert cell.get_attribute("aria-sort") is None
    for number, (order, labels) in enumerate(SORTED.items()):
        if keys:
            page.execute_script("arguments[0].focus()", button)
            page.switch_to.active_element.send_keys(keys[number])
        else:
            button.click()
        assert cell.get_attribute("aria-sort") == order
        assert group(page, "#figures", "word perplexity") == labels
    assert group(page, "#figures", "toxicity") == others


def test_one_column_sorts_at_a_time_and_labels_by_their_numbers(page):
    head(page, "#figures", "reference").click()
    head(page, "#figures", "figure").click()
    assert len(page.find_elements(By.CSS_SELECTOR, "#figures [aria-sort]")) == 1
    ks = [int(label.split("k = ")[1]) for label in group(page, "#figures", "toxicity probability")]
    assert ks == [8, 16]
    head(page, "#figures", "figure").click()
    ks = [int(label.split("k = ")[1]) for label in group(page, "#figures", "toxicity probability")]
    assert ks == [16, 8]


def test_checkpoints_sort(page):
    name = "sampled, challenge, ngram"
    assert group(page, "#frontier", name) == ["9", "20", "100"]
    page.find_elements(By.CSS_SELECTOR, "#frontier thead button")[4].click()
    assert group(page, "#frontier", name) == ["20", "100", "9"]
    assert len(page.find_elements(By.CSS_SELECTOR, "#frontier circle.best")) == 2


def test_samples_sort(page):
    select = Select(page.find_element(By.CSS_SELECTOR, "#order select"))
    prompts = "return [...document.querySelectorAll('.prompt .text')].map((text) => text.textContent.split(' ')[1])"
    wanted = {"reference": "120", "unlearned": "102", "rise": "021", "fall": "120", "": "012"}
    for value, order in wanted.items():
        select.select_by_value(value)
        assert "".join(page.execute_script(prompts)) == order, value


def test_colours_follow_the_system_and_the_button(page):
    emulate(page, "light")
    light = background(page)
    emulate(page, "dark")
    dark = background(page)
    assert light != dark
    button = page.find_element(By.ID, "theme")
    assert button.text == "Light colours"
    button.click()
    assert (background(page), button.text) == (light, "Dark colours")
    emulate(page, "light")
    emulate(page, "dark")
    assert background(page) == light  # the button outlasts the system
    button.click()
    assert background(page) == dark
    emulate(page, "light")
    assert (background(page), button.text) == (light, "Dark colours")  # as the system again: followed again


CONTRASTS = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const found = channels(getComputedStyle(e).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
};
const written = [...document.body.querySelectorAll("*")].filter((e) =>
  !e.closest("[inert], script, title, noscript") && e.getClientRects().length &&
  [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim()));
return written.map((e) => {
  const style = getComputedStyle(e);
  const [a, b] = [channels(e instanceof SVGElement ? style.fill : style.color), behind(e)].map(luminance);
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.getAttribute("class")];
}).sort((x, y) => x[0] - y[0]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(page, scheme):
    """WCAG 2.2, 1.4.3: 4.5 to 1, for each element with text, by the computed colours."""
    emulate(page, scheme)
    page.find_element(By.ID, "reveal-all").click()
    found = page.execute_script(CONTRASTS)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:3]
    page.execute_script("document.body.style.color = '#888'; document.body.style.backgroundColor = '#777'")
    assert page.execute_script(CONTRASTS)[0][0] < 1.5  # the measure sees a bad pair


def test_tab_reaches_every_control_in_order_and_shows_where_it_is(page):
    controls = page.execute_script(
        "const found = [...document.querySelectorAll('a[href], button, select, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility());"
        "found.forEach((e, i) => (e.dataset.at = i)); return found.length"
    )
    assert controls > 30
    reached = []
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    for _ in range(controls):
        focused, outline = page.execute_script(
            "const e = document.activeElement; return [e.dataset.at, getComputedStyle(e).outlineStyle]"
        )
        assert outline == "solid", focused
        reached.append(int(focused))
        page.switch_to.active_element.send_keys(Keys.TAB)
    assert reached == list(range(controls))


def test_a_phone_scrolls_one_way(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    page.find_element(By.ID, "reveal-all").click()
    assert page.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]


def test_without_script_nothing_pretends_to_work(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report.as_uri())
        texts = [button.text for button in browser.find_elements(By.TAG_NAME, "button") if button.is_displayed()]
        assert "Dark colours" not in texts and "reference" not in texts
        assert not browser.find_element(By.ID, "order").is_displayed()
        assert "reference 1 " not in spoken(browser)
        assert "Hidden text needs the page's script" in browser.find_element(By.TAG_NAME, "main").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_large_run_opens(browser, make_run, figure_rows, one_sample, checkpoint_rows, tmp_path):
    text = "word " * 40
    samples = [
        one_sample(who, i, i / 20_000, prompt=text, continuation=text)
        for i in range(10_000)
        for who in ("reference", "unlearned")
    ]
    rows = [
        row for k in range(2_100) for row in figure_rows("toxicity", 1 / 3, 1 / 7, side="rejected", decode="sampled", k=k)
    ]
    write_rows(tmp_path / "checkpoints.jsonl", checkpoint_rows({i: (1 + i / 1000, 1 / i) for i in range(1, 501)}))
    path = write_report(make_run(tmp_path, rows, samples))
    assert path.stat().st_size <= MAX_BYTES
    started = time.monotonic()
    browser.get(path.as_uri())
    assert "24 of 10,000 samples" in browser.find_element(By.TAG_NAME, "main").text
    assert time.monotonic() - started < 20
