"""The ranking page in a real browser: keys, drags, safety, a server that is killed; and what the ranks train."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect
from rank.conftest import Serve, write_candidates
from train.ranked_files import small_recipe
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.score.combine import read_candidates
from rrhf_peft.score.people import agreement, read_ranks, texts_of
from rrhf_peft.train.run import train_recipe

pytestmark = pytest.mark.timeout(300)


def opened(browser: Browser, address: str, **options: object) -> Page:
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(60_000)
    page.goto(address)
    return page


def texts(page: Page) -> list[str]:
    """What stands on the cards, from the top."""
    return page.locator(".card .text").all_inner_texts()


def answer(page: Page, done: int) -> None:
    """Rank by what the texts say, response 2 before 1 before 0, with the attack last, and wait for the next group."""
    expect(page.locator("#count")).to_contain_text(f": {done} of ")
    ranks = {"2": "1", "1": "2", "0": "3"}
    shown = texts(page)
    page.keyboard.type("".join(ranks.get(text.split("\n")[0][-1], "3") for text in shown))
    page.keyboard.press("Enter")
    expect(page.locator("#count")).to_contain_text(f": {done + 1} of ")


def test_two_people_rank_twenty_groups_through_a_kill_and_the_ranks_train(
    browser: Browser, serve: Serve, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_candidates(tmp_path / "candidates.jsonl")
    command = ["candidates.jsonl", "--annotator", "ann", "--annotator", "bob"]
    before = serve(*command, "--port", "0", cwd=tmp_path)
    ann, bob = (opened(browser, before.links[name]) for name in ("ann", "bob"))
    for done in range(6):
        answer(ann, done)
        answer(bob, done)
    shown = texts(ann)
    ann.keyboard.press("1")  # a draft, in the middle of a group
    expect(ann.locator(".letter.ghost, .tier[data-rank='1'] .letter")).to_have_count(1)
    ann.wait_for_timeout(300)
    before.end(signal.SIGKILL)

    bob.keyboard.type("123")
    bob.keyboard.press("Enter")
    expect(bob.locator("#notice")).to_contain_text("the server does not answer. Trying again")
    after = serve(*command, "--port", before.port, cwd=tmp_path)
    assert after.links == before.links
    expect(bob.locator("#count")).to_contain_text("bob: 7 of 20")  # by itself, with what was typed meanwhile
    expect(bob.locator("#notice")).to_be_hidden()
    ann.reload()
    expect(ann.locator("#count")).to_contain_text("ann: 6 of 20")
    assert texts(ann) == shown
    expect(ann.locator(".tier[data-rank='1'] .letter")).to_have_text("A")

    ann.keyboard.press("s")  # one is skipped, with a note
    expect(ann.locator("#count")).to_contain_text("7 of 20 (1 skipped)")
    for done in range(7, 20):
        answer(ann, done)
        answer(bob, done)
    for page in (ann, bob):
        expect(page.locator("#finished")).to_be_visible()
    code, stderr = after.end()
    assert (code, stderr) == (0, "")

    folder = tmp_path / "runs" / "ranking"
    monkeypatch.chdir(tmp_path)
    groups = texts_of(read_candidates(str(folder / "groups.jsonl")))
    ranks = [read_ranks(folder / f"ranks-{name}.jsonl", folder / "sheet.jsonl", groups) for name in ("ann", "bob")]
    assert [len(given) for given in ranks] == [19, 20]
    in_order = [given for given in ranks[0].values() if given == {0: 3.0, 1: 2.0, 2: 1.0}]
    assert len(in_order) == 19  # blind and shuffled differently, the two said the same of the same responses
    assert sum(given == {0: 3.0, 1: 2.0, 2: 1.0} for given in ranks[1].values()) >= 19
    kept = json.loads((folder / "agreement.json").read_text())
    assert kept["agreement"][0]["alpha"] == agreement(ranks, [3] * 20).alpha
    assert [one["between"] for one in kept["agreement"]] == ["annotators", "annotators together, and reward_model"]
    assert kept["agreement"][1]["same"] > 0.9

    result = CliRunner().invoke(app, ["score", str(Path("runs/ranking/score.yaml"))])
    assert result.exit_code == 0, result.output
    scored = read_candidates(str(folder / "scored.jsonl"))
    assert len(scored) == 20
    assert scored[1].scores == [0.0, 0.5, 1.0]
    recipe = small_recipe(tiny_model_folder, folder / "scored.jsonl", tmp_path / "run", training={"max_steps": 1})
    assert (train_recipe(recipe).run_folder / "adapter_model.safetensors").exists()


def test_drags_keys_ties_notes_and_going_back(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates.jsonl", count=3, k=4)
    (tmp_path / "guide.md").write_text("Prefer **short** answers.")
    served = serve("candidates.jsonl", "--port", "0", "--guidelines", "guide.md", cwd=tmp_path)
    page = opened(browser, served.links["me"])
    page.locator(".card").first.wait_for()

    def drag(label: str, rank: int) -> None:
        letter = page.locator(".card .letter", has_text=label).bounding_box()
        row = page.locator(f".tier[data-rank='{rank}']").bounding_box()
        assert letter is not None
        assert row is not None
        page.mouse.move(letter["x"] + 8, letter["y"] + 8)
        page.mouse.down()
        page.mouse.move(row["x"] + 60, row["y"] + 12, steps=4)
        page.mouse.up()

    def tiers() -> dict[str, str]:
        rows = page.locator(".tier").all()
        return {str(row.get_attribute("data-rank")): "".join(row.locator(".letter").all_inner_texts()) for row in rows}

    drag("B", 1)
    drag("A", 1)  # a tie
    assert tiers() == {"1": "AB", "2": "", "3": "", "4": "", "0": "CD"}
    drag("B", 0)
    assert tiers()["0"] == "BCD"
    page.keyboard.press("Enter")  # not complete: nothing happens
    page.locator(".card", has=page.locator(".letter", has_text="D")).locator("label", has_text="4").click()
    page.keyboard.type("c2b")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert tiers() == {"1": "A", "2": "BC", "3": "", "4": "D"}
    page.keyboard.press("n")
    page.keyboard.type("s1: a note, not a command")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    expect(page.locator(".text.plain")).to_have_count(5)
    assert tiers() == {"1": "A", "2": "BC", "3": "", "4": "D"}
    shown = texts(page)
    page.keyboard.press("Enter")
    expect(page.locator("#count")).to_contain_text("1 of 3")
    page.keyboard.press("p")
    expect(page.locator("#note")).to_have_value("s1: a note, not a command")
    assert texts(page) == shown
    assert tiers() == {"1": "A", "2": "BC", "3": "", "4": "D"}
    page.keyboard.press("?")
    expect(page.locator("#guidelines strong")).to_have_text("short")
    page.keyboard.press("s")  # the help is open: no command
    page.keyboard.press("Escape")
    expect(page.locator("#count")).to_contain_text("1 of 3")


def test_texts_cannot_reach_out_and_the_policy_holds_if_they_could(
    browser: Browser, serve: Serve, tmp_path: Path
) -> None:
    write_candidates(tmp_path / "candidates.jsonl", count=1)
    served = serve("candidates.jsonl", "--port", "0", cwd=tmp_path)
    page = opened(browser, served.links["me"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    attacked = page.locator(".card", has_text="click")
    expect(attacked).to_contain_text("<script>document.title='owned'</script>")
    assert page.locator(".card img, .card script, .card [onclick]").count() == 0
    assert [link.get_attribute("href") for link in page.locator(".card a").all()] == ["http://evil.invalid/b"]
    assert page.title() == "Ranking"
    assert {address.split("/")[2] for address in asked} == {f"127.0.0.1:{served.port}"}
    # As if the Markdown parser had failed: what the browser then refuses never leaves it.
    blocked = page.evaluate(
        """async () => {
            const seen = [];
            document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
            document.body.insertAdjacentHTML("beforeend", "<img src='http://evil.invalid/a' onerror='alert()'>");
            document.body.append(Object.assign(document.createElement("script"), {textContent: "document.title = 2"}));
            await fetch("http://evil.invalid/c").catch(() => {});
            await new Promise((resolve) => setTimeout(resolve, 300));
            return seen.sort();
        }"""
    )
    assert {"connect-src", "img-src", "script-src-elem"} <= set(blocked)
    assert page.title() == "Ranking"


def test_two_policies_are_compared_and_the_overview_counts(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    for name in ("base", "trained"):
        rows = [{"prompt": f"Q{n}", "responses": [f"{name} {n}"]} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = serve("base.jsonl", "trained.jsonl", "--compare", "trained", "base", "--port", "0", cwd=tmp_path)
    page = opened(browser, served.links["me"], viewport={"width": 400, "height": 800})
    overview = opened(browser, served.overview)
    for done in range(3):
        expect(page.locator("#count")).to_contain_text(f"{done} of 3")
        first = texts(page)[0]
        if done == 2:
            page.locator(".choice", has_text="Tie").click()
        else:
            page.keyboard.press("ArrowLeft" if first.startswith("trained") else "2")
        expect(page.locator(".choice[aria-pressed=true]")).to_have_count(1)
        page.locator("#submit").click()
    expect(overview.locator("#tables section").first).to_contain_text("trained against base")
    expect(overview.locator("#tables section").first.locator("tr").last).to_have_text("together210")
    overview.locator("#write").click()
    expect(overview.locator("#write")).to_contain_text("Written")
    recipe = yaml.safe_load((tmp_path / "runs" / "ranking" / "score.yaml").read_text())
    assert recipe["scoring"]["scorer"]["annotations"] == ["runs/ranking/ranks-me.jsonl"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
