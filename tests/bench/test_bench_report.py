# SPDX-License-Identifier: Apache-2.0
"""report.md and report.html of made-up reports: the numbers are the data's, and nothing breaks out of its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from fastloop.bench.regression import figures, html, markdown, words
from fastloop.bench.regression.record import Change, Count, Ratio, Report
from fastloop.bench.stats import Interval, Verdict, median_interval, rounds_interval, verdict

VOID_TAGS = {"meta", "link", "br", "img", "hr", "input"}
NASTY = '</td><script>alert("x")</script>|`*a*`|&amp;\n# head @someone'
LONG = "attention/" + "a_very_long_name_of_a_case" * 12


def made(case: str, true: float, *, rounds: int = 4, seed: int = 0, again: float | None = None) -> Change:
    """A change as a two-core machine shows it: a step per round, noise, one pair in ten disturbed."""
    generator = np.random.default_rng(seed)

    def draw(middle: float, count: int) -> list[list[float]]:
        steps = np.exp(generator.normal(0, 0.006, (count, 1)))
        ratios = middle * steps * np.exp(generator.normal(0, 0.015, (count, 5)))
        ratios *= np.where(generator.random((count, 5)) < 0.08, generator.choice([1.4, 0.72], (count, 5)), 1.0)
        return [[float(ratio) for ratio in row] for row in ratios]

    first = draw(true, rounds)
    change = Change(case, title=f"{case}, clip + step", rounds=first, interval=rounds_interval(first))
    if again is not None:
        change.rerun_rounds = draw(again, 8)
        change.rerun = rounds_interval(change.rerun_rounds)
    change.base_seconds = [float(each) for each in 0.0021 * np.exp(generator.normal(0, 0.03, 5 * rounds))]
    flat = [ratio for row in first for ratio in row]
    change.head_seconds = [ratio * each for ratio, each in zip(flat, change.base_seconds, strict=True)]
    assert change.interval is not None
    change.verdict = verdict(change.interval, change.rerun)
    return change


def control(true: float = 1.002) -> Change:
    change = made("control", true, seed=9)
    change.title, change.control = "torch's fused AdamW, 4 tensors", True
    change.verdict = Verdict.VOID if abs(true - 1) > 0.02 else Verdict.PASS
    return change


def counts(launches: int = 4) -> list[Count]:
    failed = launches > 4
    return [
        Count("adamw", "kernel launches", launches, allowed=4, base=4, failed=failed),
        Count("adamw", "host-device syncs", 0, allowed=0, base=0),
        Count("adamw", "peak bytes", 8_912_896, allowed=9_000_000, base=8_912_640),
        Count("adamw", "instructions", 1_234_567, allowed=1_240_000, base=1_230_001, note="callgrind, native step"),
        Count("adamw", "registers sm_90", 38, allowed=64, base=38),
        Count("lion", "allocations", None, note="needs a GPU"),
        Count("lion", "allocating operations", 3),
    ]


def ratio(case: str, true: float, floor: float, seed: int = 3) -> Ratio:
    generator = np.random.default_rng(seed)
    ratios = [float(each) for each in true * np.exp(generator.normal(0, 0.03, 20))]
    interval = median_interval(ratios)
    found = Verdict.REGRESSED if interval.high < floor else Verdict.PASS
    return Ratio(case, "torch fused", found, interval, floor, ratios)


def report(changes: list[Change] | None = None, **others: object) -> Report:
    environment = {
        "device": "CPU",
        "cpu": "Some CPU @ 2.10GHz",
        "cores": 2,
        "threads": 2,
        "memory_bytes": 8 * 2**30,
        "torch": "2.13.0+cpu",
        "backends": {"cpu": "available", "cuda": "no device"},
        "load": 0.4,
    }
    defaults: dict[str, object] = {"head": "c167a15" + "0" * 33, "base": "e2d4673" + "1" * 33, "seconds": 412.3}
    created = "2026-01-02T03:04:05+00:00"
    return Report(created, environment, changes=changes or [], **{**defaults, **others})  # type: ignore[arg-type]


def voided() -> Report:
    changes = [made("adamw/vit", 1.12), made("lion/vit", 0.9, seed=2), control(1.041)]
    for each in changes:
        each.verdict, each.note = Verdict.VOID, "" if each.control else "the control moved by more than 2 %"
    floors = ratio("adamw/vit", 1.6, 1.3)
    floors.verdict = Verdict.VOID
    return report(changes, counts=counts(), ratios=[floors])


def wrong() -> Report:
    broken = Change(
        "adamw/bf16", verdict=None, note="head: 3 of 4096 elements differ, worst 0.02, allowed 1e-6", wrong=True
    )
    return report([made("lion/vit", 1.2, seed=2, again=1.2), broken, control()], counts=counts(6))


def extreme() -> Report:
    changes = [
        made("slow", 8.0, again=7.9),
        made("fast", 0.2, seed=2, again=0.21),
        made("same", 1.0, seed=4),
        control(),
    ]
    changes[2].rounds[1][2] = 30.0
    changes[2].head_seconds[7] *= 30
    return report(changes, ratios=[ratio("adamw", 40.0, 1.2), ratio("lion", 0.1, 1.2)])


def many() -> Report:
    changes = [made(f"optimizer{i % 7}/model{i}", 1 + 0.002 * (i % 5), seed=i) for i in range(58)]
    changes += [made("optimizer/slow", 1.12, seed=1, again=1.11), control()]
    rows = [Count(f"case{i}", "kernel launches", i, allowed=i + 2, base=i) for i in range(60)]
    return report(changes, counts=rows, ratios=[ratio(f"case{i}", 1.4, 1.1, seed=i) for i in range(12)])


REPORTS = {
    "regressed": lambda: report(
        [
            made("adamw/vit", 1.12, again=1.115),
            made("lion/gpt", 1.01, seed=2, rounds=16),
            made("sgd/gpt", 0.91, seed=3, again=0.9),
            made("clip/resnet", 1.035, seed=5, rounds=16),
            control(),
        ],
        counts=counts(),
        ratios=[ratio("adamw/vit", 1.6, 1.3), ratio("lion/gpt", 2.2, 2.0, seed=5)],
        notes=["no callgrind here: instruction counts of the native step were left out"],
    ),
    "improved": lambda: report([made("adamw/vit", 0.88, again=0.87), control()], counts=counts()),
    "void": voided,
    "wrong": wrong,
    "counts": lambda: report([made("adamw/vit", 1.0), control()], counts=counts(5)),
    "only counts": lambda: report(base=None, counts=counts()),
    "nothing": lambda: report(base=None, notes=["no base: `ab` was left out"]),
    "user": lambda: report([made("mypkg.perf:train_step", 1.01, rounds=8), control()], ratios=[]),
    "not judged": lambda: report([Change("new/case", note="base: cannot be loaded"), control()]),
    "extreme": extreme,
    "many": many,
    "nasty": lambda: report(
        [made(NASTY, 1.12, again=1.13), made(LONG, 1.0, seed=2), Change("\x00\udcff\u202e", note=NASTY), control()],
        counts=[Count(NASTY, NASTY, 5, 4, 4, True, NASTY)],
        ratios=[Ratio(NASTY, NASTY, None, note=NASTY), ratio(LONG, 1.2, 1.1)],
        notes=[NASTY],
        head=NASTY,
    ),
}


@dataclass
class Table:
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


class Page(HTMLParser):
    """A strict reader: closes what it opens; collects ids, links, texts and tables."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[Table] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag not in VOID_TAGS:
            self.open.append((tag, given))
        if tag == "table":
            self.tables.append(Table())
        if tag == "tr" and self._within("tbody"):
            self.tables[-1].rows.append([])
        if tag in ("th", "td") and self._within("table"):
            (self.tables[-1].rows[-1] if self._within("tbody") else self.tables[-1].columns).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._within("style"):
            return
        self.text += data
        if self._within("table") and not self._within("svg"):
            cells = self.tables[-1].rows[-1] if self._within("tbody") else self.tables[-1].columns
            if cells and (self._within("th") or self._within("td")):
                cells[-1] += data

    def _within(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.open)


@pytest.fixture(scope="module", params=list(REPORTS))
def pages(request: pytest.FixtureRequest) -> tuple[Report, str, str]:
    made_up = REPORTS[request.param]()
    return made_up, html.render(made_up), markdown.render(made_up)


def test_the_page_is_sound(pages: tuple[Report, str, str]) -> None:
    _, document, _ = pages
    document.encode()
    page = Page(document)
    assert len(page.ids) == len(set(page.ids))
    assert all(link == "result.json" or (link[0] == "#" and link[1:] in page.ids) for link in page.links)
    assert "result.json" in page.links
    assert not re.search(r"https?:|url\(|@import|<script", document)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "img", "link", "object"})
    assert not any(name.startswith("on") for _, given in page.tags for name in given)


def test_tables_have_heads_and_pictures_have_titles(pages: tuple[Report, str, str]) -> None:
    _, document, _ = pages
    page = Page(document)
    assert all(given.get("scope") in ("col", "row") for tag, given in page.tags if tag == "th")
    for table in page.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    for tag, given in page.tags:
        if tag == "svg" and given.get("role") == "img":
            assert set(given["aria-labelledby"].split()) <= set(page.ids)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", document, flags=re.S)


def rows_of(page: Page, column: str) -> list[dict[str, str]]:
    tables = [table for table in page.tables if column in table.columns]
    return [dict(zip(table.columns, row, strict=True)) for table in tables for row in table.rows]


def per_cent(text: str) -> float:
    return float(text.replace("\u2212", "-").replace(",", "").removesuffix(" %"))


@pytest.mark.parametrize("name", ["regressed", "improved", "extreme", "many", "wrong"])
def test_numbers_of_the_page_are_those_of_the_data(name: str) -> None:
    made_up = REPORTS[name]()
    page = Page(html.render(made_up))
    shown = rows_of(page, "change")
    assert len(shown) == len(made_up.changes)
    for row, change in zip(shown, words.by_weight(made_up.changes), strict=True):
        assert row["case"].startswith(change.case)
        if change.interval is not None:
            low, high = row["98 % interval"].split(" to ")
            wanted = (change.interval.median, change.interval.low, change.interval.high)
            for text, ratio in zip((row["change"], low, high), wanted, strict=True):
                assert per_cent(text) == pytest.approx((ratio - 1) * 100, abs=0.051)
        if change.rerun is not None:
            assert per_cent(row["rerun"].split(" %")[0]) == pytest.approx((change.rerun.median - 1) * 100, abs=0.051)
    values = {(row["case"], row["what"]): row["value"] for row in rows_of(page, "what")}
    assert len(values) == len(made_up.counts)
    for count in made_up.counts:
        text = next(text for (case, what), text in values.items() if case.startswith(count.case) and what == count.what)
        assert (float(text.replace(",", "")) if text else None) == count.value


def test_numbers_of_the_comment_are_those_of_the_data() -> None:
    made_up = REPORTS["regressed"]()
    text = markdown.render(made_up)
    first = made_up.changes[0]
    assert first.interval is not None
    assert first.rerun is not None
    row = next(line for line in text.splitlines() if line.startswith("| `adamw/vit` | **REGRESSED**"))
    assert f"| {words.percent(first.interval.median)} |" in row
    assert words.percent(first.rerun.median) in row
    assert "| 20 + 40 |" in row
    assert "| 1,234,567 | 1,240,000 | +4,566 (+0.4 %) |" in text
    assert "8,912,896" in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("regressed", r"\*\*Regressed\*\*: `adamw/vit` is slower by 1\d\.\d % \(98 % interval \+.* to \+.* %\)$"),
        ("improved", r"\*\*OK\*\*: 1 case against base, none regressed; 1 improved; 5 counts within bounds$"),
        ("void", r"\*\*Void\*\*: the control `control` moved by \+\d\.\d %, so the machine was not quiet"),
        ("wrong", r"\*\*Wrong result\*\*: `adamw/bf16`: head: 3 of 4096 elements differ.*; also worse: `lion/vit`"),
        ("counts", r"\*\*Regressed\*\*: `adamw` kernel launches 5, allowed 4$"),
        ("only counts", r"\*\*OK\*\*: 5 counts within bounds$"),
        ("nothing", r"\*\*Nothing judged\*\*: no base: \\`ab\\` was left out$"),
        ("not judged", r"\*\*Nothing judged\*\*: base: cannot be loaded$"),
    ],
)
def test_the_first_line_is_the_verdict(name: str, wanted: str) -> None:
    made_up = REPORTS[name]()
    assert re.match(wanted, markdown.render(made_up).splitlines()[0]), markdown.render(made_up).splitlines()[0]
    headline = words.headline(made_up, lambda name: name, lambda text: text)
    assert headline.text in Page(html.render(made_up)).text


def test_a_void_run_has_no_colour_and_its_counts_stay() -> None:
    made_up = voided()
    page = Page(html.render(made_up))
    classes = {given["class"] for _, given in page.tags if "class" in given}
    assert "verdict void" in classes
    assert not {"bad-row", "good-row", "doubt-row"} & classes
    made_up.counts[0].failed = True
    page = Page(html.render(made_up))
    assert [given["class"] for tag, given in page.tags if tag == "tr" and given.get("class")] == ["bad-row"]


def test_a_wrong_result_comes_before_all() -> None:
    page = Page(html.render(wrong()))
    assert rows_of(page, "verdict")[0]["case"].startswith("adamw/bf16")
    assert "\u2716 WRONG" in rows_of(page, "verdict")[0]["verdict"]
    assert ("div", {"class": "verdict wrong"}) in page.tags


def test_names_cannot_break_out_of_the_comment() -> None:
    text = markdown.render(REPORTS["nasty"]())
    text.encode()
    tags = set(re.findall(r"<[^>]*>", text))
    assert tags <= {"<details>", "</details>", "<summary>", "</summary>", "<code>", "</code>"}
    assert not re.search(r"(?<!&#)@someone", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_comment_stays_below_the_limit_and_says_what_it_left_out() -> None:
    changes = [made(f"{NASTY}{i}{LONG}", 1.0, seed=i) for i in range(150)]
    rows = [Count(f"{LONG}{i}", "kernel launches", 5, 4, 4, True, f"{i}{NASTY * 20}") for i in range(300)]
    text = markdown.render(report(changes, counts=rows, notes=[f"{i} {NASTY * 30}" for i in range(500)]))
    assert len(text.encode()) <= markdown.LIMIT
    assert re.search(r"and \d+ more rows, left out here: see report.html", text)
    assert text.startswith("**Regressed**: ")


def test_sixty_cases_fit_into_a_comment_whole() -> None:
    made_up = many()
    text = markdown.render(made_up)
    assert len(text.encode()) <= markdown.LIMIT
    assert "left out here" not in text
    assert all(f"`{each.case}`" in text for each in made_up.changes)
    assert len(html.render(made_up)) < 1_000_000


def test_what_lies_beyond_the_axis_is_marked_and_named() -> None:
    axis = figures.change_axis([Interval(1.0, 0.99, 1.01), Interval(8.0, 7.5, 8.5)])
    assert axis.high <= figures.WIDE
    assert (axis.clipped(8.0), axis.clipped(0.2), axis.clipped(1.0)) == (1, -1, 0)
    row = figures.interval_row("a", "slow", axis, Interval(8.0, 7.5, 8.5))
    assert "+700.0 %" in row
    assert 'class="point' in row
    assert 'class="median' not in row


def test_places_on_an_axis_follow_the_values() -> None:
    axis = figures.change_axis([Interval(1.0, 0.97, 1.2)])
    places = [axis.at(value) for value in (0.95, 1.0, 1.02, 1.05, 1.2)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    assert axis.at(1.1) - axis.at(1.0) == pytest.approx(axis.at(1.0) - axis.at(1 / 1.1), abs=0.02)
    ticks = axis.ticks(figures.CHANGES, 12)
    assert {1.0, 1.05} <= set(ticks)
    assert min(axis.at(b) - axis.at(a) for a, b in pairwise(ticks)) >= 12


def test_a_strip_has_a_point_for_every_pair() -> None:
    change = made("a", 1.1, again=1.1)
    drawn = figures.strip("s", "a", change.rounds, change.rerun_rounds, change.interval)
    points = re.findall(r'<path class="dots (\w+)" d="([^"]*)"', drawn)
    assert [kind for kind, _ in points] == ["head", "head", "hole"]
    assert points[1][1] == points[2][1]
    beyond = drawn.count('class="point head"')
    assert beyond > 0
    assert sum(path.count("M") for _, path in points[:2]) + beyond == 60
    far = [[1.0, 1.0, 30.0, 1.0]]
    drawn = figures.strip("s", "a", far)
    assert drawn.count("M") - drawn.count("M-5") == 3
    assert "to +2,900.0 %" in drawn


def test_a_count_above_what_is_allowed_crosses_the_line() -> None:
    def width(value: float, allowed: float) -> float:
        drawn = figures.share("a", "a", Count("a", "launches", value, allowed))
        found = re.search(r'class="bar \w+" x1="0%" x2="([\d.]+)%"', drawn)
        return float(found.group(1)) if found else 0.0

    assert width(4, 4) == 80
    assert width(2, 4) == 40
    assert width(5, 4) == 100
    assert width(0, 0) == 0
    assert width(3, 0) == 100


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.1234, "+12.3 %"), (0.8, "\u221220.0 %"), (1.0, "+0.0 %"), (0.99999, "+0.0 %"), (9.0, "+800.0 %")],
)
def test_per_cent(ratio: float, text: str) -> None:
    assert words.percent(ratio) == text
