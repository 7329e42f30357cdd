"""The page of `surgeon graph`, used in a browser as a person uses it.

The four questions that a stranger brings are asked here by search and click: how many channels an
MLP has, what goes with one key/value head, why the vocabulary can't be cut, what ties q to k.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgeon.axes.plan import Plan, cut
from surgeon.opening import open_model
from surgeon.report.graph_page import page as page_of
from tests import models

pytestmark = pytest.mark.slow

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the extra `dev` brings it)"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as p:
        if found is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium on this machine")
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        made = p.chromium.launch(executable_path=found, args=[*quiet, "--disable-component-update"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a tiny Llama, and the same with an MLP narrowed and another dropped."""
    folder = tmp_path_factory.mktemp("page")
    axes = open_model(models.tiny("Llama")).axes
    narrow = cut(axes.get("model.layers.0.mlp/ffn"), range(20))
    plan = Plan((narrow,), (f"{LAYER}/mlp",))
    out = {"whole": page_of(axes, "llama"), "pruned": page_of(axes, "llama", plan)}
    for name, text in out.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in out}


class Seen:
    """A page that is open, and everything it asked for or complained of."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": 1400, "height": 850}, color_scheme=scheme, offline=False
        )
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(file.as_uri())
        self.url = file.as_uri()

    def text(self, selector: str) -> str:
        return " ".join(str(self.page.locator(selector).inner_text()).split())

    def nodes(self, selector: str = "") -> set[str]:
        ids = f"surgeon.view.cy.nodes({selector!r}).map((n) => n.id())"
        names = self.page.evaluate(
            f"{ids}.map((i) => surgeon.view.thing(i)).map((t) => t.name || t.path)"
        )
        return set(names)

    def at(self, name: str) -> tuple[float, float]:
        """Where a node stands on the screen."""
        x, y = self.page.evaluate(
            """(name) => {
              const thing = (n) => surgeon.view.thing(n.id());
              const called = (n) => thing(n).name || thing(n).path;
              const node = surgeon.view.cy.nodes().filter((n) => called(n) === name);
              const box = document.getElementById('graph').getBoundingClientRect();
              const at = node.renderedPosition(), high = node.renderedHeight();
              const title = node.hasClass('open') ? high / 2 - 6 : 0;  // its upper edge
              return [box.x + at.x, box.y + at.y - title];
            }""",
            name,
        )
        return x, y

    def search(self, words: str) -> None:
        self.page.locator("#search").fill(words)
        self.page.locator("#search").press("Enter")

    def pick(self, words: str, dim: int) -> None:
        self.search(words)
        self.page.locator("#details").get_by_role("button", name="pick").nth(dim).click()


@pytest.fixture
def seen(browser: Any, files: dict[str, Path]) -> Iterator[Seen]:
    found = Seen(browser, files["whole"])
    yield found
    assert found.complaints == []
    assert found.requests == [found.url]
    found.page.context.close()


def test_it_opens_with_everything_that_is_coupled(seen: Seen) -> None:
    assert "12 axes, 10 of them prunable" in seen.text("#summary")
    assert {"hidden", f"{LAYER}.mlp/ffn", f"{LAYER}.mlp.up_proj.weight"} <= seen.nodes()
    assert "model.layers.*.mlp/ffn" in seen.text("#list")
    painted = seen.page.evaluate(
        """() => [...document.querySelectorAll('#graph canvas')].reduce((sum, c) => {
          const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
          for (let i = 3; i < data.length; i += 4) sum += data[i] > 0;
          return sum; }, 0)"""
    )
    assert painted > 20_000


def test_how_many_channels_has_an_mlp(seen: Seen) -> None:
    seen.search("layers.1 ffn")
    assert seen.text("#details h2") == f"{LAYER}.mlp/ffn"
    assert "channels 80 " in seen.text("#details dl")
    assert seen.nodes(".lit") == {f"{LAYER}.mlp/ffn"} | {
        f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert "hidden" in seen.nodes(".faded")


def test_what_is_lost_with_one_head(seen: Seen) -> None:
    seen.search("layers.1 kv_heads")
    told = seen.text("#details")
    assert "one index is 2,304 parameters" in told
    assert re.search(r"layers\.1\.self_attn\.q_proj\.weight pick dimension 0, 16 of 48 rows", told)
    assert re.search(r"layers\.1\.self_attn\.k_proj\.weight pick dimension 0, 8 of 24 rows", told)
    assert re.search(r"o_proj\.weight pick dimension 1, 16 of 48 columns", told)


def test_why_the_vocabulary_stays(seen: Seen) -> None:
    x, y = seen.at("model.embed_tokens/vocab")
    seen.page.mouse.click(x, y)
    told = seen.text("#details")
    assert "cannot be pruned" in told and "numbers that come from data" in told
    assert "modeling_llama.py:" in told


def test_what_ties_q_to_k(seen: Seen) -> None:
    seen.pick("layers.1 q_proj", 0)
    assert "pick another" in seen.text("#proof")
    seen.pick("layers.1 k_proj", 0)
    told = seen.text("#proof")
    assert f"One and the same: {LAYER}.self_attn/kv_heads" in told
    assert "by surgeon.attention at modeling_llama.py:" in told
    assert {f"{LAYER}.self_attn.{n}_proj.weight" for n in "qk"} <= seen.nodes(".path")
    seen.page.locator("#proof").get_by_text("surgeon.attention").first.click()
    assert seen.text("#details h2") == "surgeon.attention"
    assert seen.page.evaluate("surgeon.view.current") == "program"
    made = seen.text("#details dl").split()[1]
    assert made.startswith("%") and made in seen.nodes(".path")


def test_what_nothing_ties(seen: Seen) -> None:
    seen.pick("layers.1 q_proj", 0)
    seen.pick("layers.1 down_proj", 1)
    assert "Not coupled" in seen.text("#proof")


def test_modules_open_and_close(seen: Seen) -> None:
    seen.page.click("#view-program")
    before = seen.nodes()
    assert "model.layers.0" in before and not any("self_attn" in name for name in before)
    seen.page.mouse.dblclick(*seen.at("model.layers.0"))
    opened = seen.nodes()
    assert {"model.layers.0.self_attn", "model.layers.0.mlp"} <= opened
    seen.page.wait_for_timeout(500)  # what follows is no third click of the same
    seen.page.mouse.dblclick(*seen.at("model.layers.0"))
    assert seen.nodes() == before
    seen.page.click("#unfold-all")
    ops = seen.page.evaluate("surgeon.model.ops.length")
    assert seen.page.evaluate("surgeon.view.cy.nodes('[kind=\"operation\"]').length") == ops
    seen.page.click("#fold")
    assert seen.nodes() == before


def test_the_operations_that_tie_an_axis_are_shown(seen: Seen) -> None:
    seen.search("layers.0 ffn")
    seen.page.click("#ties")
    targets = seen.page.evaluate(
        "surgeon.view.cy.nodes('.tie[kind=\"operation\"]')"
        ".map((n) => surgeon.view.thing(n.id()).target)"
    )
    assert {"aten.linear.default", "aten.silu.default", "aten.mul.Tensor"} == set(targets)


def test_one_zooms(seen: Seen) -> None:
    zoom = "surgeon.view.cy.zoom()"
    before = seen.page.evaluate(zoom)
    seen.page.click("#zoom-in")
    closer = seen.page.evaluate(zoom)
    seen.page.mouse.move(700, 400)
    seen.page.mouse.wheel(0, -200)
    assert seen.page.evaluate(zoom) > closer > before
    seen.page.click("#fit")
    assert seen.page.evaluate(zoom) <= closer


def test_what_was_removed_is_a_colour(browser: Any, files: dict[str, Path]) -> None:
    seen = Seen(browser, files["pruned"])
    colours = (
        "surgeon.view.cy.nodes('[kind=\"axis\"]').reduce((all, n) => "
        "({...all, [surgeon.view.thing(n.id()).name]: n.style('background-color')}), {})"
    )
    found = seen.page.evaluate(colours)
    assert found[f"{LAYER}.mlp/ffn"] == "rgb(150,24,48)"
    assert found["hidden"] == "rgb(245,246,248)"
    assert len({found["model.layers.0.mlp/ffn"], found["hidden"], found[f"{LAYER}.mlp/ffn"]}) == 3
    seen.search("layers.0 ffn")
    assert "removed 75 % kept 20" in seen.text("#details dl")
    seen.page.click("#colour")
    assert (
        seen.page.evaluate(colours)[f"{LAYER}.mlp/ffn"]
        == seen.page.evaluate(colours)["model.layers.0.mlp/ffn"]
    )
    assert seen.complaints == []


def test_it_is_dark_where_the_reader_is(browser: Any, files: dict[str, Path]) -> None:
    def back(scheme: str) -> str:
        seen = Seen(browser, files["whole"], scheme)
        return str(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert back("light") == "rgb(255, 255, 255)" != back("dark")


@pytest.mark.slow
def test_eighty_layers_are_folded_and_unfolded(browser: Any, tmp_path: Path) -> None:
    settings = models.config("Llama", num_hidden_layers=80)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(tmp_path)
    axes = open_model(str(tmp_path / "config.json")).axes
    (tmp_path / "page.html").write_text(page_of(axes, "eighty", view="program"), encoding="utf-8")
    seen = Seen(browser, tmp_path / "page.html")
    assert len(seen.nodes()) < 120
    seen.search("layers.61 up_proj")
    assert "model.layers.61.mlp.up_proj.weight" in seen.nodes(".lit")
    assert len(seen.nodes()) < 160
    seen.page.click("#unfold-all")
    shown = seen.page.evaluate("surgeon.view.cy.nodes('[kind=\"operation\"]').length")
    assert shown == len(axes.program.ops) > 3500
    assert seen.complaints == [] and seen.requests == [seen.url]
