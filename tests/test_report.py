"""The report: its figures against sums done by hand, and a page that is whole, repeatable and loads nothing."""

import hashlib
import html
import importlib.util
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.figure
import pytest
from matplotlib.markers import CARETUP
from typer.testing import CliRunner

from hybrid_moe import backends
from hybrid_moe.backends import BACKENDS
from hybrid_moe.candidate import Candidate
from hybrid_moe.cli import app, view
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn.learner import learn, learn_from_files
from hybrid_moe.learn.report import data, draw, letters, page
from hybrid_moe.measure.readers import read_any, read_records
from hybrid_moe.measure.records import BenchRecord, append_record
from hybrid_moe.policy.schema import InputDigest, LearnerOptions
from hybrid_moe.policy.select import resolve
from hybrid_moe.policy.store import load_policy, save_policy
from hybrid_moe.problem import MoEProblem

ROOT = Path(__file__).parents[1]
B200 = ROOT / "benchmarks" / "data" / "nvidia_b200_2026-02-02.md"
PROBLEM = MoEProblem()
FAST_SMALL, FAST_LARGE = Candidate("small"), Candidate("large", {"tile": 64})
NO_DIGEST = InputDigest(name="records.jsonl", sha256="0" * 64, records=0)


def record(choice, num_tokens, latency, status="passed", **changes):
    fields = dict(
        device="gpu_x",
        problem=PROBLEM.definition,
        backend=choice.backend,
        config=dict(choice.config),
        num_tokens=num_tokens,
        local_expert_offset=0,
        routing="uniform",
        seed=0,
        local_rows=num_tokens,
        active_experts=min(num_tokens, 32),
        status=status,
        timing="cuda_graph",
        environment={"gpu": "GPU X", "torch": "9.9.9", "driver": "1.2.3", "read_tb_per_s": 3.5},
        timestamp="2026-01-02T03:04:05+00:00",
    )
    if status == "passed":
        fields["latency_us"] = {"median": float(latency), "p10": 0.98 * latency, "p90": 1.03 * latency}
        fields["floor_us"] = latency / 2
        fields["correctness"] = {"relative_l2": 0.02, "cosine": 0.9997, "matched_ratio": 0.98, "max_relative_l2": 0.03}
    else:
        fields["reason"] = "because"
    return BenchRecord(**(fields | changes))


def two_candidates(**changes):
    """At T = 1 and 10 `small` wins by 10% and 20%, at 1000 and 2000 `large` by 50% and 100%."""
    small = {1: 100, 10: 100, 1000: 150, 2000: 200}
    large = {1: 110, 10: 120, 1000: 100, 2000: 100}
    floors = {t: min(small[t], large[t]) / 2 for t in small}
    return [
        record(choice, t, us, **({"floor_us": floors[t]} | changes))
        for choice, by_t in ((FAST_SMALL, small), (FAST_LARGE, large))
        for t, us in by_t.items()
    ]


def learned(records, **options):
    return learn(records, LearnerOptions(**options), problem=PROBLEM, inputs=[NO_DIGEST])


def standing(found, choice):
    return next(s for s in found.standings if s.choice == choice)


def write(path, records):
    for each in records:
        append_record(path, each)
    return path


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


# ---- Figures ----


def test_regret_by_hand():
    records = two_candidates()
    policy = learned(records)
    assert [regime.choice for regime in policy.regimes] == [FAST_SMALL, FAST_LARGE]
    found = data.report(records, policy).overall[0]
    assert found.policy.regret.mean == 0 and found.policy.regret.worst_num_tokens is None
    small, large = standing(found, FAST_SMALL), standing(found, FAST_LARGE)
    assert (small.regret.mean, small.regret.worst, small.regret.worst_num_tokens) == (0.375, 1.0, 2000)
    assert large.regret.mean == pytest.approx((0.1 + 0.2) / 4)
    assert (large.regret.worst, large.regret.worst_num_tokens) == (pytest.approx(0.2), 10)
    assert small.policy_gain == pytest.approx((1.5 * 2.0) ** (1 / 4) - 1)
    assert large.policy_gain == pytest.approx((1.1 * 1.2) ** (1 / 4) - 1)
    assert found.best_single.choice == FAST_LARGE


def test_a_policy_of_other_records_is_judged_by_these():
    # Learned where `small` always wins, so what it runs at 1000 and 2000 costs 50% and 100%.
    policy = learned([record(c, t, us) for t in (1, 2000) for c, us in ((FAST_SMALL, 10), (FAST_LARGE, 90))])
    found = data.report(two_candidates(), policy).overall[0]
    assert found.policy.regret.mean == 0.375 and found.policy.regret.worst_num_tokens == 2000
    assert standing(found, FAST_SMALL).policy_gain == 0.0
    assert standing(found, FAST_LARGE).policy_gain == pytest.approx((1.1 * 1.2 / 1.5 / 2.0) ** (1 / 4) - 1)
    assert [row.chosen for row in found.rows] == [FAST_SMALL] * 4


@pytest.mark.parametrize("device", ["nvidia_h100_80gb_hbm3", "nvidia_h200"])
def test_regret_is_the_learners(device):
    policy = load_policy(ROOT / "policies" / device / f"{PROBLEM.definition}.json")
    folder = ROOT / "benchmarks" / "results" / device
    found = data.report([r for digest in policy.inputs for r in read_records(folder / digest.name)], policy)
    assert found.overall[0].timing == policy.learner.timing
    assert found.overall[0].policy.regret == policy.training_regret
    assert [v.timing for v in found.loads if v.routing == "uniform"] == ["cuda_graph", "eager"]


def test_several_workloads_and_loads():
    # Two seeds at T = 8: geometric means of latency and floor; the load `zipf` by itself and in the sum of both.
    records = [
        record(FAST_SMALL, 8, 100, floor_us=50.0),
        record(FAST_SMALL, 8, 400, seed=1, floor_us=200.0),
        record(FAST_LARGE, 8, 200, floor_us=50.0),
        record(FAST_LARGE, 8, 400, seed=1, floor_us=200.0),
        record(FAST_SMALL, 8, 300, routing="zipf", floor_us=100.0),
        record(FAST_LARGE, 8, 100, routing="zipf", floor_us=100.0),
    ]
    found = data.report(records, learned(records))
    assert [v.routing for v in found.loads] == ["uniform", "zipf"]
    (row,) = found.loads[0].rows
    assert (row.workloads, row.floor_us) == (2, pytest.approx(100))
    assert row.latency[FAST_SMALL].median == pytest.approx(200)
    assert row.latency[FAST_LARGE].median == pytest.approx(math.sqrt(200 * 400))
    assert row.regret[FAST_LARGE] == pytest.approx(0.5)
    (both,) = found.overall[0].rows
    assert both.workloads == 3
    assert both.regret[FAST_SMALL] == pytest.approx((0 + 0 + 2) / 3)
    assert both.regret[FAST_LARGE] == pytest.approx((1 + 0 + 0) / 3)
    text = page.html(found)
    assert "routing load zipf" in text and "all routing loads" in text


def test_a_candidate_lacking_a_workload_has_no_figure_there():
    records = [*two_candidates(), record(FAST_SMALL, 10, 5, seed=7)]
    found = data.report(records, learned(records)).overall[0]
    row = found.rows[1]
    assert FAST_LARGE not in row.latency and FAST_LARGE not in row.regret
    assert standing(found, FAST_LARGE).regret.num_tokens == 3
    assert found.best_single.choice == FAST_SMALL  # the other lacks a T


def test_repeated_measurements_count_by_their_median():
    records = [record(FAST_SMALL, 4, us) for us in (100, 130, 110)] + [record(FAST_LARGE, 4, 220)]
    (row,) = data.report(records, learned(records)).overall[0].rows
    assert row.latency[FAST_SMALL].median == pytest.approx(110)
    assert row.regret[FAST_LARGE] == pytest.approx(1.0)


def test_failed_and_unsupported():
    refused = Candidate("trtllm")
    records = two_candidates()
    policy = learned(records)
    records = [r for r in records if not (r.choice == FAST_LARGE and r.num_tokens == 1000)]
    records += [record(FAST_LARGE, 1000, 0, "failed", reason="relative L2 0.3 is above 0.03")]
    records += [record(refused, t, 0, "unsupported", reason="capability 9.0") for t in (1, 10, 1000)]
    found = data.report(records, policy)
    assert [(r.choice, r.status, tuple(r.num_tokens)) for r in found.refused] == [
        (FAST_LARGE, "failed", (1000,)),
        (refused, "unsupported", (1, 10, 1000)),
    ]
    # The wrong answer's candidate isn't run at that T: what is left is the fastest there.
    row = found.overall[0].rows[2]
    assert (row.chosen, row.passed_over, row.policy_regret) == (FAST_SMALL, FAST_LARGE, 0)
    text = page.html(found)
    for wanted in (
        "relative L2 0.3 is above 0.03",
        "capability 9.0",
        "1, 10, 1000",
        "unsupported",
        "T = 1000: the policy",
    ):
        assert wanted in text
    assert "passed later" not in text


def test_a_failure_that_passed_later_says_so():
    early = "2025-01-01T00:00:00+00:00"
    records = [*two_candidates(), record(FAST_SMALL, 1, 0, "failed", reason="was wrong", timestamp=early)]
    found = data.report(records, learned(records))
    assert [r.passed_later for r in found.refused] == [True]
    assert "passed later" in page.html(found)


def test_a_t_without_a_right_answer_is_left_out():
    policy = learned(two_candidates())
    found = data.report([*two_candidates(), record(FAST_SMALL, 50, 0, "failed")], policy)
    assert [row.num_tokens for row in found.overall[0].rows] == [1, 10, 1000, 2000]
    assert found.refused[0].num_tokens == [50]


def test_a_policy_that_knows_none_of_the_candidates():
    found = data.report([record(Candidate("new"), t, 10) for t in (1, 2)], learned(two_candidates()))
    own = found.overall[0].policy
    assert own.regret is None and "knows none" in page.verdict(found)
    assert "new" in page.html(found)


def test_peers_are_drawn_and_not_judged():
    peer = Candidate("peer:other")
    records = [*two_candidates(), *(record(peer, t, 1) for t in (1, 10))]
    found = data.report(records, learned(records))
    assert found.peers == [peer]
    assert peer not in found.overall[0].rows[0].regret
    assert found.overall[0].rows[0].latency[peer].median == pytest.approx(1)
    assert found.overall[0].policy.regret.mean == 0
    assert "peer:other" in draw.svg(found, found.loads[0], "latency")


def test_what_the_records_say_of_their_environment():
    records = [
        record(FAST_SMALL, t, 10 * t, gpu_before={"sm_mhz": 1000 + t}, host_us={"median": 5.5}) for t in range(1, 9)
    ]
    found = data.report(records, learned(records)).environment
    assert (found["gpu"], found["read_tb_per_s"]) == ("GPU X", "3.5")
    assert found["gpu_before, sm_mhz"] == "1001 to 1008" and found["host_us, median"] == "5.5"


@pytest.mark.parametrize("records", [[], [record(FAST_SMALL, 1, 0, "failed")], [record(Candidate("peer:x"), 1, 5)]])
def test_nothing_to_draw(records):
    with pytest.raises(ValueError, match="nothing to draw"):
        data.report(records, learned(two_candidates()))


def test_latencies_and_speedups_do_not_mix():
    records = two_candidates()
    mixed = [*records, record(FAST_SMALL, 3, 1, latency_us=None, speedup_vs_reference=2.0)]
    with pytest.raises(ValueError, match="one kind at a time"):
        data.report(mixed, learned(records))


# ---- The page ----


class _Page(HTMLParser):
    """Headings, and everything that could load something or run."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.loads, self.tags, self.ids, self._heading = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._heading = tag == "h2"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if (name in ("src", "srcset", "data", "action") or name.endswith("href")) and not value.startswith("#"):
                self.loads.append((tag, name, value))
            if name.startswith("on"):
                self.loads.append((tag, name, value))

    def handle_data(self, text):
        if self._heading:
            self.headings.append(text)
            self._heading = False


SECTIONS = ["Figures", "Regret", "Regimes", "Each T", "Correctness", "Refused, failed, timed out", "Environment"]


def test_the_page_has_every_section_and_loads_nothing():
    records = [*two_candidates(), *two_candidates(timing="eager")]
    policy = learned(records, timing="cuda_graph")
    text = page.html(data.report(records, policy, [NO_DIGEST]))
    found = _Page(text)
    assert found.headings == [*SECTIONS, "Made from"]
    assert not found.loads and not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert len(found.ids) == len(set(found.ids))
    # Three figures in two widths, for each timing.
    assert found.tags.count("svg") == 12
    assert "prefers-color-scheme:dark" in text and "max-width" in text
    for wanted in ("GPU X", "1.2.3", "2026-01-02", NO_DIGEST.sha256, "100.0 (2.00)", "37.5%", "large"):
        assert wanted in text
    assert not re.search("#[0-9a-f]{6}", text[text.index("<body>") :])  # every colour of a figure follows the theme


def test_the_same_page_each_time():
    records = two_candidates()
    pages = {page.html(data.report(rs, learned(records), [NO_DIGEST])) for rs in (records, records[::-1], records)}
    assert len(pages) == 1
    report = data.report(records, learned(records))
    assert draw.png(report, report.loads[0]) == draw.png(report, report.loads[0])


def test_the_users_settings_of_matplotlib_change_nothing():
    report = data.report(two_candidates(), learned(two_candidates()))
    before = draw.svg(report, report.loads[0], "regret")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw.svg(report, report.loads[0], "regret") == before


def test_every_string_of_the_records_is_escaped():
    evil = "<script>alert('x')</script>\"&$\\frac{$"
    bad = Candidate(evil, {"<b>": "</svg>"})
    records = [
        *[record(bad, t, 10, environment={"gpu": evil, evil: evil}, routing=evil) for t in (1, 2, 3)],
        *[record(Candidate("peer:" + evil), t, 20, routing=evil) for t in (1, 2, 3)],
        record(FAST_LARGE, 1, 0, "failed", reason=evil, routing=evil),
    ]
    found = data.report(records, learned(records), [InputDigest(name="<i>.jsonl", sha256="1" * 64, records=4)])
    text = page.html(found)
    parsed = _Page(text)
    assert "script" not in parsed.tags and "b" in parsed.tags and "i" not in parsed.tags
    assert "<script" not in text and "<b>]" not in text and "</svg>]" not in text
    assert html.escape("<script>alert('x')</script>", quote=False) in draw.svg(found, found.loads[0], "latency")
    assert draw.png(found, found.loads[0])


def test_without_floor_and_percentiles():
    records = two_candidates(
        floor_us=None, latency_us={"median": 10.0}, correctness=None, environment={}, timestamp=None
    )
    found = data.report(records, learned(records))
    assert list(draw.available(found, found.loads[0])) == ["latency", "regret"]
    row = found.overall[0].rows[0]
    assert row.floor_us is None and row.latency[FAST_SMALL].p10 is None
    text = page.html(found)
    assert found.device == "gpu_x" and "floor of the device" not in text
    assert "The records don't say." in html.unescape(text)


def test_one_t_alone():
    records = [record(FAST_SMALL, 7, 10)]
    found = data.report(records, learned(records))
    assert "7" in draw.svg(found, found.loads[0], "latency", draw.NARROW)
    assert "runs the fastest candidate at every T" in page.verdict(found)


def test_many_candidates_keep_their_colours_and_letters():
    choices = [Candidate(f"backend_{i:02}") for i in range(30)]
    records = [record(c, t, 10 + i) for i, c in enumerate(choices) for t in (1, 5)]
    found = data.report(records, learned(records))
    assert len(set(found.letters.values())) == 30
    styles = [(s["color"], s["marker"], str(s["linestyle"])) for _, s, _, _ in _drawn(found)]
    assert len(set(styles)) == 30
    page.html(found)


def _drawn(report):
    return draw._each(report, report.loads[0], lambda row, choice: row.slowdown.get(choice))


def test_b200_from_the_published_table():
    options = LearnerOptions(regimes="1-7,14-32,52-80,901,10001-", tie_margin=0.05, prefer="triton_fused")
    policy = learn_from_files([B200], options)
    found = data.report(read_any([B200]), policy, policy.inputs)
    assert found.by_speedup and found.overall[0].policy.regret == policy.training_regret
    assert list(draw.available(found, found.loads[0])) == ["slowdown", "regret"]
    made = page.html(found)
    assert "published speedups" in made and "21.2%" in made and "floor µs" not in made
    assert "the policy was learned from it" in made
    assert "0.6% slower" in page.verdict(found)  # than the best single candidate: the tie's price


# ---- PNG ----


def _pixels(content):
    """Width, height and the number of different bytes of the pixels of a PNG."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    parts, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            parts.append(content[at + 8 : at + 8 + length])
        at += 12 + length
    return width, height, len(set(zlib.decompress(b"".join(parts))))


def test_png_has_content():
    report = data.report(two_candidates(), learned(two_candidates()))
    width, height, different = _pixels(draw.png(report, report.loads[0]))
    assert width == 1920 and height > 700 and different > 100


def test_a_slow_candidate_or_peer_is_cut_off_and_says_so():
    floor = {"floor_us": 10.0}
    times = {FAST_SMALL: 12.0, FAST_LARGE: 40.0, Candidate("peer:slow"): 900.0}
    records = [record(choice, t, us, **floor) for t in (1, 8) for choice, us in times.items()]
    found = data.report(records, learned([r for r in records if not r.is_peer]))
    axes = _axes(found, "floor")
    assert axes.get_ylim() == (0.95, 2.5)
    by_name = {name.split(" (")[0]: name for name in axes.get_legend_handles_labels()[1]}
    assert by_name["peer:slow"] == "peer:slow (to 90)"
    slow = next(name for name in by_name.values() if str(FAST_LARGE) in name)
    assert slow.endswith("(to 4)") and "(" not in next(name for name in by_name.values() if "small" in name)
    arrows = [line for line in axes.get_lines() if line.get_marker() == CARETUP]
    assert [(list(a.get_xdata()), list(a.get_ydata())) for a in arrows] == [([1, 8], [2.5, 2.5])] * 2
    # The latencies' axis ends above the slowest candidate, not at the peer.
    assert 40 < _axes(found, "latency").get_ylim()[1] < 100


def test_the_fastest_is_in_the_picture_however_far_from_the_floor():
    records = [
        record(choice, t, us, floor_us=1.0) for t in (1, 8) for choice, us in ((FAST_SMALL, 7), (FAST_LARGE, 90))
    ]
    low, high = _axes(data.report(records, learned(records)), "floor").get_ylim()
    assert low < 7 < high < 10


def _axes(report, name):
    axes = matplotlib.figure.Figure().subplots()
    draw.available(report, report.loads[0])[name](report, report.loads[0], axes)
    return axes


# ---- The command ----


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Records of two candidates, and the policy learned from them."""
    for choice in (FAST_SMALL, FAST_LARGE):
        monkeypatch.setitem(BACKENDS, choice.backend, BACKENDS["torch_reference"])
    source = write(tmp_path / "in" / "records.jsonl", two_candidates())
    save_policy(learn_from_files([source], LearnerOptions()), tmp_path / "in" / "policy.json")
    return source, tmp_path / "in" / "policy.json"


def test_command(files, tmp_path, monkeypatch):
    source, policy = files
    monkeypatch.chdir(tmp_path)
    shown = cli("report", source, "--policy", policy).stdout
    assert "runs the fastest candidate at every T" in " ".join(shown.split())
    made = (tmp_path / "report.html").read_bytes()
    assert b"Made from" in made and str(tmp_path).encode() not in made
    cli("report", source, "--policy", policy, "-o", "again/report.html")
    assert (tmp_path / "again" / "report.html").read_bytes() == made
    # Only the picture.
    cli("report", source, "--policy", policy, "--png", "only/picture.png")
    assert [p.name for p in (tmp_path / "only").iterdir()] == ["picture.png"]


def test_command_takes_the_records_that_the_policy_was_learned_from(files, tmp_path):
    source, policy = files
    cli("report", "--policy", policy, "-o", tmp_path / "a.html")
    cli("report", source, "--policy", policy, "-o", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    append_record(source, record(FAST_SMALL, 3, 10))  # no longer the same file
    message = cli("report", "--policy", policy, "-o", tmp_path / "c.html", code=2).stderr
    assert "records.jsonl" in message and "hybrid-moe report RECORDS" in message
    assert not (tmp_path / "c.html").exists()


def test_command_of_a_shipped_policy(tmp_path):
    found = json.loads(cli("report", "--device", "nvidia_b200", "-o", tmp_path / "a.html", "--json").stdout)
    assert found["written"] == [str(tmp_path / "a.html")]
    own = next(r for r in found["regret"] if r["candidate"] is None and r["routing"] is None)
    assert own["regret"]["worst_num_tokens"] == 16
    shipped = ROOT / "policies" / "nvidia_b200" / f"{PROBLEM.definition}.json"
    assert found["policy_sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()


def test_command_refuses(files, tmp_path):
    source, policy = files
    other = ROOT / "policies" / "nvidia_h200" / f"{PROBLEM.definition}.json"
    two = write(tmp_path / "two.jsonl", [record(FAST_SMALL, 1, 5), record(FAST_SMALL, 1, 5, device="gpu_y")])
    cases = {
        ("--policy", other): "got one for nvidia_h200",
        ("--device", "gpu_z"): "expected one of the records' gpu_x, got gpu_z",
        (): "hybrid-moe learn RECORDS",
        ("--policy", policy, "--png", tmp_path): "got a folder",
    }
    for arguments, wanted in cases.items():
        message = " ".join(cli("report", source, *arguments, "-o", tmp_path / "page.html", code=2).stderr.split())
        assert wanted in message, arguments
    assert "gpu_x, gpu_y" in cli("report", two, "-o", tmp_path / "page.html", code=2).stderr
    assert not (tmp_path / "page.html").exists()


def test_command_without_matplotlib(files, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    message = cli("report", files[0], "-o", tmp_path / "page.html", code=2).stderr
    assert "matplotlib" in message and "hybrid-moe[report]" in message


# ---- The strip in the terminal ----


def _strip(policy, width):
    table = resolve(policy, policy.problem, DeviceKey(policy.device))
    return view.strip(table.spans(), letters.assign_letters(policy.candidates), width).plain.split("\n")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_strip(width):
    policy = load_policy(ROOT / "policies" / "nvidia_b200" / f"{PROBLEM.definition}.json")
    strip, _, labels, *legend = _strip(policy, width)
    assert len(strip) == min(width - 2, 110) and set(strip) == set("BbD")
    # Each regime and each gap between them, 901 alone as well.
    assert re.fullmatch("B+b+D+b+B+b+B+b+B+", strip)
    assert re.fullmatch(r"1 +10 +100 +1000 +10000 +T", labels)
    at = {int(m.group()): m.start() for m in re.finditer(r"\d+", labels)}
    assert at[10] < strip.index("D") < at[100] and at[1000] < strip.rindex("b") < at[10000] + 1
    assert [line.split() for line in legend[:2]] == [["B", "flashinfer_trtllm"], ["D", "triton_fused[gemm=sgl_kernel]"]]


def test_strip_of_one_regime():
    policy = learned([record(FAST_SMALL, 7, 10)])
    strip, *_ = _strip(policy, 80)
    assert set(strip) == {letters.assign_letters([FAST_SMALL])[FAST_SMALL]}


def test_spans_hold_every_t_once():
    policy = load_policy(ROOT / "policies" / "nvidia_b200" / f"{PROBLEM.definition}.json")
    table = resolve(policy, policy.problem, DeviceKey(policy.device))
    spans = table.spans()
    assert spans[0].first == 1 and spans[-1].last is None
    assert all(a.last + 1 == b.first for a, b in zip(spans, spans[1:], strict=False))
    for span in spans:
        for t in {span.first, span.last or 10**6}:
            assert table.choice(t) == span.decision.choice


def test_explain_draws_the_strip():
    text = cli("explain", "--device", "nvidia_b200").stdout
    assert re.search("^B+b+D+b+B+b+B+b+B+$", text, re.MULTILINE) and "no results are near" in text
    assert "BBB" not in cli("explain", "--device", "nvidia_b200", "--json").stdout


def test_one_letter_for_a_candidate_everywhere():
    # A policy lists its candidates by speed, and has others, on each device.
    by_device = [load_policy(path).candidates for path in ROOT.glob("policies/*/*.json")]
    assert len(by_device) >= 3
    every = letters.assign_letters(backends.candidates())
    for candidates in by_device:
        found = letters.assign_letters(candidates)
        assert found == {c: every[c] for c in candidates} and list(found.values()) == sorted(found.values())
    # A new backend gets its own line in the table: after it, letters would depend on who else is there.
    assert {str(c) for c in backends.candidates()} == set(letters._TABLE)
