"The page in a real browser: documents in, a question, the answer with its passages and the way through the tree."

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from hiernb.files import from_root
from hiernb.rag.configuration import WEIGHTS
from hiernb.rag.snapshot import MANIFEST

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
pytest.importorskip("gradio", reason="the page needs gradio")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(not (from_root(WEIGHTS) / MANIFEST).is_file(), reason=f"no trained weights in {WEIGHTS}"),
]
NANSEN = "Fridtjof Nansen was a Norwegian polar explorer. His ship was the Fram, which was built to be frozen into the ice. "
CURIE = "Marie Curie discovered polonium and radium. She was born in Warsaw. <script>document.title = 'broken'</script>"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "A running page, started as a user starts it."
    folder = tmp_path_factory.mktemp("app")
    (folder / "config.json").write_text('{"store": {"words": 20, "overlap": 0, "tree_steps": 5}, "generator": {"may_abstain": false}}')
    (folder / "nansen.txt").write_text(NANSEN)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "hiernb.rag.app", str(folder / "nansen.txt"), "--config", str(folder / "config.json"), "--port", str(port)]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, cwd=from_root("."))
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(60)


def test_a_document_a_question_an_answer(address):
    url, folder = address
    (folder / "curie.txt").write_text(CURIE)
    asked_elsewhere = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless=new"], timeout=60_000)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(60_000)
        page.on("request", lambda r: asked_elsewhere.append(r.url) if not r.url.startswith((url, url.replace("http", "ws"), "data:", "blob:")) else None)
        page.goto(url)
        page.get_by_text("1 passages").or_(page.get_by_text("2 passages")).wait_for()
        page.set_input_files("input[type=file]", [str(folder / "nansen.txt"), str(folder / "curie.txt")])
        page.get_by_text("2 documents").wait_for()
        page.get_by_label("tree").check()
        page.locator("#question textarea").fill("What was the name of Nansen's ship?")
        page.locator("#ask").click()
        page.locator("#passages article.cited mark").first.wait_for()
        page.locator("#route svg rect").first.wait_for()
        assert page.locator("#passages article").count() >= 2
        assert "extractive generator" in page.locator("#answer").inner_text()
        assert page.title() != "broken"  # what a document says is shown, not run
        page.screenshot(path=os.environ.get("HIERNB_SCREENSHOT") or folder / "page.png", full_page=True)
        page.locator("#question textarea").fill("")
        page.locator("#ask").click()
        page.get_by_text("No answer:").wait_for()
        browser.close()
    assert not asked_elsewhere
